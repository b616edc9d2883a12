"""One entry of `tune.space`, from plain data to a `Parameter`, with everything that is wrong with it."""

from __future__ import annotations

import math
from typing import Any

from trainer.component import did_you_mean
from trainer.search.flow_text import flow_text
from trainer.search.parameter import KINDS, Kind, Parameter, grid_size, grid_value, identity
from trainer.validation import describe_value

MAX_CHOICES = 250
"""Each of them is tried on the config when it is loaded, and an error in a config must not take seconds."""

EXAMPLE = {
    "uniform": "[0.0, 0.5]",
    "log_uniform": "[0.0001, 0.1]",
    "int": "[1, 8]",
    "choice": "[16, 32, 64]",
    "quantized": "[0.1, 0.9, 0.1]",
}


def read_parameter(key: str, entry: Any) -> tuple[Parameter | None, list[str]]:
    """The parameter of an entry, or None, and what is wrong with it, one line each."""
    if not isinstance(entry, dict):
        last = key.rpartition(".")[2]
        whole = (
            f"; an entry is given whole: tune.space.{key.rpartition('.')[0]}={{{last}: ...}}" if last in KINDS else ""
        )
        return None, [f"got {describe_value(entry)}, wanted a distribution such as {{uniform: [0.0, 0.5]}}{whole}"]
    kinds = [kind for kind in KINDS if kind in entry]
    problems = [_unknown(key, word, bool(kinds)) for word in entry if word not in (*KINDS, "log", "when")]
    when, wrong = _conditions(entry.get("when", {}))
    problems += wrong
    if len(kinds) > 1:
        problems.append(f"has several distributions: {', '.join(kinds)}; leave one")
    elif not kinds and not problems:
        problems.append(f"names no distribution: one of {', '.join(KINDS)}")
    if "log" in entry:
        if not isinstance(entry["log"], bool):
            problems.append(f"log: got {describe_value(entry['log'])}, wanted true or false")
        elif kinds and kinds != ["int"]:
            instead = "; use log_uniform" if kinds == ["uniform"] else ""
            problems.append(f"log: goes with int only{instead}")
    if len(kinds) != 1:
        return None, problems
    kind = kinds[0]
    given = entry[kind]
    if not isinstance(given, list | tuple):
        return None, [*problems, f"{kind}: got {describe_value(given)}, wanted a list such as {EXAMPLE[kind]}"]
    log = entry.get("log") is True
    problems += _choice_problems(given) if kind == "choice" else _range_problems(kind, given, log)
    if problems:
        return None, problems
    if kind == "choice":
        return Parameter(key, kind, choices=tuple(given), when=when), []
    low, high, step = (*given, None)[:3]
    if kind in ("uniform", "log_uniform") or (kind == "quantized" and not all(isinstance(x, int) for x in given)):
        low, high, step = float(low), float(high), None if step is None else float(step)
    if kind == "quantized":
        high = grid_value(low, step, grid_size(low, high, step) - 1)
    return Parameter(key, kind, low, high, step, log, when=when), []


def _unknown(key: str, word: str, has_kind: bool) -> str:
    near = did_you_mean(word, [*KINDS, "log", "when"])
    if has_kind or near:
        return f"unknown key {word!r}{near or '; there are: ' + ', '.join((*KINDS, 'log', 'when'))}"
    return f"unknown distribution {word!r}: one of {', '.join(KINDS)}; a key inside {key} is written {key}.{word}"


def _conditions(raw: Any) -> tuple[tuple[tuple[str, tuple[Any, ...]], ...], list[str]]:
    if not isinstance(raw, dict):
        return (), [f"when: got {describe_value(raw)}, wanted a mapping such as {{optimizer.name: sgd}}"]
    when, problems = [], []
    for key, values in raw.items():
        alternatives = tuple(values) if isinstance(values, list | tuple) else (values,)
        if not alternatives:
            problems.append(f"when: {key} has no value that would do: name one, or leave the condition out")
        when.append((key, alternatives))
    return tuple(when), problems


def _choice_problems(given: Any) -> list[str]:
    if not given:
        return ["choice: the list is empty"]
    if len(given) > MAX_CHOICES:
        return [f"choice: {len(given)} choices are more than {MAX_CHOICES}: use int or quantized"]
    seen: set[Any] = set()
    problems = []
    for choice in given:
        try:
            text = flow_text(choice)
        except ValueError as error:
            problems.append(f"choice: {error}")
            continue
        if identity(choice) in seen:
            problems.append(f"choice: {text} is there twice")
        seen.add(identity(choice))
    return list(dict.fromkeys(problems))


def _range_problems(kind: Kind, given: Any, log: bool) -> list[str]:
    wanted = ["low", "high", "step"] if kind == "quantized" else ["low", "high"]
    if len(given) != len(wanted):
        return [f"{kind}: got {describe_value(given)}, wanted [{', '.join(wanted)}]"]
    for name, number in zip(wanted, given, strict=True):
        if isinstance(number, bool) or not isinstance(number, int if kind == "int" else int | float):
            what = "a whole number" if kind == "int" else "a number"
            return [f"{kind}: {name}: got {describe_value(number)}, wanted {what}"]
        if not _is_finite(number):
            return [f"{kind}: {name}: too large for a number"]
    low, high = given[:2]
    if low > high:
        return [f"{kind}: the range is the wrong way round: {flow_text(low)} is above {flow_text(high)}"]
    if low == high:
        return [f"{kind}: the range is the one point {flow_text(low)}: set it as {flow_text(low)}, or widen it"]
    if kind != "int" and float(low) == float(high):
        return [f"{kind}: the range is one point, as numbers have 16 digits: widen it"]
    if (kind == "log_uniform" or log) and low <= 0:
        return [f"{kind}: a log scale needs a lower end above 0, got {flow_text(low)}"]
    if kind == "quantized":
        if given[2] <= 0:
            return [f"quantized: step: got {flow_text(given[2])}, wanted a number above 0"]
        if grid_size(low, high, given[2]) < 2:
            return [
                f"quantized: the step {flow_text(given[2])} does not fit between {flow_text(low)} and {flow_text(high)}"
            ]
    return []


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(float(number))
    except OverflowError:  # an int of more than 308 digits
        return False
