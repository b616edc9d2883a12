"""Pictures per second from a folder of JPEGs: `trainer fit`'s data against torchvision's with the plain DataLoader.

    python benchmarks/data_loading.py [--quick] [--json FILE]

Both read the same 500×375 JPEGs (made here: noise with the spectrum of natural pictures, 60 to 90 KB each) from the
page cache with the same number of workers, decode, crop, scale and flip them, and hand normalised float32 batches of
224×224 to the training process. Each contender is a process of its own; in each round each takes one turn, in a new
order, while the others and their workers stand still. A turn first uses up what was loaded ahead, then is timed.

Each scales by its own default: albumentations by OpenCV's bilinear filter, torchvision by one that also averages.
Memory is the workers' PSS: what is shared is divided among those who share it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import psutil
from harness import Goal, Row, finish, parse_arguments
from workloads.readers import Work, ours, start, torchvision_v1, torchvision_v2
from workloads.turns import Contender, contenders

HEIGHT, WIDTH, QUALITY = 375, 500, 90
BATCH_SIZE = 32
GOAL = Goal("torchvision", 1.3)
CASES = (("train", "random crop and flip"), ("val", "centre crop"))
LOADED_AHEAD = 5
"""Batches per worker that a turn uses up first: `fit` loads four ahead, the DataLoader two."""
PACKAGES = ("torch", "torchvision", "albumentations", "opencv-python-headless", "pillow")
CONTENDERS: dict[str, Callable[[Work], None]] = {
    "ours": ours,
    "torchvision": torchvision_v1,
    "torchvision v2": torchvision_v2,
}


def main() -> None:
    arguments = parse_arguments(__doc__)
    # Contenders are killed in the end, and Python's tracker would list the semaphores they leave.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    rounds, batches, num_pictures = (3, 10, 96) if arguments.quick else (9, 30, 384)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = make_pictures(Path(folder), num_pictures)
        for split, name in CASES[: 1 if arguments.quick else None]:
            work = Work(folder, split, BATCH_SIZE, workers=len(os.sched_getaffinity(0)))
            speed, memory = measure(work, Path(folder), rounds, batches)
            notes = {"workers": work.workers, "batch_size": BATCH_SIZE, "kilobytes_per_picture": kilobytes}
            rows.append(Row(name, "pictures/s", speed.pop("ours"), speed, "higher", GOAL, notes))
            rows.append(Row(f"{name}: memory of the workers", "MB", memory.pop("ours"), memory, "lower", None, notes))
    finish("Data loading", rows, arguments.json, PACKAGES)


def measure(
    work: Work, folder: Path, rounds: int, batches: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Pictures per second, and MB of the workers, of each contender in each round."""
    speed: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    # Fresh interpreters: a contender's workers hold what it imports itself, and share nothing with the others.
    context = multiprocessing.get_context("spawn")
    targets = {name: partial(start, contender, work) for name, contender in CONTENDERS.items()}
    with contenders(context, targets, folder) as started:  # type: ignore[arg-type]
        for contender in started.values():
            contender.pause()
        for _ in range(rounds):
            for name, contender in random.sample(list(started.items()), len(started)):
                seconds = contender.turn(warmup=LOADED_AHEAD * work.workers, steps=batches)
                speed[name].append(batches * work.batch_size / seconds)
                memory[name].append(workers_megabytes(contender))
    return speed, memory


def workers_megabytes(contender: Contender) -> float:
    workers = psutil.Process(contender.process.pid).children(recursive=True)
    return sum(worker.memory_full_info().pss for worker in workers) / 1e6


def make_pictures(folder: Path, number: int) -> float:
    """`train/<class>/*.jpg`, and `val` as a link to it; returns the median size in KB."""
    draw = np.random.default_rng(0)
    sizes = []
    for index in range(number):
        path = folder / "train" / f"class{index % 8}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), make_picture(draw), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        sizes.append(path.stat().st_size / 1000)
    (folder / "val").symlink_to(folder / "train")
    return round(statistics.median(sizes), 1)


def make_picture(draw: np.random.Generator) -> np.ndarray:
    """[HEIGHT, WIDTH, 3] uint8 whose amplitudes fall with the frequency, as those of photographs do."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1

    def plane(exponent: float) -> np.ndarray:
        phases = draw.normal(size=frequency.shape) + 1j * draw.normal(size=frequency.shape)
        values = np.fft.irfft2(phases / frequency**exponent, (HEIGHT, WIDTH))
        return (values - values.mean()) / values.std()

    # Photographs differ more in brightness than in colour.
    brightness = plane(1.25)
    channels = [118 + 50 * brightness + 15 * plane(1.5) for _ in range(3)]
    return np.clip(np.stack(channels, axis=-1), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
