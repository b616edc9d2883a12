"""What happens after the training: bundles, their server, rollouts. Imports neither `trainer` nor `recipes`."""
