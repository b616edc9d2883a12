"""One target a file, each with `render(facts, options) -> {path: text}`."""
