"""What several tests of serving share: servers, bundles, and one zygote for all tests that start workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import front_bundles  # these are found through the path that the other conftest sets
import pytest
import summing
from front_server import FrontServer

from serving.workers import kinship
from serving.workers.nursery import Nursery

MAX_PIXELS = 10_000_000


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


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks workers within milliseconds."""
    nursery = Nursery.open(MAX_PIXELS)
    yield nursery
    asyncio.run(nursery.close())
    kinship.adopt_orphans(False)  # other tests look at what their processes leave behind


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two bundles of the tiny model: version i answers with (i + 1) times the sum."""
    folder = tmp_path_factory.mktemp("versions")
    return [summing.make(folder / f"v{scale}", float(scale)).path for scale in (1, 2)]
