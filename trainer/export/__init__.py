"""From a run to a bundle: programs, golden requests, measurements, card."""
