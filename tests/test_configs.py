"""Every config that ships says what to expect, loads, and trains."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from processes import ForkServer

from trainer.layers import CONFIGS, shipped_configs
from trainer.load import dump, load

TINY = ["train.max_steps=2", "train.device=cpu", "strategy=auto", "tracking.enabled=false", "data.workers=0"]
PICTURES = ["data.path=pictures", "data.batch_size=4"]
SMALLER = {
    "lora-smollm2.yaml": [
        "recipe.max_length=96",
        "data.val_fraction=0.01",
        "data.batch_size=1",
        "evaluate.at_start=false",
        "train.log_every=1",
    ],
    "resnet50.yaml": [
        *PICTURES,
        "model.num_classes=2",
        "data.augment=[{RandomResizedCrop: {size: [64, 64]}}, {HorizontalFlip: {}}]",
    ],
}
"""Config -> what it needs beside `TINY`: data from a folder, or less work."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("left", "right"):
            place = tmp_path / "pictures" / split / label
            place.mkdir(parents=True)
            for number in range(4):
                cv2.imwrite(str(place / f"{number}.jpg"), draw.integers(0, 256, (72, 72, 3), np.uint8))
    return tmp_path


def header(name: str) -> str:
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    comment = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.lstrip("# ") for line in comment)


@pytest.mark.parametrize("name", shipped_configs())
def test_opens_with_expectation_hardware_and_command(name: str) -> None:
    text = header(name)
    assert "Expect: " in text
    assert re.search(r"\b(core|GPU|accelerator)s?\b", text), "on which hardware?"
    found = re.search(r"`([^`]*\b(?:fit|finetune-lora) --config [^`]*)`", text)
    assert found, "with which command?"
    words = shlex.split(found[1])
    assert words[words.index("--config") + 1] == name
    load(name, words[words.index("--config") + 2 :])


@pytest.mark.parametrize("name", shipped_configs())
def test_loads_and_resolves_to_itself(name: str, tmp_path: Path) -> None:
    config = load(name)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load(tmp_path / "resolved.yaml") == config
    assert config.name == Path(name).stem, "runs are found by the name of their config"


@pytest.mark.parametrize("name", shipped_configs())
def test_trains_two_steps(name: str, folder: Path, server: ForkServer) -> None:
    training = server.run("fit", "--config", name, *TINY, *SMALLER.get(name, []), "--json", cwd=folder)
    log = training.log()
    assert training.wait() == [0], log
    result = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    assert (result["status"], result["steps"]) == ("finished", 2)
    assert all(np.isfinite(value) for value in result["metrics"].values())
    logged = [json.loads(line) for line in (folder / result["run"] / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "train/loss" in entry] == [1, 2]
    assert any(key.startswith("val/") for entry in logged for key in entry)


def test_quickstart_learns(tmp_path: Path, server: ForkServer) -> None:
    """A tenth of its training: far above chance already, and a checkpoint of the best is there."""
    training = server.run("fit", "--config", "quickstart.yaml", "train.max_epochs=3", "evaluate.every_epochs=1",
                          "tracking.enabled=false", "--json", cwd=tmp_path)  # fmt: skip
    assert training.wait() == [0], training.log()
    result = json.loads(next(line for line in training.log().splitlines() if line.startswith("{")))
    assert result["metrics"]["test/accuracy"] > 0.85
    assert list((tmp_path / result["run"] / "checkpoints").glob("step-*/manifest.json"))
