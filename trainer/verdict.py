"""What becomes of a training after an evaluation: the answer of whoever watches it. No torch."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """After the last step there is nothing to end: the run then finishes, whatever the verdict."""

    CONTINUE = "continue"
    SAVE = "save"
    """Save a checkpoint, then go on."""
    STOP = "stop"
    """End here without saving: the training is not worth going on with."""
    PAUSE = "pause"
    """Save a checkpoint and end; the run may be gone on with later."""
    REPLACE = "replace"
    """End here without saving: another run goes on in its place, from another checkpoint."""


ENDS = (Verdict.STOP, Verdict.REPLACE)
"""Verdicts that end a run where it is."""
PAUSE_REASON = "a pause"
"""What the record of a run names as the reason for its end where a verdict, and no signal, paused it."""
