"""Seeds that follow from the search's seed, and the global random state lent to a library."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def seed_from(*numbers: int) -> int:
    """A seed below 2**32 from non-negative integers; different for different ones, the same in every process."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """`random` and `np.random` begin from `numbers` inside, and are as before afterwards."""
    kept, kept_numpy = random.getstate(), np.random.get_state()
    seed = seed_from(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(kept)
        np.random.set_state(kept_numpy)
