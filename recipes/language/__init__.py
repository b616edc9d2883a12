"""What recipes on language share."""
