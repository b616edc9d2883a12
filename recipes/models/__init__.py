"""One model (or library of models) a file: `Config` and `build(config, info)`."""
