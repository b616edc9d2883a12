"""The model card of a language model's bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.language_model import Opened
from trainer.merge import last_scores
from trainer.run import Run


def metrics(opened: Opened, run: Run) -> dict[str, float]:
    """The checkpoint's own, and the run's test metrics. Those that are no numbers are left out."""
    found = {**last_scores(run), **opened.checkpoint.manifest.metrics}
    return {name: float(value) for name, value in sorted(found.items()) if abs(float(value)) < float("inf")}


def card(
    opened: Opened,
    run: Run,
    config: RunConfig,
    adapter: str | None,
    scores: dict[str, float],
    tolerance: float,
    deviation: float,
    drift: float,
    measurements: dict[str, Any],
) -> str:
    """Markdown."""
    capacity = measurements["capacity"]
    rows = _origin(opened, run, config, adapter)
    quick = [
        f"| {row['rows']} | {row['tokens_per_second']:g} | {row['seconds_between_tokens'] * 1e3:.3g} |"
        for row in capacity["rows"]
    ]
    lines = [
        f"# {config.name}",
        "",
        "A language model, exported by `trainer export`.",
        "",
        "## Intended use",
        "",
        "To be written by those who know it: for whom, for what, and for what not.",
        "",
        *_table(("", ""), rows),
        "",
        "## Metrics",
        "",
        *[f"- {name}: {value:.6g}" for name, value in scores.items()],
        "",
        "## Does it answer as in training?",
        "",
        "`golden.jsonl` holds prompts with the greedy answers of the run's own model. A server answers them again "
        "before it says that it is ready: the same tokens, log-probabilities within "
        f"{tolerance:g} × max(1, |log-probability|). At export they deviated by {deviation:.3g}; a logit of the "
        f"model as it was trained by up to {drift:.3g}.",
        "",
        "## Speed",
        "",
        "| answers at once | tokens/s | ms between two tokens |",
        "| --- | --- | --- |",
        *quick,
        "",
        f"Measured on {capacity['machine']}: the engine alone, without HTTP. HPA target: "
        f"{capacity['hpa_target_in_flight']} requests in flight per replica ({capacity['how']}).",
    ]
    if "usd_per_million_tokens" in capacity:
        lines += [
            "",
            f"At {capacity['price_usd_per_hour']:g} USD an hour a million tokens cost "
            f"{capacity['usd_per_million_tokens']:g} USD at full use.",
        ]
    return "\n".join(lines) + "\n"


def _origin(opened: Opened, run: Run, config: RunConfig, adapter: str | None) -> list[tuple[str, str]]:
    base = opened.task.pretrained
    model = "the base alone; `adapters/` holds what was trained" if adapter else "the model as it was trained"
    model = "the base with the adapter merged into it" if config.adapter is not None and adapter is None else model
    rows = [
        ("run, checkpoint", f"`{run.id}`, `{opened.checkpoint.path.name}`"),
        ("lineage", f"`{json.dumps(run.record['lineage'])}`"),
        ("fingerprint of the data", f"`{opened.task.data.fingerprint}`"),
        ("`model/`", model),
        ("adapter", f"`{adapter}`: ask for it as `NAME:{adapter}`" if adapter else "none beside it"),
    ]
    if base is not None:
        rows += [
            ("base", f"`{base_name(opened)}`"),
            ("fingerprint of the base", f"`{base.fingerprint}`"),
            ("licence of the base", base.license or "not stated by the base"),
        ]
    return rows


def base_name(opened: Opened) -> str:
    """What the base is called where the bundle goes: a path of this machine says nothing there."""
    base = opened.task.pretrained
    assert base is not None
    return base.name if base.kind == "hub" else Path(base.name).name


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *[f"| {left} | {right} |" for left, right in rows]]
