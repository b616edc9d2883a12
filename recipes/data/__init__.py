"""One data set a file: `Config` and `build(config, seed)`."""
