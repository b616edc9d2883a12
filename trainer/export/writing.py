"""All of an export: open, prove, measure, choose, write."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from serving.bundle import Bundle, finish
from serving.inputs import Sample
from serving.predictor import Predictor, read_golden
from trainer.config import RunConfig
from trainer.errors import TrainerError, UserError
from trainer.export import golden, measure, reference
from trainer.export.card import card
from trainer.export.draft import content, draft
from trainer.export.folder import published, require_free
from trainer.export.making import make
from trainer.export.opened import Opened, opened
from trainer.export.programs import Program
from trainer.export.proof import prove
from trainer.export.reference import Reference
from trainer.export.survey import Agreement, survey, worst_if_nan
from trainer.export.table import RULE, Row, plain, quickest
from trainer.export.tolerance import tolerance
from trainer.export.wanted import Wanted
from trainer.run import Run

Say = Callable[[str], None]
MEASUREMENTS = "measurements.json"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    bundle: Bundle
    rows: list[Row]
    chosen: Row
    capacity: dict[str, Any]


def export(run: Run, config: RunConfig, wanted: Wanted, say: Say) -> Exported:
    """Write the bundle of a checkpoint.

    Raises UserError for what can't be exported, TrainerError where no program answers as the run does; nothing is left
    behind then.
    """
    require_free(wanted.output, wanted.force)
    if wanted.format == "safetensors":
        raise UserError(
            "--format safetensors: is the folder of a language model, which transformers knows how to run; nothing "
            "would know that of this run's model: use pt2, onnx or aoti"
        )
    with opened(run, config, wanted.checkpoint, say) as source, published(wanted.output, wanted.force) as folder:
        indices = golden.choose(source, wanted.golden)
        golden.require_exact_preprocessing(source, indices)
        count = golden.write(source, indices, folder)
        result = _write(source, wanted, indices, count, folder, say)
        prove(folder)
    return replace(result, folder=wanted.output, bundle=Bundle.read(wanted.output))


def _write(source: Opened, wanted: Wanted, indices: list[int], count: int, folder: Path, say: Say) -> Exported:
    workshop = folder / ".programs"
    workshop.mkdir()
    made = make(source, wanted, indices, workshop, say)
    drafts = {p.name: draft(source, folder, wanted.name, p, count, 0.0) for p in made.programs}
    for program in made.programs:
        shutil.move(program.path, folder / program.path.name)
    workshop.rmdir()
    threads = measure.cpus()
    predictors = {name: Predictor.open(drafted, threads) for name, drafted in drafts.items()}
    say(f"comparing {', '.join(predictors)} with the run's own evaluation of {source.split}")
    measured = source.servable.measure
    agreements = {
        name: Agreement(predictor, source.task.metrics(torch.device("cpu")), measured)
        for name, predictor in predictors.items()
    }
    statistics = _reference(source)
    evaluated, seen = survey(source, [*agreements.values(), statistics], wanted.samples)
    _dump(folder / reference.FILE, statistics.plain(source.split))
    rows = _rows(source, made.programs, predictors, agreements)
    rows += [Row(name, missing=reason) for name, reason in made.missing.items()]
    chosen = quickest(rows)
    if chosen is None:
        raise TrainerError(_none_is_good(rows))
    bundle = replace(drafts[chosen.name], golden=replace(drafts[chosen.name].golden, tolerance=chosen.tolerance))
    for name, drafted in drafts.items():
        if name != chosen.name:
            drafted.file(drafted.program.file).unlink()
    say("measuring capacity")
    serving = predictors[chosen.name]
    capacity = measure.capacity(serving, _samples(serving), wanted.p95_ms, wanted.price)
    metrics = _metrics(source, evaluated)
    _dump(folder / MEASUREMENTS, {"rule": RULE, "formats": plain(rows, chosen.name), "capacity": capacity})
    text = card(bundle, source, metrics, rows, chosen, capacity, seen)
    (folder / "card.md").write_text(text, encoding="utf-8")
    return Exported(folder, finish(folder, content(bundle, metrics)), rows, chosen, capacity)


def _rows(
    source: Opened,
    programs: Sequence[Program],
    predictors: dict[str, Predictor],
    agreements: dict[str, Agreement],
) -> list[Row]:
    replays = {name: predictor.replay() for name, predictor in predictors.items()}
    first = next(iter(predictors.values()))
    samples = [first.input.prepare(sample) for sample in _samples(first)]
    runs = {name: predictor.run_batch for name, predictor in predictors.items()}
    latency = {str(size): measure.latencies(runs, samples, size) for size in measure.BATCHES}
    rows = []
    for program in programs:
        name, agreement = program.name, agreements[program.name]
        replayed = worst_if_nan(replays[name].deviation)
        allowed = tolerance(source.config.train.precision, program.dtype, max(agreement.deviation, replayed))
        file = predictors[name].bundle.file(program.path.name)
        rows.append(
            Row(
                name,
                program.dtype,
                {size: found[name] for size, found in latency.items()},
                file.stat().st_size,
                agreement.deviation,
                replayed,
                allowed,
                agreement.samples,
                agreement.other_labels(),
                agreement.wrong_labels(allowed),
                {f"{source.split}/{key}": value for key, value in agreement.metrics().items()},
            )
        )
    return rows


def _reference(source: Opened) -> Reference:
    servable = source.servable
    is_picture = servable.preprocessing["kind"] == "picture"
    channels = servable.preprocessing["channels"] if is_picture else None
    return Reference(servable.signature, channels, servable.postprocessing["kind"] == "classification")


def _samples(predictor: Predictor) -> list[Sample]:
    requests, _ = read_golden(predictor.bundle)
    return [predictor.parse(request, f"golden[{number}]") for number, request in enumerate(requests)]


def _metrics(source: Opened, evaluated: dict[str, float]) -> dict[str, float]:
    """The split's as just evaluated, the checkpoint's, and the last test's where the run had one."""
    tested: dict[str, float] = {}
    for entry in source.run.read_metrics():
        tested |= {key: value for key, value in entry.items() if key.startswith("test/")}
    fresh = {f"{source.split}/{key}": value for key, value in evaluated.items()}
    found = {**tested, **source.checkpoint.manifest.metrics, **fresh}
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def _none_is_good(rows: Sequence[Row]) -> str:
    told = "; ".join(
        f"{row.name}: {row.missing}"
        if row.missing
        else f"{row.name} deviates by {max(row.deviation, row.golden_deviation):.3g} (tolerance {row.tolerance:g}), "
        f"{row.wrong_labels} wrong labels"
        for row in rows
    )
    return f"no program answers as the run's own evaluation does, so nothing was written: {told}"


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
