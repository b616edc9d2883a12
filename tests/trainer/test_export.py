"""A bundle answers as the run's own evaluation does: every sample of the test split, in every format."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import exported_runs
import numpy as np
import pytest
from exported_runs import Expected, export
from harness import environment, toy_config
from outcome import only_run

from serving.bundle import Bundle
from serving.predictor import Predictor
from trainer.cli import main
from trainer.export import measure

Capture = pytest.CaptureFixture[str]
FORMATS = ("pt2", "onnx")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """With averaged weights, which are those that are evaluated."""
    return exported_runs.expected(exported_runs.digits(tmp_path_factory.mktemp("digits"), train={"ema_decay": 0.9}))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return exported_runs.expected(exported_runs.pictures(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured for as short as it can be: the least number of rounds."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)


@pytest.fixture(params=FORMATS)
def kind(request: pytest.FixtureRequest) -> str:
    """A format that can be made here."""
    name: str = request.param
    if name == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    return name


def _require_same(predictor: Predictor, samples: list[Any], wanted: Expected, tolerance: float = 1e-4) -> None:
    for size in (1, 7, len(samples)):
        rows = [row for at in range(0, len(samples), size) for row in predictor.predict(samples[at : at + size])]
        assert all(isinstance(row, tuple) for row in rows)
        scores = np.stack([row[0] for row in rows])
        assert np.abs(scores - wanted.scores).max() <= tolerance
        assert (scores.argmax(1) == wanted.scores.argmax(1)).all()
    told = predictor.render(rows[0])
    assert told["label"] == wanted.labels[int(wanted.scores[0].argmax())]


def test_digits_are_answered_as_in_training(digits: Expected, kind: str, tmp_path: Path) -> None:
    bundle = Bundle.read(export(digits.run, tmp_path / "b", "--format", kind))
    bundle.verify()
    assert bundle.golden.tolerance == 1e-4 and bundle.program.runtime == kind
    predictor = Predictor.open(bundle)
    samples = [predictor.parse(request, "instances[0]") for request in digits.requests]
    assert len(samples) == 269
    _require_same(predictor, samples, digits)
    _require_reference(bundle.path)


def test_files_of_pictures_are_answered_as_in_training(pictures: Expected, kind: str, tmp_path: Path) -> None:
    predictor = Predictor.open(Bundle.read(export(pictures.run, tmp_path / "b", "--format", kind)))
    assert len(pictures.files) == 36
    _require_same(predictor, [predictor.input.parse_bytes(file, "") for file in pictures.files], pictures)
    _require_same(predictor, [predictor.parse(request, "") for request in pictures.requests], pictures)


FOREIGN = """
import json, sys
from serving.bundle import Bundle
from serving.predictor import Predictor
bundle = Bundle.read(sys.argv[1])
bundle.verify()
replay = Predictor.open(bundle).replay()
assert replay.ok and replay.count == 32, replay
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} & {"trainer", "recipes", "lightning"})))
"""


def test_what_a_bundle_holds(pictures: Expected, tmp_path: Path, capsys: Capture) -> None:
    folder = export(pictures.run, tmp_path / "b", "--format", "pt2", "--price", "0.5", "--name", "colours", "--json")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    bundle = Bundle.read(folder)
    assert told["version"] == bundle.version and bundle.name == "colours" and told["format"] == "pt2"
    assert sorted(path.name for path in folder.iterdir()) == [
        "bundle.json", "card.md", "golden.jsonl", "measurements.json", "program.pt2", "reference.json",
    ]  # fmt: skip
    assert bundle.signature.labels == exported_runs.CLASSES
    assert bundle.signature.inputs[0].unit == "pixel value 0..255"
    record = json.loads((pictures.run / "run.json").read_text())
    assert bundle.run["id"] == pictures.run.name and bundle.run["lineage"] == record["lineage"]["id"]
    assert {"val/accuracy", "val/loss", "test/accuracy"} <= bundle.metrics.keys()
    measured = json.loads((folder / "measurements.json").read_text())
    (row,) = measured["formats"]
    assert row["chosen"] and row["deviation"] <= 1e-4 and row["samples"] == 36 and set(row["latency"]) == {"1", "32"}
    capacity = measured["capacity"]
    assert [entry["batch"] for entry in capacity["batches"]] == [1, 2, 4, 8, 16, 32, 64]
    rate = capacity["requests_per_second"]
    assert capacity["hpa_target_in_flight"] == max(1, int(0.7 * rate * 0.1))
    assert capacity["usd_per_thousand"] == pytest.approx(0.5 / 3600 / rate * 1000, rel=1e-3)
    card = (folder / "card.md").read_text()
    for text in (bundle.run["lineage"], "## Intended use", "val/accuracy", "red", "Little's law", "0.5 USD an hour"):
        assert text in card
    place = {**environment(), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN, str(folder)], env=place, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def _require_reference(folder: Path) -> None:
    """The statistics are those of the validation split, computed by other means."""
    from recipes.data import digits as data

    found = json.loads((folder / "reference.json").read_text())
    val = data.build(data.Config(), 0).split("val")
    assert val is not None
    pixels = val.batch(range(len(val)), 0)["image"].double()
    (feature,) = found["inputs"]["image"]["features"]
    assert found["samples"] == len(val) and feature["count"] == pixels.numel()
    assert feature["mean"] == pytest.approx(pixels.mean().item())
    assert feature["std"] == pytest.approx(pixels.std(correction=0).item())
    assert sum(feature["histogram"]["counts"]) == pixels.numel()
    assert sum(found["labels"]["counts"].values()) == len(val)
    assert found["confidence"]["count"] == found["entropy"]["count"] == len(val)
    assert found["sizes"]["height"]["mean"] == 8


def test_int8_and_bf16_say_what_they_cost(digits: Expected, tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("onnxruntime")
    options = ("--format", "pt2", "--quantize", "int8", "--quantize", "bf16", "--json")
    folder = export(digits.run, tmp_path / "b", *options)
    rows = {row["format"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["formats"]}
    assert rows.keys() == {"pt2", "onnx int8", "pt2 bf16"}
    own = Bundle.read(folder).metrics
    assert rows["pt2"]["metrics"]["val/accuracy"] == own["val/accuracy"]
    assert rows["pt2"]["metrics"]["val/loss"] == pytest.approx(own["val/loss"], abs=1e-5)
    for name in ("onnx int8", "pt2 bf16"):
        assert rows[name]["metrics"].keys() == rows["pt2"]["metrics"].keys()
        assert 0 < rows[name]["deviation"] <= rows[name]["tolerance"] and rows[name]["within_tolerance"]
        assert abs(rows[name]["metrics"]["val/accuracy"] - own["val/accuracy"]) < 0.05
    assert rows["onnx int8"]["bytes"] < rows["pt2"]["bytes"]
    assert "## Metrics by type of the weights" in (folder / "card.md").read_text()
    assert Predictor.open(Bundle.read(folder)).replay().ok


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    """Tensors in, tensors out; batch statistics and dropout are those of evaluation; trained in half precision."""
    config = toy_config(tmp_path, model={"norm": "batch", "dropout": 0.5}, train={"precision": "bf16-mixed"})
    assert main(["fit", "--config", str(config)]) == 0
    run = only_run(tmp_path)
    folder = export(run, tmp_path / "b", "--format", "pt2", "--golden", "5")
    bundle = Bundle.read(folder)
    assert bundle.golden.count == 5 and 1e-4 < bundle.golden.tolerance <= 0.05
    predictor = Predictor.open(bundle)
    assert predictor.replay().ok
    (row,) = predictor.predict([predictor.parse([0.5] * 8, "instances[0]")])
    assert isinstance(row, tuple) and np.shape(predictor.render(row)["logits"]) == (4,)
    assert "metre" in (folder / "card.md").read_text()


def test_auto_takes_the_quickest_and_tells_why_others_are_missing(
    digits: Expected, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler: a row that says so; asked for by its name, an error in one line."""
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = export(digits.run, tmp_path / "b", "--json")
    rows = {row["format"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["formats"]}
    assert rows.keys() == {"pt2", "onnx", "aoti"} and "no C++ compiler" in rows["aoti"]["missing"]
    made = [row for row in rows.values() if "missing" not in row]
    speed = {row["format"]: row["latency"]["1"]["median"] * row["latency"]["32"]["median"] for row in made}
    assert Bundle.read(folder).program.runtime == min(speed, key=lambda name: speed[name])
    assert main(["export", str(digits.run), "--output", str(tmp_path / "c"), "--format", "aoti"]) == 2
    assert "--format aoti: no C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
