"""The plots of a search's report: Optuna's own, made readable, with a reason in the place of one that can't be made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer.search.importance import Importances
from trainer.search.past_study import past_study
from trainer.search.trial import FAILED, FINISHED, PRUNED, Trial

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go

    from trainer.search.space import Space

COLORS = {"COMPLETE": "#3b82c4", "PRUNED": "#e0912f", "FAIL": "#cc4b4b"}
SCALE: list[tuple[float, str]] = [(0, "#a3b1c2"), (1, "#d9480f")]
"""From worse to better, or from early to late: seen on light and on dark."""
PARALLEL_AT_MOST = 200
LINES_AT_MOST = 30
"""Learning curves that each have a name in the legend; more are drawn as one line a state."""


@dataclass(frozen=True)
class Plot:
    """One plot, or why there is none."""

    title: str
    figure: go.Figure | None = None
    reason: str = ""
    caption: str = ""
    is_wide: bool = True
    """Whether it takes a line of its own."""


def plots(
    study: optuna.Study, trials: Sequence[Trial], space: Space, objective: Mapping[str, str],
    found: Mapping[str, Importances],
) -> list[Plot]:  # fmt: skip
    """All plots of a search, in the order of the page."""
    num_finished = sum(trial.state == FINISHED for trial in trials)
    keys = [parameter.key for parameter in space if any(parameter.key in trial.params for trial in trials)]
    metrics = list(objective)
    made: list[Plot] = []
    for number, metric in enumerate(metrics):
        made.append(_plot(f"History of {metric}", partial(_history, study, metric, number), num_finished, 1))
        made.append(_importances(metric, found[metric], len(metrics) > 1))
    if len(metrics) > 1:
        made.append(_plot("Pareto front", partial(_pareto, study, metrics), num_finished, 1))
    made += [_curves(trials, space, metric, number, objective) for number, metric in enumerate(metrics)]
    made += [_parallels(trials, space, keys, objective, number) for number in range(len(metrics))]
    for number, metric in enumerate(metrics):
        made += [
            _plot(f"{metric} over {key}", partial(_slice, study, key, metric, number), num_finished, 2, is_wide=False)
            for key in keys
        ]
    made.append(_timeline(study, trials))
    return made


def _target(number: int) -> Callable[[Any], float]:
    return lambda trial: float(trial.values[number])


def _plot(title: str, build: Callable[[], go.Figure], finished: int, needs: int, **options: Any) -> Plot:
    if finished < needs:
        few = "no trial has finished yet" if needs == 1 else f"needs at least {needs} finished trials"
        return Plot(title, reason=few, **options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental plots
            figure = build()
    except (ValueError, RuntimeError, KeyError, TypeError, ZeroDivisionError, IndexError) as error:
        return Plot(
            title,
            reason=f"Optuna can't draw it: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            **options,
        )
    if not figure.data:
        return Plot(title, reason="nothing to draw", **options)
    return Plot(title, _styled(figure), **options)


def _styled(figure: go.Figure) -> go.Figure:
    """One look for all; the page sets the colours of text and grid."""
    figure.update_layout(
        title=None,
        template="none",
        margin={"l": 70, "r": 30, "t": 30, "b": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def _history(study: optuna.Study, metric: str, number: int) -> go.Figure:
    from optuna import visualization

    target = _target(number) if len(study.directions) > 1 else None
    figure = visualization.plot_optimization_history(study, target=target, target_name=metric)
    for trace, color in zip(figure.data, (COLORS["COMPLETE"], COLORS["PRUNED"]), strict=False):
        trace.marker.color = color
        trace.line.color = color
    return figure


def _importances(metric: str, found: Importances, is_named: bool) -> Plot:
    import plotly.graph_objects as go

    title = f"Importances for {metric}" if is_named else "Importances"
    caption = "; ".join(f"{key} is left out: {why}" for key, why in found.left_out.items())
    if not found.values:
        return Plot(title, reason=found.reason or "nothing to draw", caption=caption)
    items = list(found.values.items())[::-1]
    bars = go.Bar(
        x=[share for _, share in items],
        y=[key for key, _ in items],
        orientation="h",
        text=[f"{share:.2f}" if share >= 0.01 else "<0.01" for _, share in items],
        textposition="outside",
        cliponaxis=False,
        marker={"color": COLORS["COMPLETE"]},
    )
    figure = go.Figure(bars, {"xaxis": {"title": "share of the variance (fANOVA)", "range": [0, 1.08]}})
    figure.update_layout(height=120 + 28 * len(items))
    return Plot(title, _styled(figure), caption=caption)


def _pareto(study: optuna.Study, metrics: list[str]) -> go.Figure:
    from optuna import visualization

    figure = visualization.plot_pareto_front(study, target_names=metrics)
    for trace, color in zip(figure.data[::-1], (SCALE[1][1], COLORS["COMPLETE"]), strict=False):
        trace.marker = {"color": color, "size": 8}
        trace.update(name="Pareto front" if trace is figure.data[-1] else "finished", showlegend=True)
    return figure


def _curves(trials: Sequence[Trial], space: Space, metric: str, number: int, objective: Mapping[str, str]) -> Plot:
    from optuna import visualization

    title = "Learning curves" if len(objective) == 1 else f"Learning curves of {metric}"
    if not any(metric in report.metrics for trial in trials for report in trial.reports):
        return Plot(title, reason="no trial has told an evaluation yet")
    of_one = [replace(trial, values=(trial.values or ())[number : number + 1] or None) for trial in trials]

    def build() -> go.Figure:
        study = past_study(of_one, space, {metric: objective[metric]})
        figure = visualization.plot_intermediate_values(study)
        _color_curves(study, figure)
        figure.update_layout(xaxis_title="evaluation", yaxis_title=metric)
        return figure

    return _plot(title, build, 0, 0, caption="One line a trial, as far as it was trained.")


def _color_curves(study: optuna.Study, figure: go.Figure) -> None:
    """By state; many lines become one trace a state, with gaps between them: a thousand traces take seconds to draw."""
    import plotly.graph_objects as go

    states = {str(trial.number): trial.state.name for trial in study.get_trials(deepcopy=False)}
    named = [(trace.name.removeprefix("Trial"), trace) for trace in figure.data]
    if len(named) <= LINES_AT_MOST:
        for number, trace in named:
            trace.name = f"{number} {NAMES[states[number]]}" if states[number] != "COMPLETE" else number
            trace.update(line={"width": 1.5, "dash": "dot" if states[number] == "PRUNED" else "solid"})
            trace.marker.size = 4
        return
    merged = []
    for state, color in COLORS.items():
        xs, ys, texts = [], [], []
        for number, trace in named:
            if states[number] == state:
                xs += [*trace.x, None]
                ys += [*trace.y, None]
                texts += [number] * (len(trace.x) + 1)
        if xs:
            merged.append(
                go.Scatter(
                    x=xs, y=ys, text=texts, mode="lines+markers", name=NAMES[state], opacity=0.55,
                    line={"width": 1, "color": color}, marker={"size": 3, "color": color},
                    hovertemplate="trial %{text}: %{y:.5g} at %{x}<extra></extra>",
                )
            )  # fmt: skip
    figure.data = []
    figure.add_traces(merged)


NAMES = {"COMPLETE": FINISHED, "PRUNED": PRUNED, "FAIL": FAILED}


def _parallels(
    trials: Sequence[Trial], space: Space, keys: Sequence[str], objective: Mapping[str, str], number: int
) -> Plot:
    """The best finished trials, over the parameters that all of them have."""
    from optuna import visualization

    metric, mode = list(objective.items())[number]
    title = "Parallel coordinates" if len(objective) == 1 else f"Parallel coordinates, {metric}"
    finished = [trial for trial in trials if trial.state == FINISHED and len(trial.values or ()) == len(objective)]
    sign = 1 if mode == "max" else -1
    finished.sort(key=lambda trial: -sign * (trial.values or (0,))[number])
    shown = finished[:PARALLEL_AT_MOST]
    whole = [key for key in keys if all(key in trial.params for trial in shown)]
    missing = ", ".join(key for key in keys if key not in whole)
    caption = f"The {len(shown)} best of {len(finished)} finished trials." if len(shown) < len(finished) else ""
    caption += f" Without {missing}, which not every finished trial has." if missing else ""

    def build() -> go.Figure:
        study = past_study(shown, space, objective)
        target = _target(number)
        figure = visualization.plot_parallel_coordinate(study, params=whole, target=target, target_name=metric)
        return _parallel(figure, mode)

    return _plot(title, build, len(finished), 2, caption=caption.strip())


def _parallel(figure: go.Figure, mode: str) -> go.Figure:
    """Optuna's lines, best ones on top, in colours that can be seen on light and dark."""
    first = str(figure.layout.xaxis.ticktext[0])
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    for trace in lines:
        share = trace.y[0] if mode == "max" else 1 - trace.y[0]
        trace.update(line={"color": _between(share), "width": 1 + share}, opacity=0.35 + 0.6 * share)
    bars = [trace for trace in figure.data if trace.mode != "lines"]
    for trace in bars:
        trace.marker.update(colorscale=SCALE, reversescale=mode == "min")
        trace.marker.colorbar.update(title={"text": first}, thickness=10)
    figure.data = []
    figure.add_traces([*sorted(lines, key=lambda trace: trace.line.width), *bars])
    figure.layout.xaxis.ticktext = [str(text).replace(".", ".<br>") for text in figure.layout.xaxis.ticktext]
    for text in figure.layout.annotations:
        text.font = {"size": 11}
    figure.update_layout(height=460)
    return figure


def _between(share: float) -> str:
    """The colour at `share` of `SCALE`."""
    ends = [[int(color[at : at + 2], 16) for at in (1, 3, 5)] for _, color in SCALE]
    return "#" + "".join(
        f"{round(low + (high - low) * min(max(share, 0), 1)):02x}" for low, high in zip(*ends, strict=True)
    )


def _slice(study: optuna.Study, key: str, metric: str, number: int) -> go.Figure:
    from optuna import visualization

    figure = visualization.plot_slice(study, params=[key], target=_target(number), target_name=metric)
    figure.update_traces(marker={"size": 7, "line": {"width": 0.5, "color": "#8888"}})
    figure.update_layout(width=None, height=300, showlegend=False, xaxis_title=None)
    if figure.layout.xaxis.type == "log":
        values = [value for trace in figure.data for value in trace.x if value]
        is_long = bool(values) and max(values) / min(values) > 12
        figure.update_xaxes(dtick=1 if is_long else "D2", tickformat="~g")
    for trace in figure.data:
        trace.marker.update(colorscale=SCALE, colorbar={"title": {"text": "trial"}, "thickness": 8, "x": 1.02})
    return figure


def _timeline(study: optuna.Study, trials: Sequence[Trial]) -> Plot:
    from optuna import visualization

    title, ended = "Timeline", [trial for trial in trials if trial.number >= 0]
    if not ended or all(item.datetime_start == item.datetime_complete for item in study.get_trials(deepcopy=False)):
        return Plot(title, reason="no trial has ended yet")

    def build() -> go.Figure:
        figure = visualization.plot_timeline(study)
        for trace in figure.data:
            color = COLORS.get(str(trace.name))
            if color:
                trace.update(marker={"color": color}, name=NAMES[str(trace.name)])
        figure.update_layout(yaxis_title="trial", xaxis_title="time (UTC)", height=min(160 + 14 * len(ended), 700))
        return figure

    return _plot(title, build, 1, 1, caption="A bar ends with its trial and is as long as the trial held a slot.")
