"""The search space of `tune.space`: read, checked as far as it can be without the rest of the config, counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.component import did_you_mean
from trainer.errors import UserError
from trainer.search.distributions import read_parameter
from trainer.search.flow_text import flow_text, is_component_name, overrides
from trainer.search.parameter import Parameter, identity

__all__ = ["Parameter", "Space", "SpaceError", "overrides", "read_space"]

FIXED = {
    "tune": "it is the search itself",
    "name": "it names the folder of the search",
    "runs_dir": "it names the folder of the search",
    "resume": "it says how to start, not what is learnt",
    "tracking": "it says where results go, not what they are",
    "extends": "it belongs in a file",
    "holdout": "trials that are measured on different samples cannot be compared",
}
"""Sections and keys that no trial may have of its own -> why."""


MAX_PARAMETERS = 200
"""More could not be searched; conditions are followed by recursion, and each is tried on the config."""


class SpaceError(UserError):
    """Everything wrong with a space: (key of the space, what is wrong with it)."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(f"tune.space.{key}: {message}" for key, message in problems))


@dataclass(frozen=True)
class Space:
    """Parameters, each after those that its conditions name and after the name of the component it belongs to."""

    parameters: tuple[Parameter, ...]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)

    def __getitem__(self, key: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.key == key)

    def __contains__(self, key: object) -> bool:
        return any(parameter.key == key for parameter in self.parameters)

    def active(self, params: Mapping[str, Any]) -> list[Parameter]:
        """The parameters that are there with these values, in order; values of those that are not don't count."""
        there: dict[str, Any] = {}
        found = []
        for parameter in self.parameters:
            if parameter.is_active(there):
                found.append(parameter)
                if parameter.key in params:
                    there[parameter.key] = params[parameter.key]
        return found

    def requirements(self, parameter: Parameter) -> dict[str, tuple[Any, ...]]:
        """What must hold for a parameter to be there, the conditions of its conditions included.

        Key -> values that it may have, in the order of the space; no values where the conditions exclude each other.
        """
        needed: dict[str, tuple[Any, ...]] = {}
        queue = [parameter]
        while queue:
            for key, values in queue.pop().when:
                allowed = {identity(value) for value in values}
                if key not in needed:
                    queue.append(self[key])
                needed[key] = tuple(value for value in needed.get(key, values) if identity(value) in allowed)
        return {own.key: needed[own.key] for own in self.parameters if own.key in needed}

    def size(self) -> int | None:
        """Number of different trials, what is there only under conditions counted where it is there.

        None where some trial has a number whose values cannot be counted.
        """
        total = 1
        for family in self._families():
            count = _count(family, frozenset(), {})
            if count is None:
                return None
            total *= count
        return total

    def describe(self) -> str:
        """How large it is, in words, e.g. `4 parameters, 24 different trials`."""
        size = self.size()
        if size is None:
            trials = "no end of trials (a number is continuous)"
        else:
            trials = f"{size:,} different trials" if size < 10**15 else f"10^{math.log10(size):.0f} different trials"
        return f"{len(self)} parameter{'' if len(self) == 1 else 's'}, {trials}"

    def _families(self) -> list[tuple[Parameter, ...]]:
        """The parameters in groups with no condition from one to another."""
        families: list[list[Parameter]] = []
        for parameter in self.parameters:
            named = {key for key, _values in parameter.when}
            joined = [family for family in families if any(member.key in named for member in family)]
            families = [family for family in families if family not in joined]
            families.append([*(member for family in joined for member in family), parameter])
        return [_dependents_early(family) for family in families]


def _dependents_early(family: list[Parameter]) -> tuple[Parameter, ...]:
    """Each right after the last of its conditions, so that few conditions are open at any time while counting."""
    ordered: list[Parameter] = []
    waiting = list(family)
    while waiting:
        open_keys = {parameter.key for parameter in waiting}
        ready = [parameter for parameter in waiting if not any(key in open_keys for key, _values in parameter.when)]
        ordered.append(next((parameter for parameter in ready if parameter.when), ready[0]))
        waiting.remove(ordered[-1])
    return tuple(ordered)


def _count(rest: tuple[Parameter, ...], absent: frozenset[str], known: dict[Any, int | None]) -> int | None:
    """Number of ways to fill in `rest`; `absent` are those of them for which a condition has failed already.

    Values of a parameter are told apart only by whom they leave absent, so that this takes no time in proportion to
    the number of values.
    """
    if not rest:
        return 1
    state = (len(rest), absent)
    if state not in known:
        first, others = rest[0], rest[1:]
        total: int | None = 0
        for left_out, ways in _branches(first, others, first.key in absent).items():
            below = _count(others, (absent | left_out) - {first.key}, known)
            total = None if total is None or ways is None or below is None else total + ways * below
        known[state] = total
    return known[state]


def _branches(first: Parameter, others: tuple[Parameter, ...], is_absent: bool) -> dict[frozenset[str], int | None]:
    """Which of `others` become absent -> by how many values of `first`."""
    conditions = [
        (other.key, {identity(value) for value in values})
        for other in others
        for key, values in other.when
        if key == first.key
    ]
    everyone = frozenset(key for key, _values in conditions)
    if is_absent:
        return {everyone: 1}
    count = first.count()
    if count is None:
        return {everyone: None}
    named = set[Any]().union(*(values for _key, values in conditions))
    if first.kind == "choice":
        named = {identity(choice) for choice in first.choices}
    else:
        named = {value for value in named if first.contains(value[1])}
    branches: dict[frozenset[str], int | None] = {}
    for value in named:
        left_out = frozenset(key for key, values in conditions if value not in values)
        branches[left_out] = (branches.get(left_out) or 0) + 1
    if count > len(named):
        branches[everyone] = (branches.get(everyone) or 0) + count - len(named)
    return branches


def read_space(raw: Mapping[str, Any]) -> Space:
    """The space of plain data as they stand in `tune.space`. Raises SpaceError with everything wrong with it."""
    problems: list[tuple[str, str]] = []
    parameters: dict[str, Parameter] = {}
    if len(raw) > MAX_PARAMETERS:
        raise SpaceError([(list(raw)[MAX_PARAMETERS], f"a space has at most {MAX_PARAMETERS} keys, not {len(raw)}")])
    for key, entry in raw.items():
        refusal = _key_problem(key, raw)
        if refusal:
            problems.append((key, refusal))
            continue
        parameter, wrong = read_parameter(key, entry)
        problems += [(key, message) for message in wrong]
        if parameter is not None:
            parameters[key] = parameter
    problems += [
        (key, message) for key in parameters for message in _condition_problems(parameters[key], parameters, raw)
    ]
    if problems:
        raise SpaceError(problems)
    space = Space(_ordered(parameters))
    for parameter in space:
        for key, values in space.requirements(parameter).items():
            if not values:
                problems.append((parameter.key, f"is never varied: its conditions exclude each other at {key}"))
                break
    if problems:
        raise SpaceError(problems)
    return space


def _key_problem(key: str, raw: Mapping[str, Any]) -> str | None:
    parts = key.split(".")
    if not all(parts) or key != key.strip() or "=" in key or not key.isprintable():
        return "is no dotted key of a config, such as optimizer.lr"
    if parts[0] in FIXED:
        return f"cannot be varied: {FIXED[parts[0]]}"
    inside = next((other for other in raw if other.startswith(f"{key}.")), None)
    return f"holds {inside}, which is varied, too: leave one of them out" if inside is not None else None


def _condition_problems(
    parameter: Parameter, parameters: Mapping[str, Parameter], raw: Mapping[str, Any]
) -> Iterator[str]:
    for key, values in parameter.when:
        if key == parameter.key:
            yield "cannot depend on itself"
        elif key not in raw:
            yield f"when: {key} is no key of the space{did_you_mean(key, list(raw))}"
        elif key in parameters:
            other = parameters[key]
            if other.is_continuous:
                yield f"when: {key} has no values that can be counted ({other.describe()}): use a choice or an int"
                continue
            if other.contains(list(values)) and not any(other.contains(value) for value in values):
                one = flow_text(list(values))
                yield f"when: {key}: a list stands for several values; the value {one} is written [{one}]"
                continue
            for value in values:
                if not other.contains(value):
                    yield f"when: {key} is never {flow_text(value)}; it is {other.describe()}"


def _ordered(parameters: Mapping[str, Parameter]) -> tuple[Parameter, ...]:
    """In the order of the config, but after what each comes after. Raises SpaceError for a cycle."""
    ordered: list[Parameter] = []
    done: set[str] = set()

    def visit(key: str, path: tuple[str, ...]) -> None:
        if key in path:
            cycle = " -> ".join([*path[path.index(key) :], key])
            raise SpaceError([(key, f"depends on itself: {cycle} (`->`: comes after)")])
        if key in done:
            return
        name = f"{key.partition('.')[0]}.name"
        before = [other for other, _values in parameters[key].when]
        if name in parameters and name != key and not is_component_name(key):
            before.append(name)
        for other in before:
            visit(other, (*path, key))
        done.add(key)
        ordered.append(parameters[key])

    for key in parameters:
        visit(key, ())
    return tuple(ordered)
