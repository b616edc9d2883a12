"""Continuous batching: every sequence gets the tokens that it would get alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import language_bundles
import pytest
import torch
from lm import tiny

from serving.errors import BadBundle, ServingError
from serving.language import golden
from serving.language.batch import Batch, Sequence
from serving.language.choosing import Chooser, choose
from serving.language.program import Program
from serving.language.sampling import Sampling

ADAPTERS = ("red", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_bundles.write(tmp_path_factory.mktemp("bundle"), adapters=ADAPTERS).path


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return Program(folder / "model", {name: folder / "adapters" / name for name in ADAPTERS}, "float32")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str | None, Any]:
    return {name: language_bundles.reference(folder, name) for name in (None, *ADAPTERS)}


def _prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 200) for _ in range(draw.choice([1, 2, 7, 30, 90]))] for _ in range(count)]


def _greedy(number: int, prompt: list[int], count: int, adapter: str | None = None, **options: Any) -> Sequence:
    sampling = Sampling(max_tokens=count, temperature=0, **options)
    return Sequence(number, list(prompt), Chooser(sampling), adapter)


def _run(batch: Batch, sequences: list[Sequence], every: int = 0) -> dict[int, str]:
    """Add them, all at once or one each `every` steps, and run to the end; how each has ended."""
    todo, finished, steps = list(sequences), {}, 0
    while todo or not batch.is_idle:
        while todo and (not every or steps % every == 0):
            batch.add(todo.pop(0))
            if every:
                break
        finished |= {made.sequence.id: made.finish for made in batch.step() if made.finish is not None}
        steps += 1
        assert steps < 5000
    return finished


@pytest.fixture(scope="module")
def answered(references: dict[str | None, Any]) -> list[tuple[list[int], str | None, list[int]]]:
    """Prompts, their adapters, and what plain `generate` says."""
    asked = [(prompt, (None, *ADAPTERS)[index % 3]) for index, prompt in enumerate(_prompts(9, seed=0))]
    return [(p, adapter, language_bundles.greedy(references[adapter], p, 16)) for p, adapter in asked]


@pytest.mark.parametrize(
    ("max_rows", "cells", "chunk", "every"),
    [(16, 100_000, 256, 0), (3, 100_000, 5, 3), (16, 2_000, 7, 0), (16, 500, 16, 2), (1, 200, 64, 0)],
)
def test_ragged_sequences_get_the_tokens_of_plain_generate(
    max_rows: int,
    cells: int,
    chunk: int,
    every: int,
    program: Program,
    answered: list[tuple[list[int], str | None, list[int]]],
) -> None:
    batch = Batch(program, max_rows, cells, chunk)
    sequences = [_greedy(number, prompt, 16, adapter) for number, (prompt, adapter, _) in enumerate(answered)]
    finished = _run(batch, sequences, every)
    assert [sequence.tokens[sequence.prompt :] for sequence in sequences] == [wanted for *_, wanted in answered]
    for sequence in sequences:
        ended = sequence.tokens[-1] in program.ends
        assert finished[sequence.id] == ("stop" if ended else "length")
    assert batch.running == 0 and all(not pool.rows.lengths and pool.rows.cells == 0 for pool in batch.pools())


def test_who_came_last_gives_up_its_row_and_loses_no_token(program: Program, references: dict[str | None, Any]) -> None:
    prompts = [prompt[:5] for prompt in _prompts(4, seed=4)]
    sequences = [_greedy(number, prompt, 140, ignore_eos=True) for number, prompt in enumerate(prompts)]
    batch = Batch(program, 8, 600, 64)
    _run(batch, sequences)
    assert batch.given_up > 0
    for sequence, prompt in zip(sequences, prompts, strict=True):
        wanted = language_bundles.greedy(references[None], prompt, 140, eos_token_id=None)
        assert sequence.tokens[sequence.prompt :] == wanted


def test_memory_stays_within_its_bound(program: Program) -> None:
    batch = Batch(program, 16, 700, 32)
    for number, prompt in enumerate(_prompts(12, seed=3)):
        batch.add(_greedy(number, prompt, 60, ignore_eos=True))
    while not batch.is_idle:
        batch.step()
        rows = [pool.rows for pool in batch.pools()]
        assert sum(part.cells for part in rows) <= 700 or sum(len(part.lengths) for part in rows) == 1


def test_sequences_may_leave_at_any_time(program: Program, references: dict[str | None, Any]) -> None:
    prompts = _prompts(8, seed=5)
    sequences = [_greedy(n, p, 24, ignore_eos=True) for n, p in enumerate(prompts)]
    batch = Batch(program, 6, 100_000, 16)
    for sequence in sequences:
        batch.add(sequence)
    gone = set()
    while not batch.is_idle:
        batch.step()
        # Not the last row: another one has to move.
        running = [s for pool in batch.pools() for s in pool.sequences[:-1] if s.id % 2 == 0 and s.made > 2]
        if running:
            batch.remove(running[0])
            gone.add(running[0].id)
    assert len(gone) >= 2
    for sequence in (s for s in sequences if s.id not in gone):
        wanted = language_bundles.greedy(references[None], prompts[sequence.id], 24, eos_token_id=None)
        assert sequence.tokens[sequence.prompt :] == wanted


def test_a_seed_draws_the_same_whoever_is_in_the_batch(program: Program) -> None:
    prompts = _prompts(5, seed=9)

    def drawn(company: int, seed: int | None) -> list[int]:
        sampling = Sampling(max_tokens=16, temperature=1.3, top_p=0.9, top_k=40, seed=seed, ignore_eos=True)
        sequence = Sequence(0, list(prompts[0]), Chooser(sampling))
        others = [_greedy(n, prompts[n], 30, ignore_eos=True) for n in range(1, company)]
        _run(Batch(program, 8, 100_000), [*others, sequence])
        return sequence.tokens[sequence.prompt :]

    assert drawn(1, 11) == drawn(5, 11) == drawn(2, 11) != drawn(1, 12)
    assert drawn(1, None) != drawn(1, None)


def _draw(logits: list[float], count: int = 400, **options: Any) -> list[int]:
    chooser = Chooser(Sampling(max_tokens=1, seed=0, **options))
    row = torch.tensor([logits])
    return [choose(row, [chooser])[0].token for _ in range(count)]


def test_sampling_leaves_out_what_it_should() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert set(_draw(logits)) == {0, 1, 2, 3}
    assert set(_draw(logits, top_k=2)) == {0, 1}
    assert set(_draw(logits, top_p=0.8)) == {0, 1}
    assert set(_draw(logits, top_p=0.81)) == {0, 1, 2}
    assert set(_draw(logits, min_p=0.25)) == {0, 1, 2}
    assert set(_draw(logits, top_p=1e-9)) == {0}
    assert set(_draw(logits, temperature=0)) == {0} and set(_draw(logits, temperature=0.01)) == {0}
    share = _draw(logits, count=4000).count(0) / 4000
    assert 0.46 < share < 0.54


def test_penalties_and_biases_move_the_choice() -> None:
    logits = [2.0, 1.5, 0.0]
    assert _draw(logits, 3, temperature=0) == [0, 0, 0]
    assert _draw(logits, 3, temperature=0, presence_penalty=1.0) == [0, 1, 0]
    assert _draw(logits, 4, temperature=0, frequency_penalty=0.4) == [0, 0, 1, 0]
    assert _draw(logits, 2, temperature=0, logit_bias={2: 10.0}) == [2, 2]
    assert set(_draw(logits, logit_bias={0: -100.0, 1: -100.0})) == {2}


def test_log_probabilities_are_the_model_s_own() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    wanted = logits[0].log_softmax(-1).tolist()
    (chosen,) = choose(logits, [Chooser(Sampling(max_tokens=1, temperature=0, logprobs=2, logit_bias={2: 10.0}))])
    assert chosen.token == 2 and chosen.logprob == pytest.approx(wanted[2])
    assert [token for token, _ in chosen.top] == [0, 1]
    assert [value for _, value in chosen.top] == pytest.approx(wanted[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [7] * 8}, "token 0 of the answer is"),
        ({"logprobs": [-9.0] * 8}, "deviate by"),
        ({"prompt": [5]}, "other tokens than the run's"),
    ],
)
def test_a_golden_prompt_that_is_answered_otherwise(
    change: dict[str, Any], message: str, folder: Path, program: Program
) -> None:
    from dataclasses import replace

    from serving.bundle import Bundle

    prompts = golden.read(Bundle.read(folder))
    batch = Batch(program, 16, 100_000)
    assert golden.replay(program, batch, prompts, 1e-3).deviation < 1e-4
    size = len(prompts[0].tokens)
    cut = {key: value[:size] for key, value in change.items()}
    with pytest.raises(ServingError, match=message):
        golden.replay(program, batch, [replace(prompts[0], **cut), *prompts[1:]], 1e-3)


def test_what_can_t_be_served_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadBundle, match="can't be loaded"):
        Program(tmp_path, {}, "float32")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(BadBundle, match=r"no adapter_model\.safetensors"):
        Program(folder / "model", {"a": tmp_path / "adapter"}, "float32")


def test_another_kind_of_attention_and_a_sliding_window(tmp_path: Path) -> None:
    """A mask that is added, and a context that ends where a window would begin to slide."""
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=384, num_key_value_heads=2, sliding_window=64, max_position_embeddings=512, eos_token_id=1, **shape
    )
    config._attn_implementation = "eager"
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    program = Program(tmp_path, {}, "float32")
    assert program.context == 64
    program.base.set_attn_implementation("eager")
    program.is_additive = True
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    prompts = [prompt[:40] for prompt in _prompts(4, seed=2)]
    sequences = [_greedy(n, prompt, 30, ignore_eos=True) for n, prompt in enumerate(prompts)]
    _run(Batch(program, 8, 100_000), sequences)
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.tokens[len(prompt) :] == language_bundles.greedy(
            model, prompt, min(30, 64 - len(prompt)), eos_token_id=None
        )
