"""`report.html`: one search on one page that needs no network: what was searched, the best, plots, all trials."""

from __future__ import annotations

import html
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.files import write_atomically
from trainer.mirror_log import redacted, secrets_in
from trainer.progress import duration
from trainer.search.importance import Importances, importances
from trainer.search.past_study import past_study
from trainer.search.report_plots import Plot, plots
from trainer.search.report_style import SCRIPT, STYLE
from trainer.search.results import read_entries
from trainer.search.trial import Trial

if TYPE_CHECKING:
    from trainer.search.space import Space

REPORT_FILE = "report.html"
TEXT_LENGTH = 400
"""Characters of an error or a value that are shown."""


@dataclass(frozen=True)
class Heading:
    """What stands above the plots."""

    name: str
    """Of the config."""
    objective: Mapping[str, str]
    sampler: str = ""
    scheduler: str = ""
    status: str = ""
    elapsed: float | None = None
    """Wall seconds of the search."""
    best: Sequence[int] = field(default=())
    """Numbers of the best trials, best first (several objectives: the Pareto front)."""


def write_report(folder: Path, heading: Heading, trials: Sequence[Trial], space: Space) -> Path:
    """Write `report.html` of a search from its trials, in any state; it is replaced as a whole."""
    ended = {entry["number"]: float(entry["ended"]) for entry in read_entries(folder) if "ended" in entry}
    times = {
        trial.number: (ended[trial.number] - trial.seconds.get("slot", 0.0), ended[trial.number])
        for trial in trials
        if trial.number in ended
    }
    found = {
        metric: importances(trials, space, heading.objective, number) for number, metric in enumerate(heading.objective)
    }
    secrets = secrets_in(os.environ)  # which an error may have printed
    trials = [replace(trial, error=redacted(trial.error, secrets)) if trial.error else trial for trial in trials]
    path = folder / REPORT_FILE
    write_atomically(path, page(heading, trials, space, found, times).encode())
    return path


def page(
    heading: Heading,
    trials: Sequence[Trial],
    space: Space,
    found: Mapping[str, Importances],
    times: Mapping[int, tuple[float, float]],
) -> str:
    """The whole page as HTML."""
    from plotly.offline import get_plotlyjs

    known = [trial for trial in trials if trial.has_ended]
    study = past_study(known, space, heading.objective, times)
    drawn = plots(study, known, space, heading.objective, found)
    title = _text(f"{heading.name}: search")
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'; img-src data: blob:\">",
            f"<style>{STYLE}</style></head><body><main>",
            _head(heading, trials),
            _best(heading, trials),
            *_sections(drawn),
            _errors(trials),
            _table(heading, trials, space),
            f"</main><script>{get_plotlyjs()}</script>",
            *(_data(number, plot) for number, plot in enumerate(drawn) if plot.figure is not None),
            f"<script>{SCRIPT}</script></body></html>",
        ]
    )


def _head(heading: Heading, trials: Sequence[Trial]) -> str:
    counts = Counter(trial.state for trial in trials if trial.number >= 0)
    known = sum(trial.number < 0 for trial in trials)
    seconds = {kind: sum(trial.seconds.get(kind, 0.0) for trial in trials) for kind in ("slot", "train", "evaluate")}
    facts = [
        ("objective", ", ".join(f"{metric} ({mode})" for metric, mode in heading.objective.items())),
        ("trials", ", ".join(f"{count} {state}" for state, count in counts.items()) or "none yet"),
        ("known before", str(known) if known else ""),
        ("sampler", heading.sampler),
        ("scheduler", heading.scheduler),
        ("status", heading.status),
        ("wall time", duration(heading.elapsed) if heading.elapsed is not None else ""),
        ("trial time", duration(seconds["slot"]) if seconds["slot"] else ""),
        ("of it training, evaluation", f"{duration(seconds['train'])}, {duration(seconds['evaluate'])}"),
    ]
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts if value)
    return f"<header><h1>{_text(heading.name)}</h1><dl>{cells}</dl></header>"


def _best(heading: Heading, trials: Sequence[Trial]) -> str:
    by_number = {trial.number: trial for trial in trials}
    best = [by_number[number] for number in heading.best if number in by_number]
    if not best:
        return '<section><h2>Best</h2><p class="none">no trial has finished yet</p></section>'
    first = best[0]
    values = ", ".join(_value(heading, first, number) for number in range(len(heading.objective)))
    rows = "".join(
        f"<tr><th>{_key(key)}</th><td>{_text(shown(value))}</td></tr>" for key, value in first.params.items()
    )
    more = ""
    if len(heading.objective) > 1:
        front = ", ".join(str(trial.number) for trial in best)
        more = f"<p>Pareto front: trials {_text(front)}</p>"
    return (
        f"<section><h2>Best</h2><p>Trial {first.number}: {_text(values)}</p>{more}"
        f'<table class="params">{rows}</table></section>'
    )


def _value(heading: Heading, trial: Trial, number: int) -> str:
    metric = list(heading.objective)[number]
    values = trial.values or ()
    return f"{metric} {values[number]:.6g}" if len(values) > number else f"{metric} -"


def _sections(drawn: Sequence[Plot]) -> list[str]:
    parts: list[str] = []
    narrow: list[str] = []
    for number, plot in enumerate(drawn):
        text = f"<h2>{_text(plot.title)}</h2>"
        if plot.figure is None:
            text += f'<p class="none">{_text(plot.reason)}</p>'
        else:
            height = plot.figure.layout.height or 380
            text += f'<div class="plot" id="plot-{number}" style="height:{height:.0f}px"></div>'
        text += f'<p class="caption">{_text(plot.caption)}</p>' if plot.caption else ""
        (parts if plot.is_wide else narrow).append(f"<section>{text}</section>")
    at = max(len(parts) - 1, 0)  # before the timeline
    grid = [f'<div class="grid">{"".join(narrow)}</div>'] if narrow else []
    return [*parts[:at], *grid, *parts[at:]]


def _data(number: int, plot: Plot) -> str:
    """The figure as JSON; `<` is escaped, so that nothing in it can end the script."""
    assert plot.figure is not None
    content = str(plot.figure.to_json()).replace("<", "\\u003c")
    return f'<script type="application/json" data-plot="plot-{number}">{content}</script>'


def _errors(trials: Sequence[Trial]) -> str:
    groups = grouped_errors(trials)
    if not groups:
        return ""
    rows = "".join(
        f"<tr><td>{len(numbers)}</td><td>{_text(error)}</td><td>{_text(', '.join(map(str, numbers)))}</td></tr>"
        for error, numbers in groups
    )
    head = "<tr><th>trials</th><th>error</th><th>numbers</th></tr>"
    return f"<section><h2>Failed</h2><table>{head}{rows}</table></section>"


def grouped_errors(trials: Sequence[Trial]) -> list[tuple[str, list[int]]]:
    """The errors of failed trials, one line each, with their numbers; the most frequent first."""
    groups: dict[str, list[int]] = {}
    for trial in trials:
        if trial.state == "failed":
            groups.setdefault(one_line(trial.error or "no error was told"), []).append(trial.number)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def one_line(text: str) -> str:
    """A text on one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= TEXT_LENGTH else f"{line[:TEXT_LENGTH]} ..."


def _table(heading: Heading, trials: Sequence[Trial], space: Space) -> str:
    keys = [parameter.key for parameter in space]
    best = set(heading.best)
    names = ["trial", "state", *heading.objective, "evaluations", "step", *keys, "seconds", "error"]
    head = "".join(f"<th>{_key(name)}</th>" for name in names)
    rows = []
    for trial in sorted(trials, key=lambda trial: trial.number):
        values = trial.values or ()
        cells: list[Any] = [trial.number, trial.state + (f" ({trial.origin})" if trial.origin else "")]
        cells += [values[number] if len(values) > number else None for number in range(len(heading.objective))]
        cells += [len(trial.reports), trial.reports[-1].step if trial.reports else None]
        cells += [trial.params.get(key) for key in keys]
        cells += [trial.seconds.get("slot"), one_line(trial.error) if trial.error else None]
        mark = ' class="best"' if trial.number in best else ""
        rows.append(f"<tr{mark}>{''.join(map(_cell, cells))}</tr>")
    return (
        '<section><h2>All trials</h2><p class="caption">Click on a heading to sort.</p><div class="scroll">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"<td{' class=number' if is_number else ''}>{_text(shown(value))}</td>"


def shown(value: Any) -> str:
    """A value for a reader: numbers to six digits, lists and mappings as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]} ..."


def _text(value: str) -> str:
    return html.escape(value)


def _key(key: str) -> str:
    """A dotted key that may be broken after its dots."""
    return html.escape(key).replace(".", ".<wbr>")
