"""Conversations to fine-tune a language model on, from JSONL, JSON, CSV, Parquet or a saved `datasets` folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from recipes.language.conversations import Conversations, ConversationSplits, Rows
from recipes.language.examine import Digests, choose, cut, examine, first_of_each
from recipes.language.formats import SHAPES, RowFormat, recognise, require_columns
from recipes.language.sources import find_splits, open_rows
from trainer.errors import UserError


@dataclass(frozen=True)
class Config:
    path: str | list[str]
    """File or files (JSONL, JSON, CSV, Parquet), a folder of them, a folder written by `datasets.save_to_disk`, or
    `package:NAME/PATH` for what lies inside an installed Python package."""
    format: Literal["auto", "chat", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """What the keys of a row mean; `auto` recognises it by the keys of the first row, and says it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the columns where they are others, e.g. `{prompt: question, completion: answer}`."""
    system: str | None = None
    """System prompt of conversations that have none of their own."""
    val_path: str | list[str] | None = None
    """Validation data; where not given, what `path` names so, else `val_fraction` is held out."""
    test_path: str | list[str] | None = None
    """Test data; where not given, what `path` names so, else `test_fraction` is held out."""
    val_fraction: Annotated[float, ">= 0", "< 1"] = 0.1
    """Part of the training data held out for `val` where there are no validation data; equal rows stay together."""
    test_fraction: Annotated[float, ">= 0", "< 1"] = 0.0
    """Part of the training data held out for `test` where there are no test data."""
    split_seed: Annotated[int, ">= 0", "<= 4294967295"] = 0
    """Which rows are held out; apart from the run's `seed`, so that runs share their splits."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What a row that is no conversation does (keys are missing, the completion is empty): `stop` with its place, or
    `skip` it and count."""
    remove_overlap: bool = False
    """Leave rows out of `train` that stand in `val` or `test`, too; they are counted in any case."""
    remove_duplicates: bool = False
    """Leave rows out of `train` that stood in it before; they are counted in any case."""

    def __post_init__(self) -> None:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction: leave nothing to train on; together they must be below 1")


@dataclass(frozen=True)
class _Part:
    """A split on its way: rows, what each says, and which are in it."""

    rows: Rows
    layout: RowFormat
    about: str
    skip_bad: bool
    digests: Digests
    mask: NDArray[np.bool_]

    def without(self, mask: NDArray[np.bool_]) -> _Part:
        return replace(self, mask=self.mask & ~mask)

    @property
    def said(self) -> Digests:
        return self.digests[self.mask]

    def conversations(self) -> Conversations:
        return choose(self.rows, self.layout, self.about, self.skip_bad, np.flatnonzero(self.mask))


def build(config: Config, seed: int) -> ConversationSplits:
    require_columns(config.columns, config.format)
    parts: dict[str, _Part] = {}
    notes: list[str] = []
    bad: dict[str, int] = {}
    for name, files in _files(config).items():
        parts[name] = _open(config, files, f"data.{'' if name == 'train' else name + '_'}path", notes)
        bad[name] = int((~parts[name].mask).sum())
    fractions = [0.0 if name in parts else getattr(config, f"{name}_fraction") for name in ("val", "test")]
    if any(fractions):
        _hold_out(parts, fractions, config.split_seed)
    counts = _count(parts, bad)
    if config.remove_duplicates:
        train = parts["train"]
        again = train.mask.copy()
        again[train.mask] = ~first_of_each(train.said)
        parts["train"] = train.without(again)
    if config.remove_overlap:
        for name in parts.keys() - {"train"}:
            parts["train"] = parts["train"].without(np.isin(parts["train"].digests, parts[name].said))
    if not parts["train"].mask.any():
        raise UserError("data.path: no row is left to train on")
    notes += _told(config, parts, counts)
    splits = {name: part.conversations() for name, part in parts.items()}
    together = hashlib.sha256("".join(f"{n}{c.fingerprint}" for n, c in sorted(splits.items())).encode()).hexdigest()
    digests = {name: part.said for name, part in parts.items()}
    return ConversationSplits(together, splits, notes, counts, digests)


def _files(config: Config) -> dict[str, list[Path]]:
    """Split -> files, `train` first; what is given by its own key comes before what `path` names."""
    named = find_splits(config.path, "data.path")
    if "train" not in named:
        raise UserError(f"data.path: holds no training data, only {', '.join(named)}: name the file to train on")
    for name, given in (("val", config.val_path), ("test", config.test_path)):
        if given is not None:
            found = find_splits(given, f"data.{name}_path")
            if len(found) > 1:
                raise UserError(f"data.{name}_path: holds several splits ({', '.join(found)}): name one file or folder")
            named[name] = next(iter(found.values()))
    return {name: named[name] for name in ("train", "val", "test") if name in named}


def _open(config: Config, files: list[Path], key: str, notes: list[str]) -> _Part:
    rows = open_rows(files)
    name: str = config.format
    if name == "auto":
        name = recognise(rows[0], config.columns, rows.place(0))
        keys = ", ".join(config.columns.get(k, k) for k in SHAPES[name].required)
        notes.append(f"{key}: format {name}, recognised by {keys}")
    layout = RowFormat(name, config.columns, config.system)
    about = json.dumps([name, sorted(config.columns.items()), config.system])
    skip_bad = config.bad_rows == "skip"
    digests = examine(choose(rows, layout, about, skip_bad))
    return _Part(rows, layout, about, skip_bad, digests, digests != 0)


def _hold_out(parts: dict[str, _Part], fractions: list[float], seed: int) -> None:
    train = parts["train"]
    if len(np.unique(train.said)) < 2:
        raise UserError("data.val_fraction: there is one row, and none can be held out; set it to 0, or add data")
    masks = cut(train.said, fractions, seed)
    for name, mask in zip(("train", "val", "test"), masks, strict=True):
        if name == "train" or mask.any():
            whole_mask = train.mask.copy()
            whole_mask[train.mask] = mask
            parts[name] = replace(train, mask=whole_mask)


def _count(parts: Mapping[str, _Part], bad: Mapping[str, int]) -> dict[str, dict[str, int]]:
    counts = {}
    for name, part in parts.items():
        counts[name] = {
            "rows": int(part.mask.sum()),
            "left_out": bad.get(name, 0),
            "duplicates": int((~first_of_each(part.said)).sum()),
            "overlap": 0 if name == "train" else int(np.isin(part.said, parts["train"].said).sum()),
        }
    return counts


def _told(config: Config, parts: Mapping[str, _Part], counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    sizes = ", ".join(f"{name} {int(part.mask.sum()):,}" for name, part in parts.items())
    found = []
    for name, count in counts.items():
        removed = name == "train" and config.remove_duplicates
        if count["duplicates"]:
            found.append(f"{count['duplicates']:,} duplicates in {name}{' (removed)' if removed else ''}")
        if count["overlap"]:
            also = " (removed there)" if config.remove_overlap else " (data.remove_overlap=true removes them there)"
            found.append(f"{count['overlap']:,} rows of {name} stand in train, too{also}")
        if count["left_out"]:
            found.append(f"{count['left_out']:,} bad rows of {name} skipped")
    return [f"data: rows: {sizes}; {'; '.join(found) or 'no duplicates, no overlap'}"]
