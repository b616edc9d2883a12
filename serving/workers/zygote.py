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
from serving.workers.messages import Hello, Refused, encode

ORDER_BYTES = 1 << 17
NAMES_AT_ONCE = 1000
"""Modules in one order, which is one packet."""


class Order(msgspec.Struct):
    """Import, and fork a worker where a socket comes with the order."""

    modules: list[str]
    """What workers need. One that can't be imported here is left to them, who can say what they needed it for."""


def main(descriptor: int, parent: int) -> None:
    """Import, then obey."""
    kinship.die_with(parent)
    kinship.ignore_the_terminal()
    control = socket.socket(fileno=descriptor)
    _import(["serving.workers.process"])
    decoder = msgspec.json.Decoder(Order)
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, ORDER_BYTES, 1)
        if not data:
            return
        _import(decoder.decode(data).modules)
        for number in descriptors:
            with socket.socket(fileno=number) as end:
                _obey(end, control, parent)


def _import(names: list[str]) -> None:
    for name in names:
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each worker would copy all of this memory, only to look for garbage in it


def _obey(end: socket.socket, control: socket.socket, front: int) -> None:
    try:
        _fork(end, control, front)
    except OSError as error:
        with suppress(OSError):
            end.sendall(encode(Refused(f"can't start a worker: {error.strerror or error}", False)))


def _fork(end: socket.socket, control: socket.socket, front: int) -> None:
    """Fork twice: the child between ends at once, and the front adopts the worker.

    Then the front is told whom to wait for, here, since the worker may be killed before it could say so.
    """
    gate, opens = os.pipe()
    told, tells = os.pipe()
    try:
        between = os.fork()
    except OSError:
        for descriptor in (gate, opens, told, tells):
            os.close(descriptor)
        raise
    if between == 0:
        try:
            worker = os.fork()
        except OSError:
            os._exit(1)
        if worker:
            os.write(tells, worker.to_bytes(8, "little"))
            os._exit(0)
        for descriptor in (opens, told, tells):
            os.close(descriptor)
        control.close()
        _become_worker(end, gate, front)
    os.close(gate)
    os.close(tells)
    os.waitpid(between, 0)
    number = os.read(told, 8)
    os.close(told)
    if number:
        with suppress(OSError):  # the front is gone, or has changed its mind
            end.sendall(encode(Hello(int.from_bytes(number, "little"))))
    os.close(opens)  # the worker may look who its parent is, and speak
    if not number:
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
