"""Whether a config takes the values of a space: each bound and each choice is tried, under its conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from trainer.errors import Problem
from trainer.search.flow_text import is_component_name, overrides
from trainer.search.parameter import Parameter, identity
from trainer.search.space import Space

Try = Callable[[Sequence[str]], list[Problem]]
"""What is wrong with the config, its section `tune` aside, under such overrides."""
Found = tuple[tuple[str, str], ...]

_UNKNOWN = "unknown key"
_MISSING = "missing"


def refused_values(space: Space, attempt: Try) -> Iterator[tuple[str, str]]:
    """(key of the space, what the config says to one of its values), each once.

    A value is tried under the first value of each condition and under every other value of one of them, and under each
    component that the space may put in the place of the key's own.
    """

    @cache
    def problems_of(texts: tuple[str, ...]) -> Found:
        return tuple((problem.key, problem.message) for problem in attempt(texts))

    for parameter in space:
        seen: set[Any] = set()
        for context in _contexts(space, parameter):
            below = problems_of(tuple(overrides(context)))
            for value in parameter.bounds():
                params = {**context, parameter.key: value}
                for key, message in problems_of(tuple(overrides(params))):
                    if (key, message) in below or _is_given_later(space, params, key, message):
                        continue
                    of_the_key = _is_of_the_key(parameter, key, message)
                    fault = (key, message, None if of_the_key else identity(value))
                    if fault not in seen:  # one that has nothing to do with the context
                        seen.add(fault)
                        yield (
                            parameter.key,
                            _said(parameter, context if of_the_key else params, key, message, of_the_key),
                        )


def _contexts(space: Space, parameter: Parameter) -> Iterator[dict[str, Any]]:
    needed = space.requirements(parameter)
    first = {key: values[0] for key, values in needed.items()}
    yield first
    for key, values in needed.items():
        yield from ({**first, key: value} for value in values[1:])
    # Where the space changes the component, an unconditional key of it meets each of them.
    name = f"{parameter.key.partition('.')[0]}.name"
    if name in space and name not in needed and not is_component_name(parameter.key):
        above = space.requirements(space[name])
        both = {**above, **needed}
        for key in above.keys() & needed.keys():
            allowed = {identity(value) for value in above[key]}
            both[key] = tuple(value for value in needed[key] if identity(value) in allowed)
        if all(both.values()):
            yield from (
                {**{key: values[0] for key, values in both.items()}, name: value} for value in space[name].bounds()
            )


def _is_given_later(space: Space, params: Mapping[str, Any], key: str, message: str) -> bool:
    """Whether a key is missing that the trial's other parameters give."""
    return message.startswith(_MISSING) and any(parameter.key == key for parameter in space.active(params))


def _is_of_the_key(parameter: Parameter, key: str, message: str) -> bool:
    """Whether the config does not know the key, or what it is in, whatever its value."""
    return message.startswith(_UNKNOWN) and f"{parameter.key}.".startswith(f"{key}.")


def _said(parameter: Parameter, params: Mapping[str, Any], key: str, message: str, of_the_key: bool) -> str:
    under = ", ".join(_short(text) for text in overrides(params) if not text.endswith("={}"))
    where = "" if key == parameter.key or of_the_key else f"{key}: "
    limit = [name for name in params if is_component_name(name) and name not in dict(parameter.when)]
    remedy = f"; `when: {{{limit[0]}: ...}}` limits it to those that have it" if of_the_key and limit else ""
    return (f"with {under}: " if under else "") + where + message + remedy


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
