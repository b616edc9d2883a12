"""Which of the samples that may be trained on are held out for `val`: the section `holdout`. No torch.

The cutting itself is scikit-learn's (`sklearn.model_selection`), imported only then: it takes 1.6 s of CPU.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.task import Data, Divisible, Pool

if TYPE_CHECKING:
    from trainer.config import Holdout

Indices = NDArray[np.int64]


def hold_out(data: Data, holdout: Holdout, name: str) -> Data:
    """The data set called `name` with the `train` and `val` that `holdout` asks for.

    Raises UserError where the data set can't be cut so.
    """
    if holdout.method == "given":
        return data
    if not (hasattr(data, "pool") and hasattr(data, "divide")):
        raise UserError(
            f"holdout.method: the data set {name} can't be cut anew, since it has no methods `pool` and `divide` "
            "(docs/data.md): leave holdout out"
        )
    divisible = cast(Divisible, data)
    pool = divisible.pool(holdout.group_by)
    if holdout.method == "none":
        return divisible.divide(np.arange(pool.size), None)
    return divisible.divide(*cut(pool, holdout))


def cut(pool: Pool, holdout: Holdout) -> tuple[Indices, Indices]:
    """The samples of the pool to train on, and those that are held out: fold `holdout.fold`. Each in the pool's order,
    or in that of time.

    Every sample is held out in exactly one fold, but for `time_series`: there the first part is in none, and what comes
    after the fold is left out. Raises UserError where there are not enough samples, groups or classes.
    """
    folds = holdout.folds + (holdout.method == "time_series")  # there the first part is only trained on
    if pool.size < folds:
        raise UserError(
            f"holdout.folds: {pool.size} samples can't be cut into {folds} parts: make it smaller, or add data"
        )
    train, val = {"k_fold": _at_random, "stratified": _stratified, "grouped": _grouped, "time_series": _in_time}[
        holdout.method
    ](pool, holdout)
    if not len(train) or not len(val):
        raise UserError(f"holdout.folds: fold {holdout.fold} of {holdout.folds} is empty: make folds smaller")
    return train.astype(np.int64), val.astype(np.int64)


def _at_random(pool: Pool, holdout: Holdout) -> tuple[Indices, Indices]:
    from sklearn.model_selection import KFold

    kfold = KFold(holdout.folds, shuffle=True, random_state=holdout.seed)
    if pool.same is None:
        return _fold(kfold.split(np.empty(pool.size)), holdout)
    different, which = np.unique(pool.same, return_inverse=True)
    if len(different) < holdout.folds:
        raise UserError(
            f"holdout.folds: {len(different)} different samples can't be cut into {holdout.folds} parts: "
            "make it smaller"
        )
    _, held = _fold(kfold.split(np.empty(len(different))), holdout)
    return _sides(np.isin(which, held))


def _stratified(pool: Pool, holdout: Holdout) -> tuple[Indices, Indices]:
    from sklearn.model_selection import StratifiedKFold

    if pool.labels is None:
        raise UserError("holdout.method: stratified needs classes, and these data have none: use k_fold or grouped")
    most = int(np.unique(pool.labels, return_counts=True)[1].max())
    if most < holdout.folds:
        raise UserError(
            f"holdout.folds: no class has more than {most} samples, which can't be cut into {holdout.folds} parts: "
            "make it smaller"
        )
    kfold = StratifiedKFold(holdout.folds, shuffle=True, random_state=holdout.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer samples than folds is missing in some
        return _fold(kfold.split(np.empty(pool.size), pool.labels), holdout)


def _grouped(pool: Pool, holdout: Holdout) -> tuple[Indices, Indices]:
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    assert pool.keys is not None, "config_rules asks for group_by"
    groups, which = np.unique(pool.keys, return_inverse=True)
    if len(groups) < holdout.folds:
        raise UserError(
            f"holdout.folds: {len(groups)} groups ({holdout.group_by}) can't be cut into {holdout.folds} parts: "
            "make it smaller"
        )
    empty = np.empty(pool.size)
    can_balance = pool.labels is not None and np.bincount(pool.labels).max() >= holdout.folds
    if not can_balance:
        return _fold(
            GroupKFold(holdout.folds, shuffle=True, random_state=holdout.seed).split(empty, groups=which), holdout
        )
    kfold = StratifiedGroupKFold(holdout.folds, shuffle=True, random_state=holdout.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # as above
        return _fold(kfold.split(empty, pool.labels, which), holdout)


def _in_time(pool: Pool, holdout: Holdout) -> tuple[Indices, Indices]:
    from sklearn.model_selection import TimeSeriesSplit

    order = np.arange(pool.size) if pool.keys is None else np.argsort(pool.keys, kind="stable")
    train, val = _fold(TimeSeriesSplit(holdout.folds).split(np.empty(pool.size)), holdout)
    return order[train], order[val]


def _fold(parts: Any, holdout: Holdout) -> tuple[Indices, Indices]:
    train, val = list(parts)[holdout.fold]
    return train, val


def _sides(held: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    return np.flatnonzero(~held), np.flatnonzero(held)
