"""What a service has promised, from a YAML file, and whether a measurement holds it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from serving.errors import Mistake

MAX_BYTES = 100_000


@dataclass(frozen=True)
class Objectives:
    """Limits; None where there is none."""

    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    error_rate: float | None = None
    """Largest share of requests without a right answer, 0..1."""
    min_rps: float | None = None
    """Right answers per second, at least."""

    def check(self, measured: Mapping[str, float | None]) -> list[Check]:
        """One entry for each limit; `measured` has the same names. What could not be measured is broken."""
        found = []
        for item in fields(self):
            limit = getattr(self, item.name)
            if limit is None:
                continue
            value = measured[item.name]
            within = value is not None and (value >= limit if item.name == "min_rps" else value <= limit)
            found.append(Check(item.name, limit, value, within))
        return found


@dataclass(frozen=True)
class Check:
    """One limit, held against what was measured."""

    name: str
    limit: float
    value: float | None
    ok: bool

    def __str__(self) -> str:
        relation = ("≥" if self.ok else "<") if self.name == "min_rps" else ("≤" if self.ok else ">")
        value = "no answer" if self.value is None else f"{self.value:.4g}"
        return f"{self.name} {value} {relation} {self.limit:g}"


def read(file: Path) -> Objectives:
    """Read the file. Raises Mistake: it is missing, no YAML, has an unknown key or a value that can't be a limit."""
    import yaml

    try:
        if file.stat().st_size > MAX_BYTES:
            raise Mistake(f"{file}: more than {MAX_BYTES} bytes can't be a file of objectives")
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Mistake(f"{file}: can't be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise Mistake(f"{file}: no YAML ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict) or not content:
        raise Mistake(f"{file}: write limits as `key: number`; keys: {', '.join(_names())}")
    return Objectives(**{str(key): _limit(file, str(key), value) for key, value in content.items()})


def _limit(file: Path, key: str, value: Any) -> float:
    if key not in _names():
        close = difflib.get_close_matches(key, _names(), n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise Mistake(f"{file}: unknown key {key!r}{hint}; keys: {', '.join(_names())}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise Mistake(f"{file}: {key}: {value!r} is no limit, a number of at least 0 is needed")
    if key == "error_rate" and value > 1:
        raise Mistake(f"{file}: error_rate: {value!r} is a share of the requests, at most 1 (1 % is 0.01)")
    return float(value)


def _names() -> list[str]:
    return [item.name for item in fields(Objectives)]
