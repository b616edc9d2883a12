"""One schedule a file: `Config` and `build`."""
