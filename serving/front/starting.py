"""Brings models up: those of `serving.workers`, and language models."""

from __future__ import annotations

import argparse
from pathlib import Path

from serving.bundle import Bundle
from serving.front.metrics import Metrics
from serving.front.served import Model, Served, is_language
from serving.workers import model as workers
from serving.workers.nursery import Nursery
from serving.workers.settings import Settings


class Starter:
    """Starts models by the options, and ends what they share."""

    def __init__(self, args: argparse.Namespace, metrics: Metrics) -> None:
        self._args, self._metrics = args, metrics
        self._nursery: Nursery | None = None

    async def start(self, places: list[tuple[str, Path]], served: Served) -> None:
        """One after the other, into `served`. Raises ServingError for the first that can't be served."""
        for name, path in places:
            start = self._language if is_language(Bundle.read(path)) else self._program
            served.add(await start(name, path))

    async def close(self) -> None:
        """End what the models share; they are closed already, or never came up."""
        if self._nursery is not None:
            await self._nursery.close()

    async def _program(self, name: str, path: Path) -> Model:
        args = self._args
        settings = Settings(
            workers=args.workers,
            threads=args.threads,
            cores=args.cores,
            max_batch=args.max_batch,
            max_wait=args.max_wait_ms / 1e3,
            queue=args.queue,
            drain_seconds=args.drain_seconds,
            device=args.device,
        )
        if self._nursery is None:
            self._nursery = Nursery.open(self._args.max_pixels)
        return await workers.start(name, path, settings, self._metrics, self._nursery)

    async def _language(self, name: str, path: Path) -> Model:
        from serving.language import model as language
        from serving.language.settings import LanguageSettings

        args = self._args
        settings = LanguageSettings(
            threads=args.threads,
            cores=args.cores,
            max_rows=args.max_rows,
            queue=args.language_queue,
            kv_tokens=args.kv_tokens,
            deadline=args.language_deadline_ms / 1e3,
            drain_seconds=args.drain_seconds,
            device=args.device,
        )
        return await language.start(name, path, settings, self._metrics)
