"""What is learnt: one task a file, with its models, data and metrics."""
