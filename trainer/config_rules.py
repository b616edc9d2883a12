"""Rules between the fields of a config, each one line of reason away from its check."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from trainer.component import Component, takes
from trainer.config import Holdout, RunConfig
from trainer.errors import Problem, UserError
from trainer.tracking import folder_refused, is_folder

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def cross_check(config: RunConfig) -> list[Problem]:
    """Everything wrong with a config whose fields are each right on their own; problems carry a key, no place."""
    return list(_problems(config))


def _problems(config: RunConfig) -> Iterator[Problem]:
    train, evaluate, checkpoint = config.train, config.evaluate, config.checkpoint
    if not NAME.fullmatch(config.name):
        yield Problem(
            f"{config.name!r} is no folder name: use up to 100 letters, digits, `.`, `_`, `-`, "
            f"the first a letter or digit",
            "name",
        )
    if not config.runs_dir.strip():
        yield Problem("is empty: name a folder, or leave the key out", "runs_dir")
    if train.max_epochs is None and train.max_steps is None:
        yield Problem("set max_epochs or max_steps, or training never ends", "train.max_epochs")
    if train.activation_checkpointing not in ("none", "full"):
        try:
            re.compile(train.activation_checkpointing)
        except (re.error, RecursionError, OverflowError) as error:
            yield Problem(
                f"must be none, full or a regular expression: {error}",
                "train.activation_checkpointing",
            )
    if checkpoint.monitor is not None:
        if not re.fullmatch(r"val/.+", checkpoint.monitor):
            yield Problem(
                f"got {checkpoint.monitor!r}, wanted a metric of the val split, e.g. val/accuracy", "checkpoint.monitor"
            )
        elif evaluate.every_epochs is None and evaluate.every_steps is None:
            yield Problem(
                "needs evaluate.every_epochs or evaluate.every_steps, or it never changes", "checkpoint.monitor"
            )
    if config.adapter is not None:
        yield from _adapter_problems(config, config.adapter)
    yield from _holdout_problems(config, config.holdout)
    if config.tracking.uri is not None:
        yield from _uri_problems(config.tracking.uri)


def untaken(config: RunConfig) -> list[Problem]:
    """`init_from` and `adapter` where the recipe has no use for them."""
    problems = []
    for key, section in (("init_from", config.init_from), ("adapter", config.adapter)):
        try:
            taken = section is None or takes(config.recipe, key)
        except UserError:  # the recipe's own section says it
            continue
        if not taken:
            problems.append(Problem(f"the recipe {config.recipe.name} does not take it: its build has no {key}", key))
    return problems


def _adapter_problems(config: RunConfig, adapter: Component) -> Iterator[Problem]:
    """What an adapter needs, and the combinations that were never run."""
    if config.init_from is None:
        yield Problem("trains a few weights beside pretrained ones: set init_from, or leave adapter out", "adapter")
    if adapter.name == "qlora" and config.strategy.name == "fsdp":
        yield Problem(
            "qlora under fsdp was not run on accelerators: it shards the packed weights, but not their scales; "
            "use strategy ddp, or adapter lora",
            "strategy.name",
        )
    if adapter.name == "qlora" and config.train.device == "mps":
        yield Problem("bitsandbytes has no kernels for Apple's GPUs: use adapter lora", "adapter.name")


def _holdout_problems(config: RunConfig, holdout: Holdout) -> Iterator[Problem]:
    method, plain = holdout.method, Holdout()
    if method in ("given", "none"):
        for key in ("folds", "fold", "seed", "group_by"):
            if getattr(holdout, key) != getattr(plain, key):
                yield Problem(
                    f"method {method} cuts no folds: set holdout.method (k_fold, ...), or leave {key} out",
                    f"holdout.{key}",
                )
    elif holdout.fold >= holdout.folds:
        yield Problem(
            f"got {holdout.fold}, but of {holdout.folds} folds the last is {holdout.folds - 1}", "holdout.fold"
        )
    if method == "grouped" and holdout.group_by is None:
        yield Problem("method grouped needs to know what makes a group: set it, see docs/data.md", "holdout.group_by")
    if method in ("k_fold", "stratified") and holdout.group_by is not None:
        yield Problem(f"method {method} has no use for it: use grouped, or leave it out", "holdout.group_by")
    if method == "none" and config.checkpoint.monitor is not None:
        yield Problem(
            "holdout.method none leaves no val split to measure it on: leave monitor out, or use another method",
            "checkpoint.monitor",
        )


def _uri_problems(uri: str) -> Iterator[Problem]:
    try:
        parts = urlsplit(uri)
    except ValueError:
        yield Problem("is no valid address", "tracking.uri")
        return
    if is_folder(uri):
        yield Problem(folder_refused(uri), "tracking.uri")
    if "@" in parts.netloc:
        # The resolved config is written to the run directory and to MLflow: a password in it would be published.
        yield Problem(
            "holds a user name or password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in place of it",
            "tracking.uri",
        )
