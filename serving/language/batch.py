"""Continuous batching: sequences join and leave the running batch between two tokens.

A sequence waits, is read (its prompt, a part at a time, so that the others' tokens keep coming), and then has a row in
the batch of its adapter. Memory for keys and values is bounded: where a row needs more than there is, the sequence
that came last gives up its own and is read again later, with what it has said so far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import DynamicCache

from serving.language.choosing import Chooser, Chosen, choose
from serving.language.program import Program
from serving.language.rows import GRAIN, Rows


@dataclass(eq=False)
class Sequence:
    """A prompt and what was said to it so far."""

    id: int
    tokens: list[int]
    chooser: Chooser
    adapter: str | None = None
    prompt: int = 0
    """Tokens of the prompt, which `tokens` begins with."""
    cache: DynamicCache | None = None
    """While it is read."""
    read: int = 0
    """Tokens that were read into `cache`."""

    def __post_init__(self) -> None:
        self.prompt = self.prompt or len(self.tokens)

    @property
    def made(self) -> int:
        """Tokens that were said."""
        return len(self.tokens) - self.prompt


@dataclass(frozen=True)
class Made:
    """A token that a sequence has got in this step."""

    sequence: Sequence
    chosen: Chosen
    finish: str | None
    """`stop` at a token that ends an answer, `length` at a bound; None where it goes on."""


@dataclass
class Pool:
    """The running sequences of one adapter, in the order of their rows."""

    rows: Rows
    sequences: list[Sequence] = field(default_factory=list)


class Batch:
    """All sequences of an engine. Not for several threads."""

    def __init__(self, program: Program, max_rows: int, cells: int, chunk: int = 256) -> None:
        """Args:
        max_rows: sequences that run at once.
        cells: tokens for which there is memory, all rows padded to the longest of their adapter's.
        chunk: tokens of prompts that are read between two tokens of the running ones.
        """
        self.program, self.max_rows, self.cells, self.chunk = program, max_rows, cells, chunk
        self.waiting: deque[Sequence] = deque()
        self._reading: Sequence | None = None
        self._pools: dict[str | None, Pool] = {}
        self.given_up = 0
        """Times that a sequence had to give up its row for others."""

    @property
    def running(self) -> int:
        """Sequences that are read or have a row."""
        return sum(len(pool.sequences) for pool in self._pools.values()) + (self._reading is not None)

    @property
    def is_idle(self) -> bool:
        """Nothing to do."""
        return not self.waiting and not self.running

    def pools(self) -> list[Pool]:
        """The running sequences by adapter."""
        return list(self._pools.values())

    def add(self, sequence: Sequence) -> None:
        """Let it wait for its turn."""
        self.waiting.append(sequence)

    @torch.inference_mode()
    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if self._reading is sequence:
            self._reading, sequence.cache = None, None
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            pool = self._pools.get(sequence.adapter)
            if pool is not None and sequence in pool.sequences:
                _leave(pool, sequence)

    @torch.inference_mode()
    def step(self) -> list[Made]:
        """Read the next part of a prompt, and make a token for each running sequence."""
        made = list(self._read())
        joined = {entry.sequence for entry in made}
        self._make_room()
        for adapter, pool in self._pools.items():
            if pool.sequences:
                self.program.select(adapter)
                logits = self.program.step([sequence.tokens[-1] for sequence in pool.sequences], pool.rows)
                chosen = choose(logits, [sequence.chooser for sequence in pool.sequences])
                made += [self._told(s, c) for s, c in zip(list(pool.sequences), chosen, strict=True)]
        for entry in made:
            if entry.finish is not None and entry.sequence not in joined:
                self.remove(entry.sequence)
        return made

    def _read(self) -> Iterator[Made]:
        """Read up to `chunk` tokens of what waits; gives the first token of those that are read to the end."""
        left = self.chunk
        while left > 0:
            if self._reading is None:
                if not self._may_begin():
                    return
                self._reading = self.waiting.popleft()
                self._reading.cache, self._reading.read = DynamicCache(), 0
            sequence = self._reading
            assert sequence.cache is not None
            part = sequence.tokens[sequence.read : sequence.read + left]
            self.program.select(sequence.adapter)
            logits = self.program.read(part, sequence.cache)
            sequence.read += len(part)
            left -= len(part)
            if sequence.read == len(sequence.tokens):
                if not self._make_room(sequence):
                    self._reading, sequence.cache = None, None
                    self.waiting.appendleft(sequence)
                    return
                yield self._join(sequence, choose(logits, [sequence.chooser])[0])

    def _join(self, sequence: Sequence, chosen: Chosen) -> Made:
        assert sequence.cache is not None
        cache, sequence.cache = sequence.cache, None
        self._reading = None
        made = self._told(sequence, chosen)
        if made.finish is None:
            pool = self._pool(sequence.adapter)
            pool.rows.join(cache, sequence.read)
            pool.sequences.append(sequence)
        return made

    def _told(self, sequence: Sequence, chosen: Chosen) -> Made:
        sequence.tokens.append(chosen.token)
        sampling = sequence.chooser.sampling
        finish = None
        if chosen.token in self.program.ends and not sampling.ignore_eos:
            finish = "stop"
        elif sequence.made >= sampling.max_tokens or len(sequence.tokens) >= self.program.context:
            finish = "length"
        return Made(sequence, chosen, finish)

    def _pool(self, adapter: str | None) -> Pool:
        return self._pools.setdefault(adapter, Pool(self.program.rows()))

    def _may_begin(self) -> bool:
        if not self.waiting or self.running >= self.max_rows:
            return False
        # One alone always fits: requests are bounded by `cells`. Beside others it must be able to stay for a while.
        return not self.running or self._cells(self.waiting[0], GRAIN) <= self.cells

    def _cells(self, joining: Sequence | None, more: int) -> int:
        """Tokens there would be memory for with `joining` in its pool and `more` tokens in each row."""
        total = 0
        joins = None if joining is None else self._pool(joining.adapter)
        for pool in self._pools.values():
            lengths = [length + more for length in pool.rows.lengths]
            if joining is not None and pool is joins:
                lengths.append(len(joining.tokens) + more)
            if lengths:
                total += pool.rows.cells_for(len(lengths), max(lengths))
        return total

    def _make_room(self, joining: Sequence | None = None) -> bool:
        """Let the sequences that came last give up their rows until there is memory for a token more in each.

        False where `joining` would have to give up its own.
        """
        while self._cells(joining, 1) > self.cells:
            running = [sequence for pool in self._pools.values() for sequence in pool.sequences]
            if len(running) + (joining is not None) <= 1:
                break
            last = max([*running, *([joining] if joining is not None else [])], key=lambda sequence: sequence.id)
            self.given_up += 1
            if last is joining:
                return False
            _leave(self._pools[last.adapter], last)
            self.waiting.appendleft(last)
        return True


def _leave(pool: Pool, sequence: Sequence) -> None:
    """Take a sequence out of its row; the last row's takes its place."""
    row = pool.sequences.index(sequence)
    pool.rows.leave(row)
    pool.sequences[row] = pool.sequences[-1]
    pool.sequences.pop()
