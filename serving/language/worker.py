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

from msgspec.structs import replace

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's, for the whole group: the front says when to end
    line = Line(socket.socket(fileno=descriptor))
    load = line.receive()
    assert isinstance(load, Load)
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


def open_bundle(load: Load) -> tuple[Program, Batch, Ready]:
    """Verify, load, replay, and with that warm up. Raises ServingError."""
    started = time.monotonic()
    bundle = Bundle.read(load.path)
    if bundle.version != load.version:
        raise BadBundle(f"{load.path}: holds version {bundle.version}, not {load.version}: it was replaced meanwhile")
    bundle.verify()
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
    prompts = golden.read(bundle)
    if wrong := {entry.adapter for entry in prompts} - {None, *bundle.adapters}:
        raise BadBundle(f"{load.path}: golden prompts of an adapter that is not there: {sorted(map(str, wrong))}")
    replayed = golden.replay(program, batch, prompts, bundle.golden.tolerance)
    longest = max((len(token) for token in program.tokenizer.get_vocab()), default=1)
    seconds = time.monotonic() - started
    return program, batch, Ready(program.context, cells, longest, replayed.deviation, replayed.count, seconds)


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

    if ask.messages is not None:
        field, tokens = "messages", program.encode_chat(ask.messages)
    elif isinstance(ask.prompt, list):
        field, tokens = "prompt", ask.prompt
        if not all(0 <= token < program.vocabulary for token in tokens):
            raise BadInput(field, f"a token that this model does not have; it has 0 to {program.vocabulary - 1}")
    else:
        field, tokens = "prompt", program.encode(ask.prompt or "")
    if not tokens:
        raise BadInput(field, "has no tokens")
    room_left = program.context - len(tokens)
    wanted = ask.sampling.max_tokens
    if room_left < max(wanted, 1):
        rest = f" and {wanted} more are asked for" if wanted else ""
        raise BadInput(field, f"has {len(tokens)} tokens{rest}; this model takes {program.context} in all")
    if wrong := [token for token in ask.sampling.logit_bias if not 0 <= token < program.vocabulary]:
        raise BadInput("logit_bias", f"token {wrong[0]} is not there; the model has 0 to {program.vocabulary - 1}")
    sampling = replace(ask.sampling, max_tokens=wanted or room_left)
    return Sequence(ask.id, list(tokens), Chooser(sampling), ask.adapter)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
