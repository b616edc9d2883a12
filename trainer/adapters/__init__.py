"""One adapter a file: `Config` and `build(config, load)`."""
