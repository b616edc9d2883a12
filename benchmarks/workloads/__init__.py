"""Components that benchmarks name in their configs, as a user's own code is named, and the peers' training loops."""
