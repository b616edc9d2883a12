"""Which checkpoints that trials were told to save are there: one that another trial goes on from has to be."""

from __future__ import annotations


class Saves:
    """A checkpoint is there when its trial comes further or ends by itself: it saves before that.

    A run that is broken off may have saved or not; gone on with, it reports the same evaluation again and is told to
    save again, or it comes further and so had saved.
    """

    def __init__(self) -> None:
        self._due: dict[int, int] = {}
        self._done: dict[int, set[int]] = {}

    def tell(self, number: int, step: int) -> None:
        """A trial was told to save at `step`."""
        self._due[number] = step

    def heard_of(self, number: int) -> None:
        """A trial has come to another evaluation, or ended by itself."""
        if number in self._due:
            self._done.setdefault(number, set()).add(self._due.pop(number))

    def is_there(self, source: tuple[int, int]) -> bool:
        return source[1] in self._done.get(source[0], ())

    def give_up(self, number: int) -> None:
        """What a trial has not come to save will never be there."""
        self._due.pop(number, None)
