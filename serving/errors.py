"""Errors of serving. Those of a command are one line for the terminal; those of a request, one line for its client."""

from __future__ import annotations


class ServingError(Exception):
    """A failure with a message fit for the terminal: what is wrong, where, what to do."""

    exit_code = 1


class Mistake(ServingError):
    """A mistake in what was asked for: nothing was started, or nothing was lost."""

    exit_code = 2


class BadBundle(Mistake):
    """A bundle that is damaged, incomplete, or of a format that this version does not know."""


class BadInput(Exception):
    """One sample, or a part of a request, that can't be used."""

    def __init__(self, field: str, message: str, is_undecodable: bool = False) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        """Where in the request, e.g. `instances[3]`."""
        self.message = message
        self.is_undecodable = is_undecodable
        """Well-formed, but its contents are no picture, or none that the model can take: 422 rather than 400."""
