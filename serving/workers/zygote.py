"""The process that workers are forked from: everything is imported, nothing has been computed.

`python -m serving.workers.zygote FD PARENT` takes orders from the packet socket FD, each with the worker's end of its
connection to the front, and ends when that is closed. The front, not this process, becomes the worker's parent: so a
worker lives and dies with the front alone. This process must never compute in parallel (a thread pool does not survive
a fork) nor touch an accelerator.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
from contextlib import suppress
from typing import NoReturn

import msgspec

from serving.workers import kinship
from serving.workers.messages import Refused, encode

ORDER_BYTES = 1 << 16


class Order(msgspec.Struct):
    """Fork a worker."""

    modules: list[str]
    """Imported first, here, so that the next worker has them."""


def main(descriptor: int, parent: int) -> None:
    """Import, then fork on demand."""
    kinship.die_with(parent)
    kinship.ignore_the_terminal()
    control = socket.socket(fileno=descriptor)
    importlib.import_module("serving.workers.process")
    decoder = msgspec.json.Decoder(Order)
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, ORDER_BYTES, 1)
        if not data:
            return
        with socket.socket(fileno=descriptors[0]) as end:
            _obey(decoder.decode(data), end, control, parent)


def _obey(order: Order, end: socket.socket, control: socket.socket, front: int) -> None:
    try:
        for name in order.modules:
            if name not in sys.modules:
                _import(name)
        _fork(end, control, front)
    except Exception as error:  # a library that is missing or broken, or no memory for a process: the front decides
        reason = f"can't start a worker: {type(error).__name__}: {error}".partition("\n")[0]
        with suppress(OSError):
            end.sendall(encode(Refused(reason, False)))


def _import(name: str) -> None:
    importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each worker would copy all of this memory, only to look for garbage in it


def _fork(end: socket.socket, control: socket.socket, front: int) -> None:
    """Fork twice: the child between ends at once, and the front adopts the worker."""
    gate, opens = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            worker = os.fork()
        except OSError:
            os._exit(1)
        if worker:
            os._exit(0)
        os.close(opens)
        control.close()
        _become_worker(end, gate, front)
    os.close(gate)
    _, status = os.waitpid(between, 0)
    os.close(opens)  # the worker may look who its parent is
    if status:
        raise OSError("no memory or no number for another process")


def _become_worker(end: socket.socket, gate: int, front: int) -> NoReturn:
    code = 1
    try:
        os.read(gate, 1)
        os.close(gate)
        kinship.die_with(front)
        from serving.workers.process import work

        code = work(end)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        # Without tearing the interpreter down: what was forked is not this process's to destroy, and takes its time.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
