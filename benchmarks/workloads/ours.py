"""`trainer fit --config FILE`, with run directory, `metrics.jsonl` and progress lines."""

from __future__ import annotations

from pathlib import Path

from trainer import cli
from workloads.work import Work


def run(work: Work, folder: Path, tracking: bool) -> None:
    file = work.config_file(folder / ("tracked" if tracking else "untracked"), tracking)
    raise SystemExit(cli.main(["fit", "--config", str(file), "--debug"]))
