"""`Saver`, as `trainer fit` calls it, beside the steps of `Engine`; and plain `torch.save` in its place."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from trainer import state
from trainer.checkpoint import Manifest
from trainer.component import Component
from trainer.config import Checkpoint, Train
from trainer.engine import Engine
from trainer.saving import Saver
from trainer.state import Progress
from trainer.world import World
from workloads.saves import BATCH, WIDTH, Clock, build, optimizer, sync


def run(variant: str, megabytes: int, folder: Path, clock: Clock) -> None:
    engine = Engine(Component("strategy", "single", {}), Train(device="cpu"), World())
    engine.setup(build(megabytes), lambda model: [optimizer(model)])
    images, progress = torch.randn(BATCH, WIDTH), Progress()
    save = {"saver": _by_saver, "torch.save": _by_torch}[variant](engine, folder, clock, progress)
    clock.first_step()
    while True:
        clock.tick()
        engine.backward(engine.model(images).square().mean(), 1.0)
        engine.step()
        progress.step += 1
        if clock.wants_save:
            save()


def _by_saver(engine: Engine, folder: Path, clock: Clock, progress: Progress) -> Callable[[], None]:
    saver = Saver(folder / "checkpoints", Checkpoint(keep=1), engine)

    def one() -> float:
        began = time.perf_counter()
        saver.save(state.capture(engine, None, progress), Manifest(progress.step, progress.consumed, 1, False, {}))
        return time.perf_counter() - began

    def watch() -> None:
        saver.wait()
        clock.is_durable()

    def save() -> None:
        began = time.perf_counter()
        stall, second = one(), 0.0
        if clock.is_twice:
            progress.step += 1
            second = one()
        clock.saved(began, stall, second)
        threading.Thread(target=watch).start()

    return save


def _by_torch(engine: Engine, folder: Path, clock: Clock, progress: Progress) -> Callable[[], None]:
    """Into a file beside, which then takes the name, as one does who has lost a checkpoint once."""
    final = folder / "state.pt"

    def one() -> float:
        began = time.perf_counter()
        unfinished = folder / "unfinished.pt"
        torch.save({"model": engine.bare.state_dict(), "optimizer": engine.optimizers[0].state_dict()}, unfinished)
        os.replace(unfinished, final)
        return time.perf_counter() - began

    def save() -> None:
        began = time.perf_counter()
        stall = one()
        second = one() if clock.is_twice else 0.0
        clock.saved(began, stall, second)
        sync(final)
        clock.is_durable()

    return save
