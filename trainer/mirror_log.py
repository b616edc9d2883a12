"""What the mirror writes down: without secrets, whoever prints them, and without an error when the disk is full."""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import TextIO
from urllib.parse import unquote, urlsplit

from trainer.lineage import without_password

SECRET_NAMES = re.compile(r"PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|ACCESS_KEY")
"""Of environment variables."""
SHORTEST_SECRET = 4
"""Characters; to hide shorter ones would hide words."""


def secrets_in(environment: Mapping[str, str], uri: str = "") -> list[str]:
    """What must not be written down: values of variables with such names, the password of an address, and both as
    they are sent to a server, which may answer with what it got. Longest first."""
    found = {value for name, value in environment.items() if SECRET_NAMES.search(name.upper())}
    parts = urlsplit(uri)
    users = [(unquote(parts.username or ""), unquote(parts.password or ""))]
    users.append((environment.get("MLFLOW_TRACKING_USERNAME", ""), environment.get("MLFLOW_TRACKING_PASSWORD", "")))
    for user, password in users:
        if password:
            found |= {password, base64.b64encode(f"{user}:{password}".encode()).decode()}
    return sorted((secret for secret in found if len(secret) >= SHORTEST_SECRET), key=len, reverse=True)


def redacted(text: str, secrets: Sequence[str]) -> str:
    """The text with each secret replaced by `***`, and addresses without passwords."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return without_password(text)


class MirrorLog(io.TextIOBase):
    """Stands for `sys.stderr`: mlflow and its libraries log there, too."""

    def __init__(self, stream: TextIO, secrets: Sequence[str]) -> None:
        self._stream = stream
        self.secrets = secrets

    def write(self, text: str) -> int:
        """Never raises for a disk that is full: what is told here is told in `tracking.json`, too."""
        with contextlib.suppress(OSError):
            self._stream.write(redacted(text, self.secrets))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """All is written already."""

    def fileno(self) -> int:
        return self._stream.fileno()
