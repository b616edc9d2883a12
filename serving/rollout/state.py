"""What a front leaves behind: its state directory, from which the next one goes on after any end."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving.errors import Mistake, ServingError

FORMAT = 1
STATE, LOCK, SOCKET, LOG = "state.json", ".lock", "admin.sock", "decisions.jsonl"
KEYS, ASSIGNMENTS, FRONT_LOG, LOGS = "keys.bin", "assignments.jsonl", "front.log", "logs"

PATIENCE_SECONDS = 2.0
"""How long the lock is waited for: who was killed may take a moment to be gone, and `holder` looks for a moment."""


class StateDirectory:
    """`deployments/NAME/`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def socket(self) -> Path:
        """The admin socket."""
        return self.path / SOCKET

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only front on this directory; the kernel frees the lock when the process ends. Raises Mistake."""
        self.path.mkdir(parents=True, exist_ok=True)
        # Children get no copy of the descriptor (PEP 446), so none of them can keep the lock.
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._take(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                raise Mistake(
                    f"{self.path}: a front is running on it (process {holder}); see: trainer deploy status"
                ) from error

    def holder(self) -> int | None:
        """Process of the front that runs on it; None where none does."""
        try:
            descriptor = os.open(self.path / LOCK, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0).strip()
            return int(text) if text.isdigit() else None
        finally:
            os.close(descriptor)
        return None

    def read(self) -> dict[str, Any] | None:
        """The state; None where there is none. Raises Mistake for one of another format, ServingError for damage."""
        path = self.path / STATE
        try:
            state = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ServingError(
                f"{path}: damaged ({error}); put a copy back, or begin anew in another folder"
            ) from error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise Mistake(f"{path}: written by another version (format {state.get('format')}); wanted format {FORMAT}")
        return state

    def write(self, state: dict[str, Any], durable: bool) -> None:
        """Replace the state at once; `durable` waits for the disk, for what a crash of the machine must not lose."""
        path = self.path / STATE
        temporary = path.with_name(f".{STATE}.{secrets.token_hex(4)}")
        with temporary.open("xb") as file:
            file.write(json.dumps({"format": FORMAT, **state}).encode())
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def clear_leftovers(self) -> None:
        """Remove what a killed front left half-written."""
        for path in self.path.glob(f".{STATE}.*"):
            path.unlink(missing_ok=True)
        self.socket.unlink(missing_ok=True)

    def append(self, name: str, entries: list[dict[str, Any]]) -> None:
        """Add lines to a JSON Lines file; a line that a kill tore is closed first, so that it spoils no other."""
        if not entries:
            return
        with (self.path / name).open("a+b") as file:
            if file.tell() and _last_byte(file.fileno(), file.tell()) != b"\n":
                file.write(b"\n")
            file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))

    def lines(self, name: str, last: int | None = None) -> list[dict[str, Any]]:
        """The objects of a JSON Lines file, the last ones where `last` is given, without torn lines."""
        try:
            raw = (self.path / name).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in raw[-last:] if last else raw:
            try:
                entry = json.loads(line)
            except ValueError:  # torn by a kill
                continue
            if isinstance(entry, dict):
                found.append(entry)
        return found

    def append_bytes(self, name: str, data: bytes) -> None:
        """Add bytes to a file."""
        if data:
            with (self.path / name).open("ab") as file:
                file.write(data)

    def records_of(self, name: str, size: int) -> bytes:
        """All of a file of records of `size` bytes; a record that a kill tore is cut off for good."""
        path = self.path / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return b""
        whole = len(data) - len(data) % size
        if whole < len(data):
            os.truncate(path, whole)
        return data[:whole]


def named(folder: str, name: str) -> StateDirectory:
    """`FOLDER/NAME`. Raises Mistake for a name that is none."""
    if not name or name.startswith((".", "-")) or not all(char.isalnum() or char in "._-" for char in name):
        raise Mistake(f"{name!r}: wanted a name of letters, digits, dots, dashes and underscores")
    return StateDirectory(Path(folder).absolute() / name)


def now() -> str:
    """The time as the logs have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _last_byte(descriptor: int, size: int) -> bytes:
    return os.pread(descriptor, 1, size - 1)
