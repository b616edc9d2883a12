"""The golden prompts of a bundle: answered again, by the engine that will answer its clients."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from serving.bundle import Bundle
from serving.errors import BadBundle, BadInput, ServingError
from serving.language.batch import Batch, Sequence
from serving.language.choosing import Chooser, Chosen
from serving.language.program import Program
from serving.language.prompts import Prompts
from serving.language.sampling import Sampling

MAX_STEPS = 100_000


@dataclass(frozen=True)
class Golden:
    """A request in OpenAI's form with the training run's own greedy answer."""

    request: dict[str, Any]
    adapter: str | None
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    """Of each token, under the run's model."""


@dataclass(frozen=True)
class Replayed:
    """How far the answers are from the run's."""

    count: int
    deviation: float
    """Largest |log-probability - the run's| / max(1, |the run's|), over tokens that are the same."""


def read(bundle: Bundle) -> list[Golden]:
    """Raises BadBundle where the file is damaged."""
    found = []
    try:
        for line in bundle.file(bundle.golden.file).read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            answer = entry["outputs"]
            golden = Golden(
                request=entry["request"],
                adapter=entry["adapter"],
                prompt=[int(token) for token in entry["prompt_ids"]],
                tokens=[int(token) for token in answer["token_ids"]],
                logprobs=[float(value) for value in answer["logprobs"]],
            )
            if not golden.prompt or not golden.tokens or len(golden.tokens) != len(golden.logprobs):
                raise ValueError("no prompt, or an answer whose tokens have no log-probabilities")
            if golden.adapter not in (None, *bundle.adapters):
                raise ValueError(f"a prompt of the adapter {golden.adapter!r}, which is not there")
            found.append(golden)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadBundle(f"{bundle.path}: {bundle.golden.file}: {error}; export the run again") from error
    if not found:
        raise BadBundle(f"{bundle.path}: {bundle.golden.file} has no prompts; export the run again")
    return found


def replay(program: Program, batch: Batch, golden: list[Golden], tolerance: float) -> Replayed:
    """Answer all prompts at once, as clients' would be.

    Raises ServingError for other tokens than the run's (unless the two were as good as equally likely), and for
    log-probabilities beyond `tolerance`.
    """
    sequences = []
    for number, entry in enumerate(golden):
        require_prompt(program, entry, number)
        sequences.append(Sequence(number, list(entry.prompt), Chooser(sampling(entry)), entry.adapter))
        batch.add(sequences[-1])
    made: dict[int, list[Chosen]] = {sequence.id: [] for sequence in sequences}
    for _ in range(MAX_STEPS):
        if batch.is_idle:
            break
        for entry_made in batch.step():
            made[entry_made.sequence.id].append(entry_made.chosen)
    return compare(golden, [made[number] for number in range(len(golden))], tolerance)


def sampling(golden: Golden) -> Sampling:
    """How a golden prompt is answered: greedily, with the two likeliest tokens told."""
    return Sampling(max_tokens=len(golden.tokens), temperature=0, logprobs=2, ignore_eos=True)


def require_prompt(prompts: Prompts, golden: Golden, number: int) -> None:
    """Raises ServingError where the request is read as other tokens than the run's."""
    if _prompt(prompts, golden.request, number) != golden.prompt:
        raise ServingError(f"golden prompt {number}: other tokens than the run's: another tokenizer or template")


def compare(golden: list[Golden], answers: list[list[Chosen]], tolerance: float) -> Replayed:
    """Raises ServingError for answers that are not the run's, see `replay`."""
    deviation = max(
        _compare(number, entry, answer, tolerance)
        for number, (entry, answer) in enumerate(zip(golden, answers, strict=True))
    )
    if not deviation <= tolerance:
        raise ServingError(
            f"golden prompts: log-probabilities deviate by {deviation:.3g} from the run's, more than the tolerance "
            f"{tolerance:g}"
        )
    return Replayed(len(golden), deviation)


def _prompt(prompts: Prompts, request: dict[str, Any], number: int) -> list[int]:
    try:
        if "messages" in request:
            return prompts.encode_chat(request["messages"])
        prompt = request["prompt"]
        return list(prompt) if isinstance(prompt, list) else prompts.encode(str(prompt))
    except (BadInput, KeyError) as error:
        raise ServingError(f"golden prompt {number}: can't be read: {error}") from error


def _compare(number: int, golden: Golden, answer: list[Chosen], tolerance: float) -> float:
    deviation = 0.0
    for position, (chosen, token, wanted) in enumerate(zip(answer, golden.tokens, golden.logprobs, strict=True)):
        found = chosen.logprob
        assert found is not None
        apart = abs(found - wanted) / max(1.0, abs(wanted))
        if chosen.token != token:
            # Where two are as good as equally likely either may win, and what follows differs.
            if found - dict(chosen.top).get(token, -math.inf) <= tolerance * max(1.0, abs(found)):
                return deviation
            raise ServingError(
                f"golden prompt {number}: token {position} of the answer is {chosen.token}, the run said {token}"
            )
        if not apart <= deviation:  # NaN is none
            deviation = apart
    return deviation
