"""The process of an engine: it loads a bundle's model, proves that it answers as in training, and answers.

Started with the number of a socket that it has inherited. One thread reads requests and turns them into tokens; the
main one computes. It ends when the socket is closed.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from serving.bundle import Bundle
from serving.errors import BadBundle, BadInput, Mistake, ServingError
from serving.language.memory import room
from serving.language.messages import (
    LENGTH,
    Ask,
    Begun,
    Cancel,
    Denied,
    Load,
    Message,
    Part,
    Ready,
    Refused,
    Step,
    decode,
    encode,
)

if TYPE_CHECKING:
    from serving.language.batch import Batch, Sequence
    from serving.language.program import Program
    from serving.language.speaking import Speaker


class Line:
    """The socket to the front; several threads may send."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Raises OSError when the front is gone."""
        with self._lock:
            self._connection.sendall(encode(message))

    def receive(self) -> Any:
        """The next message. Raises EOFError when the front is gone."""
        return decode(self._exactly(LENGTH.unpack(self._exactly(LENGTH.size))[0]))

    def _exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._connection.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)


def main(descriptor: int) -> int:
    """Serve until the front closes the socket; 1 where the bundle can't be served."""
    line, load = inherited(descriptor)
    try:
        program, batch, ready = open_bundle(load)
    except (ServingError, MemoryError) as error:
        line.send(Refused(str(error) or "out of memory", isinstance(error, Mistake)))
        return 1
    except Exception:
        traceback.print_exc()
        line.send(Refused(f"{load.path}: can't be loaded; see the log", False))
        return 1
    line.send(ready)
    Engine(line, program, batch).run()
    return 0


def inherited(descriptor: int) -> tuple[Line, Load]:
    """The socket that this process was started with, and what it is to serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, for the whole group: the front says when to end
    line = Line(socket.socket(fileno=descriptor))
    load = line.receive()
    assert isinstance(load, Load)
    return line, load


def open_bundle(load: Load) -> tuple[Program, Batch, Ready]:
    """Verify, load, replay, and with that warm up. Raises ServingError."""
    started = time.monotonic()
    bundle = verified(load)
    import torch

    from serving.language import golden
    from serving.language.batch import Batch
    from serving.language.program import Program

    torch.set_num_threads(load.threads)
    folders = {name: bundle.path / folder for name, folder in bundle.adapters.items()}
    program = Program(bundle.path / bundle.program.file, folders, bundle.program.dtype, load.device)
    cells = room(program, load.cells, load.max_rows)
    program.context = min(program.context, cells)
    batch = Batch(program, load.max_rows, cells, load.chunk)
    replayed = golden.replay(program, batch, golden.read(bundle), bundle.golden.tolerance)
    seconds = time.monotonic() - started
    return (
        program,
        batch,
        Ready(program.context, cells, program.longest_token, replayed.deviation, replayed.count, seconds),
    )


def verified(load: Load) -> Bundle:
    """The bundle, each file compared with its hash. Raises BadBundle."""
    bundle = Bundle.read(load.path)
    if bundle.version != load.version:
        raise BadBundle(f"{load.path}: holds version {bundle.version}, not {load.version}: it was replaced meanwhile")
    bundle.verify()
    return bundle


class Engine:
    """Requests in, tokens out."""

    def __init__(self, line: Line, program: Program, batch: Batch) -> None:
        self._line, self._program, self._batch = line, program, batch
        self._inbox: queue.SimpleQueue[Sequence | int] = queue.SimpleQueue()
        """A sequence to begin, or the number of one to end."""
        self._speakers: dict[int, Speaker] = {}

    def run(self) -> None:
        """Until the socket is closed."""
        threading.Thread(target=self._listen, name="requests", daemon=True).start()
        while True:
            self._take()
            made = self._batch.step()
            parts: list[Part] = []
            for entry in made:
                part = self._speakers[entry.sequence.id].say(entry)
                if part.finish is not None:
                    self._batch.remove(entry.sequence)
                    del self._speakers[entry.sequence.id]
                parts.append(part)
            self._line.send(Step(parts, self._batch.running, len(self._batch.waiting)))

    def _take(self) -> None:
        """What has come in; waits where there is nothing to do."""
        from serving.language.speaking import Speaker

        while self._batch.is_idle or not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, int):
                speaker = self._speakers.pop(item, None)
                if speaker is not None:
                    self._batch.remove(speaker.sequence)
            else:
                self._speakers[item.id] = Speaker(item, self._program.tokenizer)
                self._batch.add(item)

    def _listen(self) -> None:
        try:
            while True:
                message = self._line.receive()
                if isinstance(message, Cancel):
                    self._inbox.put(message.id)
                    continue
                assert isinstance(message, Ask)
                try:
                    sequence = prepare(message, self._program)
                except BadInput as error:
                    self._line.send(Denied(message.id, error.field, error.message))
                    continue
                except Exception:  # one text that a tokenizer stumbles over must not end the others' answers
                    traceback.print_exc()
                    self._line.send(Denied(message.id, "", "the prompt can't be read"))
                    continue
                self._line.send(Begun(message.id, sequence.prompt))
                self._inbox.put(sequence)
        except (EOFError, OSError):  # the front is gone, and with it everybody who waits for an answer
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def prepare(ask: Ask, program: Program) -> Sequence:
    """The sequence of a request. Raises BadInput for what does not fit the model."""
    from serving.language.batch import Sequence
    from serving.language.choosing import Chooser

    tokens, sampling = program.parse(ask)
    return Sequence(ask.id, tokens, Chooser(sampling), ask.adapter)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
