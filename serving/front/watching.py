"""`--watch`: a bundle whose folder has changed is reloaded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from serving.bundle import MANIFEST
from serving.front.served import Served

PERIOD_SECONDS = 1.0
Seen = tuple[str, int, int, int]


async def watch(served: Served, reload: Callable[[Any], Awaitable[None]]) -> None:
    """Look every second, for ever. What was refused is not tried again before it changes again."""
    known = {model.name: look(model.path) for model in served}
    before = dict(known)
    while True:
        await asyncio.sleep(PERIOD_SECONDS)
        for model in served:
            seen = look(model.path)
            # Seen twice alike: the manifest, which is written last, is whole.
            if seen is not None and seen != known[model.name] and seen == before[model.name]:
                known[model.name] = seen
                await reload(model)
            before[model.name] = seen


def look(path: Path) -> Seen | None:
    """What tells one bundle at a path from the next; None while there is none."""
    try:
        manifest = (path / MANIFEST).resolve(strict=True)
        status = manifest.stat()
    except OSError:
        return None
    return str(manifest), status.st_ino, status.st_size, status.st_mtime_ns
