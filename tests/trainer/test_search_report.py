"""The report of a search: one page that needs nothing else, whatever the search was."""

from __future__ import annotations

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from searches import OBJECTIVE, space, trial, trials

from trainer.progress import duration
from trainer.search.parameter import Parameter
from trainer.search.past_study import POINTS_AT_MOST, curve, past_study
from trainer.search.report_page import Heading, grouped_errors, shown, write_report
from trainer.search.results import Results
from trainer.search.space import Space
from trainer.search.trial import FAILED, FINISHED, PRUNED, RUNNING, Report, Trial


class Page(HTMLParser):
    """What a browser sees: sections with their heading and text, tables, figures, elements that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: dict[str, str] = {}
        self.figures: list[dict[str, Any]] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._heading = ""
        self._is_figure = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.loads += [str(given[name]) for name in ("src", "href") if name in given]
        self._is_figure = "data-plot" in given
        if tag not in ("meta", "wbr", "link"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            if self._is_figure:
                self.figures.append(json.loads(data))
        elif inside == "h2":
            self._heading = data
            self.sections[data] = ""
        elif inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif inside != "style":
            self.sections[self._heading] = self.sections.get(self._heading, "") + data

    def close_is_clean(self) -> bool:
        return not self._open


def report(
    folder: Path,
    given: list[Trial],
    of: Space | None = None,
    objective: dict[str, str] | None = None,
    name: str = "digits",
) -> Page:
    objective = objective or OBJECTIVE
    Results(folder, given)
    best = sorted((one for one in given if one.state == FINISHED), key=lambda one: -(one.values or (0,))[0])
    heading = Heading(name, objective, "tpe", "asha", "finished", 100.0, [one.number for one in best[:1]])
    path = write_report(folder, heading, given, of or space())
    page = Page(path.read_text())
    assert page.close_is_clean()
    return page


def test_one_page_with_all_plots_and_all_trials(tmp_path: Path) -> None:
    given = [*trials(40), trial(-1, origin="runs/before/x"), trial(40, RUNNING, 1)]
    page = report(tmp_path, given)
    keys = [parameter.key for parameter in space()]
    assert list(page.sections)[1:] == [
        *("Best", "History of val/accuracy", "Importances", "Learning curves", "Parallel coordinates"),
        *(f"val/accuracy over {key}" for key in keys),
        *("Timeline", "Failed", "All trials"),
    ]
    assert len(page.figures) == 5 + len(keys), "each of them is drawn"
    assert page.loads == [], "no network"
    assert "optimizer.momentum is left out" in page.sections["Importances"]
    table = page.rows[-len(given) - 1 :]
    assert table[0] == ["trial", "state", "val/accuracy", "evaluations", "step", *keys, "seconds", "error"]
    assert [row[0] for row in table[1:]] == ["-1", *map(str, range(41))]
    assert table[1][1] == "finished (runs/before/x)" and table[-1][1] == "running"
    failed = table[5]
    assert failed[1] == FAILED and failed[2] == "" and failed[-1] == "RuntimeError: it broke"
    best = max(given, key=lambda one: (one.state == FINISHED, (one.values or (0,))[0]))
    assert f"Trial {best.number}: val/accuracy {(best.values or (0,))[0]:.6g}" in page.sections["Best"]


def test_plots_carry_the_numbers_of_the_trials(tmp_path: Path) -> None:
    given = [trial(-2), trial(3), trial(9), trial(12, PRUNED, 2)]
    study = past_study(given, space(), OBJECTIVE)
    assert [(one.number, one.state.name) for one in study.trials] == [
        (-2, "COMPLETE"),
        (3, "COMPLETE"),
        (9, "COMPLETE"),
        (12, "PRUNED"),
    ]
    page = report(tmp_path, given)
    names = {
        trace["name"] for figure in page.figures for trace in figure["data"] if trace.get("mode") == "lines+markers"
    }
    assert {"-2", "3", "9", "12 pruned"} <= names


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_trials_say_so_in_the_place_of_a_plot(tmp_path: Path, count: int) -> None:
    page = report(tmp_path, [trial(number) for number in range(count)])
    few = f"needs at least 4 finished trials, there are {count}"
    assert few in page.sections["Importances"]
    if count == 0:
        assert page.figures == [] and "no trial has finished yet" in page.sections["History of val/accuracy"]
        assert "no trial has finished yet" in page.sections["Best"]
        assert "no trial has told an evaluation yet" in page.sections["Learning curves"]
        assert "no trial has ended yet" in page.sections["Timeline"]
    if count == 1:
        assert "needs at least 2 finished trials" in page.sections["Parallel coordinates"]
        assert len(page.figures) == 3, "history, curve, timeline"


def test_only_failures_and_odd_values_make_a_page(tmp_path: Path) -> None:
    odd = Report(1, 10, 1.0, {"val/accuracy": math.nan, "val/loss": math.inf}, 1.0)
    given = [
        trial(0, FAILED, 0),
        trial(1, FAILED, reports=[odd], values=(math.nan,)),
        trial(2, PRUNED, reports=[odd]),
        trial(3, FINISHED, reports=[], values=(math.inf,)),
        Trial(4, {}, FAILED, error=None),
        trial(5, params={"optimizer.name": "sgd", "optimizer.lr": 3.5, "train.clip_norm": 0.7, "data.batch_size": 12}),
    ]
    page = report(tmp_path, given)
    assert "no error was told" in str(page.rows) and len(page.rows) > 6
    assert "NaN" not in json.dumps(page.figures, allow_nan=False)


HOSTILE = '</script><img src=x onerror="alert(1)"><b>&amp;'


def test_what_users_write_is_text_and_nothing_else(tmp_path: Path) -> None:
    raw = {
        "data.note": {"choice": [HOSTILE, "plain", ["<i>", 1], {"<k>": HOSTILE}]},
        "optimizer.lr": {"uniform": [0, 1]},
    }
    values = raw["data.note"]["choice"]
    given = [trial(n, params={"data.note": values[n % 4], "optimizer.lr": 0.1 + 0.01 * n}) for n in range(12)]
    given.append(trial(12, FAILED, 1, error=f"ValueError: {HOSTILE}", origin=HOSTILE, params=given[0].params))
    parameters = (
        Parameter("data.note", "choice", choices=tuple(values)),
        Parameter("optimizer.lr", "uniform", 0.0, 1.0),
    )
    page = report(tmp_path, given, Space(parameters), name=HOSTILE)
    assert not {"img", "b", "i"} & set(page.tags) and page.loads == []
    cells = [cell for row in page.rows for cell in row]
    assert HOSTILE in cells and '["<i>", 1]' in cells and f"ValueError: {HOSTILE}" in cells
    drawn = json.dumps(page.figures)
    assert "<img" not in drawn and "&lt;/script" in drawn, "Plotly takes texts for markup, too"
    text = (tmp_path / "report.html").read_text()
    assert text.count("</script>") == text.count("<script") == len(page.figures) + 2


def test_choices_that_python_takes_for_the_same_stay_apart() -> None:
    choices = (1, True, "1", 1.5, "x" * 50 + "a", "x" * 50 + "b")
    of = Space((Parameter("a.b", "choice", choices=choices),))
    given = [trial(n, params={"a.b": value}) for n, value in enumerate(choices)]
    shown_as = [one.params["a.b"] for one in past_study(given, of, OBJECTIVE).trials]
    assert len(set(shown_as)) == len(choices) and shown_as[:2] == ["1", "true"]
    assert all(len(text) <= 36 for text in shown_as)


def test_several_objectives(tmp_path: Path) -> None:
    objective = {"val/accuracy": "max", "val/loss": "min"}
    given = trials(24)
    for one in given:
        if one.values:
            one.values = (one.reports[-1].metrics["val/accuracy"], one.reports[-1].metrics["val/loss"])
    page = report(tmp_path, given, objective=objective)
    assert {"Pareto front", "History of val/loss", "Importances for val/loss", "Learning curves of val/loss"} <= set(
        page.sections
    )
    assert {"Parallel coordinates, val/accuracy", "Parallel coordinates, val/loss"} <= set(page.sections)
    front = next(figure for figure in page.figures if any(t.get("name") == "Pareto front" for t in figure["data"]))
    points = {
        (x, y)
        for t in front["data"]
        if t["name"] == "Pareto front"
        for x, y in zip(_list(t["x"]), _list(t["y"]), strict=True)
    }
    finished = [one.values for one in given if one.state == FINISHED and one.values]
    assert points == {
        (a, b) for a, b in finished if not any(x >= a and y <= b and (x, y) != (a, b) for x, y in finished)
    }


def _list(values: Any) -> list[float]:
    if isinstance(values, dict):  # plotly's typed arrays
        import base64

        import numpy as np

        return [float(value) for value in np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])]
    return [float(value) for value in values]


def test_a_thousand_trials_take_seconds_and_few_megabytes(tmp_path: Path) -> None:
    given = [trial(number, FINISHED if number % 2 else PRUNED, 100) for number in range(1000)]
    began = time.process_time()
    page = report(tmp_path, given)
    assert time.process_time() - began < 20, "two on a quiet machine"
    assert (tmp_path / "report.html").stat().st_size < 8 << 20
    curves = [figure for figure in page.figures if any(trace.get("name") == "pruned" for trace in figure["data"])]
    assert len(curves[0]["data"]) == 2, "a trace a state, not a trace a trial"
    assert "The 200 best of 500 finished trials." in page.sections["Parallel coordinates"]


def test_long_curves_keep_their_end() -> None:
    long = trial(0, evaluations=50)
    points = curve(long, "val/accuracy", 7)
    assert len(points) <= 8 and max(points) == 50 and POINTS_AT_MOST > 1000
    assert curve(long, "no/such", 7) == {} and curve(trial(1, evaluations=3), "val/loss", 7).keys() == {1, 2, 3}


def test_small_texts() -> None:
    assert [duration(seconds) for seconds in (0.04, 59, 61, 3600 * 26 + 120)] == [
        "0.0 s",
        "59.0 s",
        "1 min 01 s",
        "26 h 02 min",
    ]
    assert shown(0.123456789) == "0.123457" and shown([1, "a"]) == '[1, "a"]' and shown(True) == "true"
    assert len(shown("x" * 1000)) < 500
    given = [trial(0, FAILED, error="b\nc"), trial(1, FAILED, error="b c"), trial(2, FAILED, error="a"), trial(3)]
    assert grouped_errors(given) == [("b c", [0, 1]), ("a", [2])]
    assert re.fullmatch(r"x+ \.\.\.", grouped_errors([trial(0, FAILED, error="x" * 999)])[0][0])
