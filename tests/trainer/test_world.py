"""The world that torchrun's environment describes."""

from __future__ import annotations

import pytest

from trainer.errors import UserError
from trainer.world import World, from_environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_nothing_launched_is_one_process() -> None:
    assert from_environment({}) == World(0, 1, 0, 1, launched=False)
    assert from_environment({"RANK": "0"}).is_main


def test_torchrun() -> None:
    world = from_environment(TORCHRUN)
    assert world == World(rank=3, size=4, local_rank=1, local_size=2, launched=True)
    assert world.num_nodes == 2 and not world.is_main


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "x"}, "whole numbers"),
        ({"RANK": "4"}, "no world"),
        ({"RANK": "-1"}, "no world"),
        ({"LOCAL_RANK": "2"}, "no world"),
        ({"LOCAL_WORLD_SIZE": "8"}, "no world"),
        ({"LOCAL_WORLD_SIZE": "3", "LOCAL_RANK": "0"}, "not a multiple"),
    ],
)
def test_contradictions(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_environment({**TORCHRUN, **changes})


def test_half_an_environment_names_what_is_missing() -> None:
    with pytest.raises(UserError, match="RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        from_environment({"WORLD_SIZE": "2"})
