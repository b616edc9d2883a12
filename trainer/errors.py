"""Errors a user can meet. The class decides the exit code; the text is the one line that is printed."""

from __future__ import annotations

from dataclasses import dataclass

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_USER = 2
EXIT_PREEMPTED = 75


class TrainerError(Exception):
    """A failure with a message fit for the terminal: what is wrong, where, what to do."""

    exit_code = EXIT_FAILURE


class UserError(TrainerError):
    """A mistake in what was asked for: nothing was started, or nothing was lost."""

    exit_code = EXIT_USER


class Preempted(TrainerError):
    """The run stopped on a signal with a checkpoint written; running it again goes on."""

    exit_code = EXIT_PREEMPTED


class Followed(TrainerError):
    """This rank ends because another one failed, which has told the cause."""

    def __init__(self, text: str, own: BaseException) -> None:
        super().__init__(text)
        self.exit_code = getattr(own, "exit_code", EXIT_FAILURE)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config."""

    message: str
    key: str = ""
    """Dotted key, e.g. `train.max_epochs`; empty when the whole file is meant."""
    file: str = ""
    """Path of the file, or `command line` for an override; empty when nothing was written down."""
    line: int = 0
    """1-based; 0 where there is none."""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file and self.line else self.file
        return ": ".join(part for part in (where, self.key, self.message) if part)


class ConfigError(UserError):
    """Everything wrong with a config, all problems together."""

    def __init__(self, problems: list[Problem]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))
