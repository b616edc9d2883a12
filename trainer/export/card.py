"""The model card of a bundle: what it is, where it comes from, how good and how quick it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.bundle import Bundle
from serving.signature import Field
from trainer.export.opened import Opened
from trainer.export.table import HEAD, RULE, Row, cells

_MANY_LABELS = 50


def card(
    made: Bundle,
    opened: Opened,
    metrics: dict[str, float],
    rows: Sequence[Row],
    chosen: Row,
    capacity: dict[str, Any],
    seen: int,
) -> str:
    """Markdown."""
    parts = [
        [f"# {made.name}", "", f"{made.task}, exported by `trainer export` from run `{made.run['id']}`."],
        ["## Intended use", "", "To be written by those who know it: for whom, for what, and for what not."],
        _signature(made),
        ["## Metrics", "", *_table(("metric", "value"), [(k, f"{v:.6g}") for k, v in sorted(metrics.items())])],
        _exactness(made, opened, seen),
        ["## Formats", "", *_table(HEAD, cells(rows, chosen.name)), "", f"Chosen: {RULE}."],
        _quantised(rows),
        _capacity(capacity),
        _origin(made, opened),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _signature(made: Bundle) -> list[str]:
    labels = made.signature.labels
    fields = [("in", field) for field in made.signature.inputs] + [("out", field) for field in made.signature.outputs]
    rows = [(way, f.name, f.dtype, _shape(f), f.unit, f.description) for way, f in fields]
    found = ["## Signature", "", *_table(("", "name", "type", "shape", "unit", ""), rows)]
    if labels is not None:
        more = f" and {len(labels) - _MANY_LABELS} more" if len(labels) > _MANY_LABELS else ""
        found += ["", f"Labels ({len(labels)}): {', '.join(labels[:_MANY_LABELS])}{more}."]
    return found


def _exactness(made: Bundle, opened: Opened, seen: int) -> list[str]:
    golden, precision = made.golden, opened.config.train.precision
    return [
        "## Does it answer as in training?",
        "",
        f"`{golden.file}` holds {golden.count} requests of the split `{opened.split}` with the answers of the run's "
        f"own evaluation (precision `{precision}`). A server replays them before it says that it is ready; each output "
        f"may deviate by {golden.tolerance:g} × max(1, |answer|). At export, {seen} of {len(opened.dataset)} samples "
        "of the split were compared so.",
    ]


def _quantised(rows: Sequence[Row]) -> list[str]:
    names = sorted({name for row in rows for name in row.metrics})
    measured = [row for row in rows if row.metrics]
    if len({row.dtype for row in measured}) < 2:
        return []
    table = _table(("metric", *(row.name for row in measured)), [
        (name, *(f"{row.metrics.get(name, float('nan')):.6g}" for row in measured)) for name in names
    ])  # fmt: skip
    return ["## Metrics by type of the weights", "", *table]


def _capacity(found: dict[str, Any]) -> list[str]:
    rows = [(str(r["batch"]), f"{r['requests_per_second']:,.0f}", f"{r['p95_ms']:.3g}") for r in found["batches"]]
    told = (
        f"At batch {found['batch']}: {found['requests_per_second']:,.0f} requests/s. HPA target: "
        f"{found['hpa_target_in_flight']} requests in flight per replica for a p95 of {found['p95_bound_ms']:g} ms "
        f"({found['how']})."
    )
    if not found["is_within_bound"]:
        told += f" **Even a batch of one may take longer than {found['p95_bound_ms']:g} ms here.**"
    if "usd_per_thousand" in found:
        told += (
            f" At {found['price_usd_per_hour']:g} USD an hour a thousand predictions cost "
            f"{found['usd_per_thousand']:g} USD at full use, {found['usd_per_thousand_at_target']:g} at the target."
        )
    machine = f"Measured on {found['machine']}: the program alone, without HTTP."
    return ["## Capacity", "", *_table(("batch", "requests/s", "p95, ms"), rows), "", told, "", machine]


def _origin(made: Bundle, opened: Opened) -> list[str]:
    run, base = made.run, opened.task.pretrained
    weights = opened.config.model.options.get("weights") if isinstance(opened.config.model.options, dict) else None
    rows = [
        ("run, checkpoint", f"`{run['id']}`, `{run['checkpoint']}`"),
        ("lineage", f"`{run['lineage']}`"),
        ("config, code, data", f"`{run['config_hash']}`, `{run['code_hash']}`, `{run['data_hash']}`"),
        ("model", f"`{opened.config.model.name}`"),
        ("data", f"`{opened.config.data.name}`, fingerprint `{opened.task.data.fingerprint}`"),
        ("seed", str(opened.config.seed)),
    ]
    if run["mlflow_run_id"]:
        rows.append(("MLflow run", f"`{run['mlflow_run_id']}`"))
    if base is not None:
        rows.append(("pretrained weights", f"`{base.name}`, licence: {base.license or 'not stated'}"))
    elif weights:
        rows.append(("pretrained weights", "a local file, whose licence is not known to the run: look it up"))
    return ["## Where it comes from", "", *_table(("", ""), rows)]


def _shape(field: Field) -> str:
    return ", ".join("batch" if i == 0 else "any" if s == -1 else str(s) for i, s in enumerate(field.shape))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
