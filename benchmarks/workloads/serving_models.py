"""The two models of `benchmarks/serving.py`, what is asked of them, and what they answer: the same in every process.

python -m workloads.serving_models bundle small FOLDER        our bundle
python -m workloads.serving_models alone resnet18 SECONDS     the model in a loop, without a server
"""

from __future__ import annotations

import base64
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SMALL, RESNET = "small", "resnet18"
MODELS = (SMALL, RESNET)
FEATURES, CLASSES, SIZE = 64, 10, 224
WIDTHS = (1024, 1024, 1024)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LABELS = [f"class{number}" for number in range(CLASSES)]
BATCH = 32
TOLERANCE = {SMALL: 1e-4, RESNET: 2e-2}
"""Of probabilities. Two decoders of JPEG differ by a step of 255 here and there."""


class Normalised(nn.Module):
    """Takes pixels [N, 3, H, W] of 0..255, as a bundle's program does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model((pixels.float() - self.mean) / self.std)


def build(name: str) -> nn.Module:
    """[N, 64] floats, or [N, 3, 224, 224] normalised pixels -> [N, 10] probabilities; always the same weights."""
    generator = torch.random.get_rng_state()
    torch.manual_seed(7)
    if name == SMALL:
        layers: list[nn.Module] = []
        for wide, narrow in zip((FEATURES, *WIDTHS), (*WIDTHS, CLASSES), strict=True):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        model: nn.Module = nn.Sequential(*layers[:-1], nn.Softmax(dim=1))
    else:
        from torchvision.models import resnet18

        model = nn.Sequential(resnet18(num_classes=CLASSES), nn.Softmax(dim=1))
    torch.random.set_rng_state(generator)
    return model.eval()


def features() -> list[float]:
    """The sample of the small model."""
    return [round(float(value), 4) for value in np.random.default_rng(3).normal(size=FEATURES)]


def jpeg() -> bytes:
    """The picture: waves and blocks, 224×224, about 15 kB."""
    from PIL import Image

    y, x = np.mgrid[0:SIZE, 0:SIZE]
    waves = [127 + 80 * np.sin(x / 9 + shift) * np.cos(y / 13) + 40 * ((x // 28 + y // 28) % 2) for shift in (0, 2, 4)]
    stream = io.BytesIO()
    Image.fromarray(np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def decode(data: bytes) -> torch.Tensor:
    """[3, 224, 224] normalised, the way torchvision's examples do it."""
    from PIL import Image
    from torchvision.transforms import v2

    return _transform(v2)(Image.open(io.BytesIO(data)).convert("RGB"))


_made: list[Callable[[Any], torch.Tensor]] = []


def _transform(v2: Any) -> Callable[[Any], torch.Tensor]:
    if not _made:
        steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        _made.append(v2.Compose(steps))
    return _made[0]


def answer(probabilities: torch.Tensor) -> dict[str, Any]:
    """What every contender answers: one row of probabilities told."""
    index = int(probabilities.argmax())
    return {"label": LABELS[index], "score": float(probabilities[index]), "scores": probabilities.tolist()}


def expected(name: str) -> list[float]:
    """The probabilities that every contender must answer."""
    sample = torch.tensor(features()) if name == SMALL else decode(jpeg())
    with torch.inference_mode():
        return build(name)(sample[None])[0].tolist()


def write_bundle(name: str, folder: Path) -> None:
    """A bundle as `trainer export` writes it, of a model that no training has made."""
    from serving.bundle import finish

    folder.mkdir(parents=True)
    model = build(name)
    is_small = name == SMALL
    program = model if is_small else Normalised(model)
    example = torch.zeros(2, FEATURES) if is_small else torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=1024)
        torch.export.save(
            torch.export.export(program, (example,), dynamic_shapes=({0: batch},)), folder / "program.pt2"
        )
    request = features() if is_small else {"b64": base64.b64encode(jpeg()).decode()}
    golden = {"request": request, "outputs": {"probabilities": expected(name)}}
    (folder / "golden.jsonl").write_text(json.dumps(golden) + "\n")
    field = {"description": ""}
    pixels = {"name": "pixels", "dtype": "uint8", "shape": [-1, 3, SIZE, SIZE], "unit": "pixel value 0..255", **field}
    numbers = {"name": "features", "dtype": "float32", "shape": [-1, FEATURES], "unit": "", **field}
    scores = {"name": "probabilities", "dtype": "float32", "shape": [-1, CLASSES], "unit": "probability", **field}
    picture = {"kind": "picture", "channels": 3, "height": SIZE, "width": SIZE, "resize": "none"}
    content = {
        "name": name,
        "task": "classification",
        "program": {"runtime": "pt2", "file": "program.pt2", "dtype": "float32", "max_batch": None},
        "preprocessing": {"kind": "tensor"} if is_small else picture,
        "signature": {"inputs": [numbers if is_small else pixels], "outputs": [scores], "labels": LABELS},
        "postprocessing": {"kind": "classification"},
        "golden": {"file": "golden.jsonl", "count": 1, "tolerance": TOLERANCE[name]},
        "metrics": {},
        "run": {},
        "warmup_batches": [1, BATCH],
    }
    finish(folder, content)


def alone(name: str, seconds: float) -> dict[str, float]:
    """Samples per second of the model in batches of 32, and milliseconds of one sample, in a loop."""
    model = build(name)
    sample = torch.tensor(features()) if name == SMALL else decode(jpeg())
    rates = {}
    with torch.inference_mode():
        for size in (1, BATCH):
            batch = sample.expand(size, *sample.shape).contiguous()
            for _ in range(3):
                model(batch)
            times = []
            until = time.perf_counter() + seconds / 2
            while (start := time.perf_counter()) < until:
                model(batch)
                times.append(time.perf_counter() - start)
            rates[size] = len(times) * size / sum(times)
    return {"batched": rates[BATCH], "single_ms": 1000 / rates[1]}


def main() -> None:
    verb, name, last = sys.argv[1:]
    if verb == "bundle":
        write_bundle(name, Path(last))
    else:
        print(json.dumps(alone(name, float(last))))


if __name__ == "__main__":
    main()
