"""`trainer verify --parallel` says yes to what does not depend on the world, and names where it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import toy_config
from processes import ForkServer
from verifying import verify_here

Verify = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def verify(server: ForkServer, tmp_path: Path) -> Verify:
    """`verify(*args)`: the exit code, and the JSON that was printed."""

    def run(*args: str) -> tuple[int, dict[str, Any]]:
        done = verify_here(server, tmp_path, *args, "--json")
        return done.code, json.loads(done.out)

    return run


def by_name(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {outcome["way"]["name"]: outcome for outcome in answer["outcomes"]}


GOOD: dict[str, dict[str, Any]] = {
    "odd batch, dropout, workers": {
        "model": {"name": "toy.net", "dropout": 0.3},
        "data": {"batch_size": 7, "samples": 101, "workers": 1},
        "train": {"clip_norm": 1.0},
    },
    "weights of samples, accumulation, unreadable samples": {
        "recipe": {"name": "toy.recipe", "weighted": True},
        "data": {"batch_size": 3, "bad": [3, 5, 7, 11, 13], "max_bad_samples": 5},
        "train": {"accumulate": 3, "activation_checkpointing": "full"},
    },
    "bf16-mixed": {"train": {"precision": "bf16-mixed"}, "optimizer": {"name": "sgd", "lr": 0.1}},
    "16-mixed, one sample": {"train": {"precision": "16-mixed"}, "data": {"batch_size": 1}},
}


@pytest.mark.parametrize("name", GOOD)
def test_a_config_that_does_not_depend_on_the_world_is_the_same(name: str, tmp_path: Path, verify: Verify) -> None:
    config = toy_config(tmp_path, **GOOD[name])
    code, answer = verify("--parallel", "--config", str(config))
    outcomes = by_name(answer)
    assert (code, answer["same"], list(outcomes)) == (0, True, ["accumulation", "ddp", "fsdp"]), answer
    loading = GOOD[name].get("data", {}).get("batch_size", 10) * GOOD[name]["train"].get("accumulate", 1)
    assert answer["global_batch"] == (2 * loading - 1 if loading > 1 else 2)
    limit = answer["tolerance"]
    assert limit == {"bf16-mixed": 5e-2, "16-mixed": 2e-2}.get(GOOD[name]["train"].get("precision"), 1e-4)
    for outcome in outcomes.values():
        assert all(0 <= outcome[what] <= limit for what in ("losses", "gradients", "weights")), outcome
        assert outcome["error"] is outcome["place"] is None
    assert answer["silenced"] == ({"Dropout": 3} if "dropout" in name else {})
    assert not list(tmp_path.glob("trainer-verify-*"))


@pytest.mark.parametrize(
    ("sections", "stage", "name", "kind", "hint"),
    [
        ({"recipe": {"name": "toy.mean_recipe"}}, "loss", "", "", "no mean"),
        ({"recipe": {"name": "toy.mixing_recipe"}}, "input", "[0]", "", "mixup"),
        ({"recipe": {"name": "toy.detached_recipe"}}, "gradient", "2.bias", "Linear", "sum over samples"),
    ],
    ids=["mean", "mixup", "gradients"],
)
def test_what_depends_on_the_world_is_found_and_named(
    sections: dict[str, Any], stage: str, name: str, kind: str, hint: str, tmp_path: Path, verify: Verify
) -> None:
    code, answer = verify("--parallel", "--config", str(toy_config(tmp_path, **sections)))
    assert (code, answer["same"]) == (1, False)
    for outcome in by_name(answer).values():
        place = outcome["place"]
        assert (place["stage"], place["kind"]) == (stage, kind), outcome
        assert place["name"] == name or stage == "loss"
        assert hint in outcome["hint"]
        assert outcome["losses"] > answer["tolerance"] or outcome["gradients"] > answer["tolerance"]
    assert [str(path) for path in tmp_path.glob("trainer-verify-*")] == [answer["folder"]]


def test_a_generator_of_the_data_set_is_found_where_ranks_draw_from_their_own(tmp_path: Path, verify: Verify) -> None:
    config = toy_config(tmp_path, data={"name": "toy.stateful_points", "generator": "global"})
    code, answer = verify("--parallel", "--config", str(config))
    outcomes = by_name(answer)
    assert code == 1 and outcomes["accumulation"]["place"] is None  # one process draws them in the same order
    for name in ("ddp", "fsdp"):
        assert (outcomes[name]["place"]["stage"], outcomes[name]["place"]["name"]) == ("batch", "x")
        assert "sample_seed" in outcomes[name]["hint"]


def test_a_strategy_that_the_config_asks_for_must_run(tmp_path: Path, verify: Verify) -> None:
    # A parameter without dimensions can't be sharded.
    model = {"name": "toy.forgetful_net", "forgets": "parameter"}
    config = toy_config(tmp_path, model=model, strategy={"name": "fsdp"})
    code, answer = verify("--parallel", "--config", str(config), "--steps", "2")
    outcomes = by_name(answer)
    assert "scalar parameters" in outcomes["fsdp"]["error"] and outcomes["fsdp"]["losses"] is None
    assert outcomes["ddp"]["error"] is None and outcomes["ddp"]["place"] is None
    assert code == 1


def test_the_table_names_every_way_and_what_was_used(tmp_path: Path, server: ForkServer) -> None:
    config = toy_config(tmp_path, optimizer={"name": "muon"}, model={"name": "toy.net", "dropout": 0.1})
    done = verify_here(server, tmp_path, "--parallel", "--config", str(config), "--keep")
    out = done.out.splitlines()
    assert done.code == 0
    assert out[0].startswith("toy: 3 steps with a global batch of 19, one process against others")
    assert "of weights 5e-02" in out[0]  # muon computes in bf16
    assert out[1].split() == ["processes", "batch", "accumulate", "losses", "gradients", "weights"]
    assert out[2].split() == ["one", "process", "1", "20", "1", "-", "-", "-", "reference"]
    assert out[3].split()[:4] == ["accumulation", "1", "10", "2"] and out[3].endswith("same")
    assert out[4].split()[:4] == ["ddp", "2", "10", "1"] and out[4].endswith("same")
    assert out[5].split()[:4] == ["fsdp", "2", "10", "1"] and out[5].endswith("did not run")
    assert out[6].startswith("fsdp: did not run: optimizer: muon needs whole matrices")
    assert out[7] == "switched off, since each rank draws them for itself: 3 Dropout"
    (folder,) = tmp_path.glob("trainer-verify-*")
    assert out[8] == f"folder: {folder}"


def test_batch_statistics_are_named_with_their_module_once_for_all_ways(tmp_path: Path, server: ForkServer) -> None:
    config = toy_config(tmp_path, model={"name": "toy.net", "norm": "batch"})
    done = verify_here(server, tmp_path, "--parallel", "--config", str(config), "--steps", "1", "--tolerance", "1e-3")
    out = done.out.splitlines()
    assert done.code == 1
    explained = [line for line in out if "begins to differ in" in line]
    assert "with a global batch of 19" in out[0] and "tolerance 1e-03" in out[0]
    assert explained and "module 1.0.1 (BatchNorm1d)" in explained[0] and "group or layer norm" in explained[0]
    assert sum(line.partition(":")[0].count(",") + 1 for line in explained) == 3


def test_a_reference_that_fails_says_why(tmp_path: Path, verify: Verify) -> None:
    config = toy_config(tmp_path, recipe={"name": "toy.failing_recipe", "at": 2})
    code, answer = verify("--parallel", "--config", str(config))
    assert code == 1 and "the sky is falling" in answer["error"]
