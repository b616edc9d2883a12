"""Serve bundles over HTTP until told to stop.

trainer serve BUNDLE                                a folder that `trainer export` has written
trainer serve digits=runs/a/bundle cats=runs/b/bundle --workers 2
SIGTERM answers what was accepted and ends; SIGHUP reloads the bundles, the keys, and opens a new request log.
"""

from __future__ import annotations

import argparse
import os
import sys

from serving import options


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    options.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Become the server: a process that knows nothing of training."""
    options.check(args)
    flags = [f"--{name}" for name in ("json", "debug") if getattr(args, name)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "serving", *flags, *options.arguments(args)])
