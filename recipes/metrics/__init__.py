"""Exact metrics: sums that add over batches and ranks."""
