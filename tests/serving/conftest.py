"""Servers that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import front_bundles
import pytest
from front_server import FrontServer


@pytest.fixture(scope="session")
def front_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles `digits`, `photos` and `numbers`; not to be changed."""
    folder = tmp_path_factory.mktemp("bundles")
    front_bundles.digits(folder / "digits")
    front_bundles.photos(folder / "photos")
    front_bundles.numbers(folder / "numbers")
    return folder


@pytest.fixture(scope="session")
def front(front_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontServer]:
    """A server of all three, `digits` first, and of `digits` once more under an odd name."""
    bundles = [front_folders / name for name in ("digits", "photos", "numbers")]
    server = FrontServer(
        tmp_path_factory.mktemp("front"),
        *bundles,
        f"a name/with ü={front_folders / 'digits'}",
        "--request-log",
        "requests.jsonl",
        "--max-body-mb",
        "1",
        "--max-pixels",
        "1000000",
        "--alias",
        "/ping=/ready",
        "--alias",
        "/invocations=/predict",
    )
    yield server
    server.close()
