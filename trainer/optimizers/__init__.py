"""One optimizer a file: `Config` and `build`."""
