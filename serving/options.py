"""The options of `trainer serve`, which starts `python -m serving` with them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.errors import Mistake

MIB = 1 << 20


@dataclass(frozen=True)
class Option:
    """One option with a value."""

    flag: str
    read: Callable[[str], Any]
    default: Any
    metavar: str
    help: str

    @property
    def name(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


def _bounded(kind: type[int] | type[float], low: float, high: float = math.inf) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf:
            what = "a whole number" if kind is int else "a number"
            bounds = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {what} {bounds}")
        return value

    return read


def _threads(text: str) -> int | None:
    return None if text.lower() == "auto" else int(_bounded(int, 1, 1024)(text))


_COUNT = _bounded(int, 1)
OPTIONS = (
    Option("--host", str, "127.0.0.1", "ADDRESS", "address to listen on; 0.0.0.0 is every network"),
    Option("--port", _bounded(int, 0, 65535), 8000, "N", "0 takes a free one"),
    Option("--workers", _bounded(int, 1, 1024), 1, "N", "processes that run each model"),
    Option("--threads", _threads, None, "N", "threads of each worker; auto shares the cores out"),
    Option("--cores", _bounded(int, 1, 1024), None, "N", "cores to share out; by default all that are ours to use"),
    Option("--device", str, "auto", "NAME", "cpu, cuda, or auto"),
    Option("--max-batch", _bounded(int, 1, 65536), 32, "N", "largest batch that runs at once"),
    Option("--max-wait-ms", _bounded(float, 0, 60_000), 0.0, "MS", "wait of a free worker for a batch to fill"),
    Option("--queue", _bounded(int, 1, 10_000_000), 512, "N", "instances that may wait; past it: 503 and Retry-After"),
    Option("--deadline-ms", _bounded(float, 1, 86_400_000), 10_000.0, "MS", "longest wait of a request, else 504"),
    Option("--max-body-mb", _bounded(float, 0.001, 2048), 16.0, "MIB", "largest body of a request"),
    Option("--max-pixels", _COUNT, 50_000_000, "N", "largest picture that is decoded"),
    Option("--max-connections", _bounded(int, 1, 1_000_000), 1024, "N", "of clients at one time"),
    Option("--rate-limit", _bounded(float, 0.001), None, "RPS", "requests a second of each key, or client address"),
    Option("--api-keys", Path, None, "FILE", "keys that clients must show: `NAME KEY` a line"),
    Option("--admin-keys", Path, None, "FILE", "keys that may reload models"),
    Option("--tls-cert", Path, None, "FILE", "certificate chain, PEM"),
    Option("--tls-key", Path, None, "FILE", "its private key, PEM"),
    Option("--request-log", Path, None, "FILE", "one JSON line a request; no inputs in it"),
    Option("--drain-seconds", _bounded(float, 0, 86_400), 30.0, "S", "time for accepted requests after SIGTERM"),
    Option("--max-rows", _bounded(int, 1, 65536), 16, "N", "language models: sequences that run at once"),
    Option("--kv-tokens", _COUNT, None, "N", "language models: tokens in the cache; by default from the memory"),
    Option("--language-queue", _bounded(int, 1, 10_000_000), 64, "N", "language models: requests that may wait"),
    Option(
        "--language-deadline-ms",
        _bounded(float, 1, 86_400_000),
        300_000.0,
        "MS",
        "language models: longest answer, else 504",
    ),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add all options to a parser."""
    parser.add_argument(
        "bundles", nargs="+", metavar="BUNDLE", help="folder of `trainer export`; NAME=FOLDER gives it another name"
    )
    for option in OPTIONS:
        shown = "" if option.default is None else f" ({option.default:g})" if type(option.default) is float else ""
        shown = shown or ("" if option.default is None else f" ({option.default})")
        kwargs: dict[str, Any] = {"type": option.read, "default": option.default, "metavar": option.metavar}
        parser.add_argument(option.flag, help=option.help + shown, **kwargs)
    parser.add_argument("--request-log-hash", action="store_true", help="log the SHA-256 of each request's body")
    parser.add_argument("--watch", action="store_true", help="reload a bundle when its folder changes")
    parser.add_argument(
        "--alias", action="append", default=[], metavar="NEW=OLD", help="answer the path NEW like OLD: /ping=/ready"
    )


def arguments(args: argparse.Namespace) -> list[str]:
    """The command line that gives these options again."""
    found: list[str] = []
    for option in OPTIONS:
        value = getattr(args, option.name)
        if value != option.default:
            found += [option.flag, str(value)]
    found += [f"--{name.replace('_', '-')}" for name in ("request_log_hash", "watch") if getattr(args, name)]
    for alias in args.alias:
        found += ["--alias", alias]
    return [*found, "--", *args.bundles]


@dataclass(frozen=True)
class Place:
    """A bundle that is asked for."""

    name: str | None
    """None takes the bundle's own."""
    path: Path


def places(texts: Sequence[str]) -> list[Place]:
    """The bundles of the command line. Raises Mistake."""
    found = []
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign or Path(text).exists():
            found.append(Place(None, Path(text)))
        elif not name or not path or not name.isprintable() or len(name) > 200:
            raise Mistake(f"{text!r}: expected a bundle's folder, or NAME=FOLDER")
        else:
            found.append(Place(name, Path(path)))
    return found


def aliases(texts: Sequence[str]) -> dict[bytes, bytes]:
    """New path -> old path. Raises Mistake."""
    found = {}
    for text in texts:
        new, sign, old = text.partition("=")
        if not sign or not new.startswith("/") or not old.startswith("/") or not text.isascii() or "?" in text:
            raise Mistake(f"--alias {text!r}: expected NEW=OLD, both paths: /ping=/ready")
        found[new.encode()] = old.encode()
    return found


def check(args: argparse.Namespace) -> None:
    """What no option alone can tell. Raises Mistake."""
    if (args.tls_cert is None) != (args.tls_key is None):
        missing = "--tls-key" if args.tls_key is None else "--tls-cert"
        raise Mistake(f"TLS needs a certificate and its key: {missing} is missing")
    if args.device not in ("auto", "cpu") and not args.device.startswith("cuda"):
        raise Mistake(f"--device {args.device!r}: expected cpu, cuda, or auto")
    aliases(args.alias)
    places(args.bundles)
