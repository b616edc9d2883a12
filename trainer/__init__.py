"""How a run goes: config, engine, strategies, checkpoints, tracking."""

__version__ = "0.1.0"
