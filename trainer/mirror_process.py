"""The mirror's process from its parent's side: started, started again when it dies, told the end, ended for good."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

RESTARTS = 3
RESTART_SECONDS = 1.0
"""Pause before a mirror that died is started again; doubled from one to the next."""
KILL_SECONDS = 1.0
LOG_FILE = "mirror.log"


class MirrorProcess:
    """A mirror that follows one run. A thread reads what it tells; it waits in the kernel and costs nothing."""

    def __init__(
        self,
        run_path: Path,
        order: dict[str, Any],
        variables: dict[str, str],
        problem_begins: Callable[[str], None],
    ) -> None:
        """Start it with the environment `variables`; `problem_begins` is called once at most. Raises OSError."""
        self._run_path = run_path
        self._order = order
        self._variables = variables
        self._problem_begins: Callable[[str], None] | None = problem_begins
        self._word: dict[str, Any] | None = None
        self._is_given_up = False
        self._lock = threading.Lock()
        self._finishing = threading.Event()
        self._is_over = threading.Event()
        self.problem: str | None = None
        """Why nothing can be sent right now."""
        self.has_heard = False
        """Whether it has heard the final word."""
        self.ended: dict[str, Any] = {}
        """What it told at its end: fields of `tracking.json`."""
        self._process = self._spawn()
        threading.Thread(target=self._watch, name="mlflow-mirror", daemon=True).start()

    def finish(self, word: dict[str, Any]) -> None:
        """Tell it the final word; `wait` then."""
        with self._lock:
            self._word = word
            _tell(self._process, word)
        self._finishing.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, for good, within this time."""
        return self._is_over.wait(max(seconds, 0))

    def kill(self) -> None:
        """End it at once."""
        with self._lock:
            self._is_given_up = True
            self._process.kill()
        self._is_over.wait(KILL_SECONDS)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with _log(self._run_path / LOG_FILE) as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "trainer.mirror", str(self._run_path), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env=self._variables,
                start_new_session=True,  # Ctrl-C goes to the terminal's whole process group
            )
        _tell(process, self._order)
        return process

    def _watch(self) -> None:
        pause = RESTART_SECONDS
        for left in reversed(range(RESTARTS + 1)):
            self._listen()
            self._process.wait()
            if self.ended or not left or self._is_given_up:
                break
            self._finishing.wait(pause)
            pause *= 2
            if not self._restart():
                break
        self._is_over.set()

    def _restart(self) -> bool:
        with self._lock:
            if self._is_given_up:
                return False
            try:
                self._process = self._spawn()
            except OSError as error:  # no memory for another process: told at the end, nothing is lost
                self.ended = {"last_error": f"the mirror died and can't be started again: {error}"}
                return False
            if self._word is not None:
                _tell(self._process, self._word)
        return True

    def _listen(self) -> None:
        """Take in what the mirror tells, until it is gone."""
        told, said = self._process.stdout, b""
        assert told is not None
        # Unbuffered: a thread that waits in a buffered read may hold up the end of the interpreter
        while piece := os.read(told.fileno(), 65536):
            *lines, said = (said + piece).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        told.close()

    def _take(self, word: dict[str, Any]) -> None:
        self.has_heard = self.has_heard or "heard" in word
        self.ended = word.get("ended", self.ended)
        self.problem = word.get("problem", self.problem)
        if self.problem is not None and self._problem_begins is not None:
            begins, self._problem_begins = self._problem_begins, None
            begins(self.problem)


def _tell(process: subprocess.Popen[bytes], word: dict[str, Any]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is dead: `_watch` starts another one, which is told again
        process.stdin.write(f"{json.dumps(word)}\n".encode())


def _log(path: Path) -> IO[bytes]:
    try:
        return path.open("ab")
    except OSError:  # a full or read-only disk: the mirror tells its end on standard output, too
        return Path(os.devnull).open("ab")
