"""What is held out: folds, groups, order of time; and training without a val split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import toy_config
from numpy.typing import NDArray
from outcome import entries, only_run, record

from trainer.assembly import build_data, preload
from trainer.cli import main
from trainer.config import Holdout
from trainer.errors import UserError
from trainer.holdout import cut, hold_out
from trainer.load import load
from trainer.task import Pool

LABELS = np.random.RandomState(0).choice(5, 203, p=[0.5, 0.25, 0.15, 0.08, 0.02])
GROUPS = np.random.RandomState(1).randint(0, 23, 203)


def folds(
    pool: Pool, method: str, number: int = 5, **options: Any
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    return [cut(pool, Holdout(method, number, fold, **options)) for fold in range(number)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "pool", "options"),
    [
        ("k_fold", Pool(203), {}),
        ("k_fold", Pool(203, same=np.arange(203) // 2), {}),
        ("stratified", Pool(203, LABELS), {}),
        ("grouped", Pool(203, LABELS, GROUPS), {"group_by": "x"}),
        ("grouped", Pool(203, None, GROUPS.astype(str)), {"group_by": "x"}),
    ],
)
def test_every_sample_is_held_out_in_exactly_one_fold(method: str, pool: Pool, options: dict[str, Any]) -> None:
    parts = folds(pool, method, **options)
    assert sorted(np.concatenate([val for _, val in parts]).tolist()) == list(range(203))
    for train, val in parts:
        assert sorted([*train.tolist(), *val.tolist()]) == list(range(203))
        assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all(), "in the pool's own order"
    again, other = folds(pool, method, **options), folds(pool, method, **options, seed=1)
    assert all((a[1] == b[1]).all() for a, b in zip(parts, again, strict=True))
    assert any(len(a[1]) != len(b[1]) or (a[1] != b[1]).any() for a, b in zip(parts, other, strict=True))


def test_stratified_folds_have_every_class_in_proportion() -> None:
    counts = np.array([np.bincount(LABELS[val], minlength=5) for _, val in folds(Pool(203, LABELS), "stratified", 7)])
    assert (counts.max(0) - counts.min(0) <= 1).all() and counts.sum() == 203
    assert counts[:, 4].min() == 0, "the rarest class has fewer samples than there are folds, and no warning is given"


def test_a_group_is_never_on_both_sides() -> None:
    for labels in (LABELS, None):
        for train, val in folds(Pool(203, labels, GROUPS), "grouped", group_by="x"):
            assert not set(GROUPS[train]) & set(GROUPS[val])


def test_samples_that_say_the_same_are_never_on_both_sides() -> None:
    same = np.random.RandomState(2).randint(0, 90, 203)
    for train, val in folds(Pool(203, same=same), "k_fold"):
        assert not set(same[train]) & set(same[val])


@pytest.mark.parametrize("keys", [None, np.random.RandomState(3).permutation(203), GROUPS])
def test_a_fold_of_time_is_trained_on_what_comes_before(keys: NDArray[np.int64] | None) -> None:
    times = np.arange(203) if keys is None else keys
    sizes = []
    for train, val in folds(Pool(203, keys=keys), "time_series", 6):
        assert (np.diff(times[train]) >= 0).all() and (np.diff(times[val]) >= 0).all()
        assert times[train].max() <= times[val].min() and not set(train) & set(val)
        sizes.append((len(train), len(val)))
    assert sizes == [(29 + 29 * fold, 29) for fold in range(6)]


@pytest.mark.parametrize(
    ("method", "pool", "number", "says"),
    [
        ("k_fold", Pool(4), 5, "4 samples can't be cut into 5 parts"),
        ("k_fold", Pool(9, same=np.zeros(9)), 2, "1 different samples can't be cut into 2 parts"),
        ("time_series", Pool(5), 5, "5 samples can't be cut into 6 parts"),
        ("stratified", Pool(9, np.arange(9) // 2), 3, "no class has more than 2 samples"),
        ("stratified", Pool(9), 3, "these data have none"),
        ("grouped", Pool(9, keys=np.zeros(9)), 2, r"1 groups \(x\) can't be cut into 2 parts"),
    ],
)
def test_what_is_too_small_is_one_line(method: str, pool: Pool, number: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        cut(pool, Holdout(method, number, group_by="x" if method == "grouped" else None))  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "pool", "number"),
    [
        ("k_fold", Pool(5), 5),
        ("stratified", Pool(6, np.array([0, 0, 0, 1, 2, 3])), 3),
        ("grouped", Pool(5, keys=np.arange(5)), 5),
        ("time_series", Pool(6), 5),
    ],
)
def test_the_smallest_that_can_be_cut(method: str, pool: Pool, number: int) -> None:
    parts = folds(pool, method, number, group_by="x" if method == "grouped" else None)
    assert all(len(train) and len(val) for train, val in parts)


def test_a_data_set_that_can_not_be_cut_says_what_it_lacks() -> None:
    class Fixed:
        fingerprint = "fixed"

        def split(self, name: str) -> None:
            return None

    assert hold_out(Fixed(), Holdout(), "mine.fixed").fingerprint == "fixed"
    with pytest.raises(UserError, match=r"data set mine.fixed can't be cut anew, since it has no methods `pool` and"):
        hold_out(Fixed(), Holdout("k_fold"), "mine.fixed")


def test_a_training_on_a_fold(tmp_path: Path) -> None:
    config = toy_config(tmp_path, evaluate={"test": True})
    folds_of = {}
    for fold in range(3):
        overrides = [f"name=fold-{fold}", "holdout.method=stratified", "holdout.folds=3", f"holdout.fold={fold}"]
        assert main(["fit", "--config", str(config), *overrides]) == 0
        run = only_run(tmp_path, f"fold-{fold}")
        last = {key: value for entry in entries(run) for key, value in entry.items()}
        assert last["val/count"] == 50 and last["test/count"] == 33, "150 samples in three parts, the test untouched"
        assert last["step"] == 20 and last["epoch"] == 2.0
        folds_of[fold] = record(run)["lineage"]
    assert len({lineage["data"] for lineage in folds_of.values()}) == 3, "another fold is other data"
    assert main(["fit", "--resume", str(only_run(tmp_path, "fold-0")), "holdout.fold=1", "train.max_epochs=3"]) == 2
    assert main(["fit", "--resume", str(only_run(tmp_path, "fold-0")), "train.max_epochs=3", "train.threads=1"]) == 0
    assert main(["evaluate", str(only_run(tmp_path, "fold-0")), "--split", "val"]) == 0


def test_without_a_val_split_all_is_trained_on(tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    assert main(["fit", "--config", str(config), "holdout.method=none"]) == 0
    run = only_run(tmp_path)
    last = {key: value for entry in entries(run) for key, value in entry.items()}
    assert last["step"] == 30 and "test/loss" in last and "val/loss" not in last
    assert record(run)["status"] == "finished"


def test_kept_data_are_those_of_the_same_options_and_seed(tmp_path: Path) -> None:
    config = load(toy_config(tmp_path), ["data.samples=40"])
    built = build_data(config)
    preload(config)
    kept = build_data(load(toy_config(tmp_path), ["data.samples=40", "data.batch_size=7", "optimizer.lr=0.5"]))
    assert kept is build_data(config) and kept is not built
    for other in ("data.samples=41", "seed=1"):
        assert build_data(load(toy_config(tmp_path), ["data.samples=40", other])) is not kept
    cut_anew = build_data(load(toy_config(tmp_path), ["data.samples=40", "holdout.method=k_fold"]))
    assert cut_anew is not kept and len(cut_anew.split("val") or ()) == 12


def test_kept_data_give_the_same_bits(tmp_path: Path) -> None:
    fresh, kept = (toy_config(tmp_path, name=name) for name in ("fresh", "kept"))
    assert main(["fit", "--config", str(fresh), "model.dropout=0.3", "data.samples=60"]) == 0
    preload(load(kept, ["model.dropout=0.3", "data.samples=60"]))
    assert main(["fit", "--config", str(kept), "model.dropout=0.3", "data.samples=60"]) == 0
    assert entries(only_run(tmp_path, "fresh")) == entries(only_run(tmp_path, "kept"))
