"""A worker: loads a bundle, proves that it answers as in training, then answers batches until it is told to end."""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable

from serving.bundle import Bundle
from serving.errors import BadBundle, Mistake, ServingError
from serving.predictor import Predictor, read_golden
from serving.workers.messages import (
    Answer,
    Batch,
    End,
    Load,
    Message,
    Ready,
    Refused,
    Verified,
    decode,
    encode,
    pack,
    unpack,
)
from serving.workers.wire import Reader

REQUEST_SECONDS = 0.0002
"""What a request costs the front, about: it takes in a batch of n in n times as long."""
WARM_UPS = 3
"""Of each batch size: the first run of a shape allocates, and may choose its kernels."""


class Channel:
    """The worker's end of its connection."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._reader = Reader()
        self._waiting: deque[tuple[Message, memoryview]] = deque()

    def send(self, message: bytes) -> None:
        self._end.sendall(message)

    def receive(self) -> tuple[Message, memoryview] | None:
        """The next message; None where the front is gone."""
        while not self._waiting:
            count = self._end.recv_into(self._reader.space())
            if not count:
                return None
            self._waiting.extend((decode(header), body) for header, body in self._reader.received(count))
        return self._waiting.popleft()


def work(end: socket.socket) -> int:
    """Serve over `end`; returns the exit code."""
    channel = Channel(end)
    try:
        order = channel.receive()
        if order is None or not isinstance(order[0], Load):
            return 0
        predictor = _prepare(order[0], channel)
        if predictor is None:
            return 0
        _answer(predictor, channel)
    except (BrokenPipeError, ConnectionResetError):  # the front is gone
        return 0
    return 0


def _prepare(load: Load, channel: Channel) -> Predictor | None:
    started = time.perf_counter()
    inherited = set(sys.modules)
    try:
        bundle = Bundle.read(load.path)
        if bundle.version != load.version:
            raise BadBundle(f"{load.path}: holds version {bundle.version} by now, not {load.version}; reload it")
        if load.verify:
            bundle.verify()
            channel.send(encode(Verified()))
        predictor, threads = _open(bundle, load)
        replay = predictor.replay()
        if not replay.ok:
            raise ServingError(
                f"{load.path}: does not answer as it did in training: the largest deviation of {replay.count} golden "
                f"requests is {replay.deviation:.3g}, and {replay.tolerance:.3g} is allowed"
            )
        run = _runs(predictor)
        for size in sorted({1, load.max_batch}):
            for _ in range(WARM_UPS):
                run(size)
    except ServingError as error:
        channel.send(encode(Refused(str(error), isinstance(error, Mistake))))
        return None
    except ConnectionError:
        raise
    except Exception as error:  # of whatever runs the program; the front tells it, the log has all of it
        traceback.print_exc()
        text = str(error).partition("\n")[0]
        channel.send(encode(Refused(f"{load.path}: can't be loaded: {type(error).__name__}: {text}", False)))
        return None
    gc.collect()
    gc.freeze()  # what is loaded stays: no collection needs to look at it again
    imported = [name for name in sys.modules if name not in inherited]
    channel.send(encode(Ready(time.perf_counter() - started, replay.deviation, replay.count, threads, imported)))
    return predictor


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    torch = sys.modules.get("torch")
    return "cuda" if torch is not None and torch.cuda.is_available() else "cpu"


def _open(bundle: Bundle, load: Load) -> tuple[Predictor, int]:
    """The predictor, and its threads: one where more would only take the front's core."""
    device = _device(load.device)
    if load.may_use_one and load.threads > 1:
        predictor = Predictor.open(bundle, 1, device)
        if is_light(_runs(predictor), load.max_batch):
            return predictor, 1
    os.environ["OMP_NUM_THREADS"] = str(load.threads)
    return Predictor.open(bundle, load.threads, device), load.threads


def is_light(run: Callable[[int], object], max_batch: int) -> bool:
    """Whether a full batch takes no longer than the front takes to receive it, so that the front is what limits."""
    enough = max_batch * REQUEST_SECONDS

    def seconds(size: int) -> float:
        started = time.perf_counter()
        run(size)
        return time.perf_counter() - started

    # A model for which one sample is too much is not asked for a batch.
    return all(min(seconds(size) for _ in range(WARM_UPS)) <= enough for size in (1, max_batch))


def _runs(predictor: Predictor) -> Callable[[int], object]:
    """What runs a batch of a size, made of golden requests."""
    requests, _ = read_golden(predictor.bundle)
    samples = [predictor.parse(request, "golden") for request in requests]
    return lambda size: predictor.predict((samples * (size // len(samples) + 1))[:size])


def _answer(predictor: Predictor, channel: Channel) -> None:
    while (received := channel.receive()) is not None:
        message, body = received
        if isinstance(message, End):
            return
        assert isinstance(message, Batch)
        started = time.perf_counter()
        samples = unpack(message.parts, body)
        rows = predictor.predict(samples)  # type: ignore[arg-type]  # only samples travel this way
        for row in rows:
            if isinstance(row, Exception):
                _log(row)
        parts, buffers, size = pack(rows)
        channel.send(encode(Answer(time.perf_counter() - started, parts), buffers, size))


def _log(error: Exception) -> None:
    from serving.errors import BadInput

    if not isinstance(error, BadInput):
        print("serving: the model failed on an instance:", file=sys.stderr)
        traceback.print_exception(error)
