"""A language model's bundle: a folder for transformers, merged or with its adapter beside it, and golden prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import RunConfig
from trainer.errors import TrainerError, UserError
from trainer.files import reason, remedy

if TYPE_CHECKING:
    from serving.bundle import Bundle
    from trainer.language_model import Opened
    from trainer.merge import Into
    from trainer.run import Run

MODEL, ADAPTERS = "model", "adapters"
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
"""Of a log-probability, by the type of the weights: served and trained model add in another order."""
AFTER_QUANTISED = 5e-2
"""The same where the training saw quantised weights, whose kernels compute in 16 bits."""


@dataclass(frozen=True)
class LanguageOptions:
    """What was asked for."""

    name: str | None = None
    """Of the bundle; the run's own by default."""
    adapters: bool = False
    """Keep the adapter beside its base, which then answers with and without it."""
    golden: int = 8
    """Prompts with the run's own answers."""
    into: Into | None = None
    """The base that the adapter is put into; see `trainer.merge`."""
    tolerance: float = 1e-4
    """Largest difference of a logit between merged and adapted model."""
    price: float | None = None
    """US dollars for an hour of a machine like this one."""


@dataclass(frozen=True)
class LanguageExport:
    """What was written."""

    bundle: Bundle
    checkpoint: str
    drift_from_trained: float
    """Largest difference of a logit from the model as it was trained."""
    deviation: float
    """Of the golden prompts' log-probabilities, answered by the engine that will serve them."""
    measurements: dict[str, Any]


def write_language_bundle(
    run: Run, config: RunConfig, which: str, folder: Path, options: LanguageOptions, say: Callable[[str], None]
) -> LanguageExport:
    """Write the bundle of a checkpoint (`best`, `newest` or a step) into `folder`, empty or not there yet.

    Raises UserError for a run without a language model or adapter, TrainerError where the model that was written does
    not answer as the run's does.
    """
    from trainer.language_model import open_run

    if options.adapters and config.adapter is None:
        raise UserError(f"{run.path}: trained without an adapter, so there is none to keep beside the base")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output: {folder} is there already; name another folder, or remove it")
    opened = open_run(run, config, which, say)
    from trainer.export.language_golden import write_golden

    try:
        folder.mkdir(parents=True, exist_ok=True)
        adapter = adapter_name(config.name) if options.adapters else None
        drift, plain = _write_model(opened, run, config, folder, adapter, options)
        say("asking the run's model the golden prompts")
        count = write_golden(opened, plain, folder, adapter, options.golden)
        return _finish(opened, run, config, folder, options, adapter, count, drift, say)
    except OSError as error:
        raise TrainerError(f"{folder}: could not be written ({reason(error)}); {remedy(error)}") from error


def is_language_run(config: RunConfig) -> bool:
    """Whether the run's model is transformers' language model, as far as the config says it."""
    return config.recipe.name == "language_modeling" or config.model.name == "causal_lm" or config.adapter is not None


def adapter_name(name: str) -> str:
    """What a request calls the adapter: the run's name, without what a name in a request or of a module can't have."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "adapter"


def _write_model(
    opened: Opened, run: Run, config: RunConfig, folder: Path, adapter: str | None, options: LanguageOptions
) -> tuple[float, Any]:
    """(drift of a logit from the model as trained, the base alone where its adapter stays beside it)."""
    from trainer.language_model import quiet
    from trainer.merge import at_full_precision, chosen_base, drift_from_trained, merge_opened
    from trainer.peft_adapter import write_adapter

    target = folder / MODEL
    if config.adapter is not None and adapter is None:
        merged = merge_opened(opened, run, config, target, chosen_base(config, options.into), options.tolerance)
        _without_places(target, opened)
        return merged.drift_from_trained, None
    model: Any = opened.model
    drift = 0.0
    if adapter is not None:
        adapted = at_full_precision(opened, chosen_base(config, options.into))
        drift = drift_from_trained(opened, adapted)
        model = adapted.unload()
        (folder / ADAPTERS).mkdir()
        write_adapter(opened.task, opened.weights, folder / ADAPTERS / adapter)
    with quiet():
        model.save_pretrained(target)
    opened.task.tokenizer.save_pretrained(target)
    _without_places(folder, opened)
    return drift, model if adapter is not None else None


def _without_places(folder: Path, opened: Opened) -> None:
    """Call the base what it is called elsewhere, too, in what transformers and PEFT have written down."""
    from trainer.export.language_card import base_name

    base = opened.task.pretrained
    if base is None or base.kind == "hub":
        return
    for file in [*folder.rglob("*config.json"), *folder.rglob("README.md")]:
        text = file.read_text(encoding="utf-8")
        for place in (base.source, base.name):
            text = text.replace(json.dumps(place)[1:-1], base_name(opened)).replace(place, base_name(opened))
        file.write_text(text, encoding="utf-8")


def _finish(
    opened: Opened,
    run: Run,
    config: RunConfig,
    folder: Path,
    options: LanguageOptions,
    adapter: str | None,
    count: int,
    drift: float,
    say: Callable[[str], None],
) -> LanguageExport:
    """Prove it with the engine that serves, measure, and write the manifest."""
    from serving.bundle import MANIFEST, finish
    from serving.errors import ServingError
    from trainer.export.language_card import card, metrics
    from trainer.export.language_measure import measure, proved

    dtype = _dtype(folder / MODEL)
    is_quantised = config.adapter is not None and config.adapter.name == "qlora"
    allowed = AFTER_QUANTISED if is_quantised else TOLERANCE[dtype]
    manifest = _content(opened, run, config, options, adapter, dtype, count, allowed)
    say("answering them again with the engine that serves")
    try:
        program, deviation = proved(finish(folder, manifest))
    except ServingError as error:
        raise TrainerError(f"the model that was written does not answer as the run's: {error}") from error
    measurements = measure(program, deviation, options.price)
    (folder / "measurements.json").write_text(json.dumps(measurements, indent=2) + "\n", encoding="utf-8")
    text = card(opened, run, config, adapter, metrics(opened, run), allowed, deviation, drift, measurements)
    (folder / "card.md").write_text(text, encoding="utf-8")
    (folder / MANIFEST).unlink()
    return LanguageExport(finish(folder, manifest), opened.checkpoint.path.name, drift, deviation, measurements)


def _dtype(model: Path) -> str:
    dtype = str(json.loads((model / "config.json").read_text(encoding="utf-8")).get("dtype") or "float32")
    if dtype not in TOLERANCE:
        raise UserError(f"weights of type {dtype} can't be exported; wanted is one of: {', '.join(TOLERANCE)}")
    return dtype


def _content(
    opened: Opened,
    run: Run,
    config: RunConfig,
    options: LanguageOptions,
    adapter: str | None,
    dtype: str,
    count: int,
    tolerance: float,
) -> dict[str, Any]:
    from trainer.export.draft import origin
    from trainer.export.language_card import metrics

    tokens = {"dtype": "int64", "shape": [-1, -1], "unit": "token", "description": "prompt and answer, as token ids"}
    base = opened.task.pretrained
    return {
        "name": options.name or config.name,
        "task": "language_modeling",
        "program": {"runtime": "transformers", "file": MODEL, "dtype": dtype, "max_batch": None},
        "preprocessing": {"kind": "chat" if opened.task.tokenizer.chat_template else "text"},
        "signature": {
            "inputs": [{"name": "prompt", **tokens}],
            "outputs": [{"name": "answer", **tokens}],
            "labels": None,
        },
        "postprocessing": {"kind": "text"},
        "golden": {"file": "golden.jsonl", "count": count, "tolerance": tolerance},
        "metrics": metrics(opened, run),
        "run": {
            **origin(run, opened.checkpoint.path.name),
            "base": None if base is None else {"fingerprint": base.fingerprint, "license": base.license},
        },
        "warmup_batches": [1, count],
        "adapters": {} if adapter is None else {adapter: f"{ADAPTERS}/{adapter}"},
    }
