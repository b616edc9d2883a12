"""The search of `trainer tune`: which trials, with which values, and which of them go on."""
