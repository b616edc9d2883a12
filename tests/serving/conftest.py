"""Fixtures of serving: one zygote for all tests that start workers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import summing  # found through the path that the other conftest sets

from serving.workers.nursery import Nursery

MAX_PIXELS = 10_000_000


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks workers within milliseconds."""
    nursery = Nursery.open(MAX_PIXELS)
    yield nursery
    asyncio.run(nursery.close())


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two bundles of the tiny model: version i answers with (i + 1) times the sum."""
    folder = tmp_path_factory.mktemp("versions")
    return [summing.make(folder / f"v{scale}", float(scale)).path for scale in (1, 2)]
