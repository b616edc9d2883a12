"""OpenAI's endpoints for the language models of a server, without a web framework: bytes in, bytes or a stream out."""

from __future__ import annotations

import asyncio
import math
import sys
import time
import traceback
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from serving.errors import BadInput
from serving.language import replies
from serving.language.engine import Answer
from serving.language.messages import Ask, Part
from serving.language.model import LanguageModel
from serving.language.replies import Choice, Endpoint, Problem, Writer
from serving.language.requests import Chat, Completion, chat_asks, completion_asks, parse, too_long

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
_JSON = {"content-type": "application/json"}
_STREAM = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}

Models = Mapping[str, LanguageModel]


@dataclass(frozen=True)
class Asked:
    """A request, its body read."""

    path: str
    body: bytes
    seconds: float = math.inf
    """In which the client wants the whole answer."""


@dataclass(frozen=True)
class Reply:
    """What to send. A stream is to be closed (`aclose`) when the client goes; that frees its place in the engine."""

    status: int
    body: bytes | AsyncIterator[bytes]
    headers: Mapping[str, str] = field(default_factory=lambda: _JSON)
    model: str = ""
    version: str = ""


def method(path: str) -> str:
    """How a path that `answer` knows is asked; empty for others."""
    if path in (CHAT, COMPLETIONS):
        return "POST"
    return "GET" if path == MODELS or path.startswith(f"{MODELS}/") else ""


def paths(models: Models) -> dict[str, Any]:
    """The endpoints in an OpenAPI document."""
    from serving.language import openapi

    return openapi.paths(name for model in models.values() for name in model.names())


async def answer(asked: Asked, models: Models) -> Reply:
    """Answer a request. Cancelling it frees its place in the engine. Raises nothing of its own."""
    try:
        if asked.path in (CHAT, COMPLETIONS):
            return await _generate("chat" if asked.path == CHAT else "completion", asked, models)
        return _listed(asked.path, models)
    except Exception as error:
        return _refusal(_problem(error))


def find(wanted: str, models: Models) -> tuple[LanguageModel, str | None] | None:
    """The model and adapter of a name: `model`, `model:adapter`, or an adapter's own where only one model has it."""
    if wanted in models:
        return models[wanted], None
    name, _, adapter = wanted.rpartition(":")
    if name in models and adapter in models[name].bundle.adapters:
        return models[name], adapter
    having = [model for model in models.values() if wanted in model.bundle.adapters]
    return (having[0], wanted) if len(having) == 1 else None


def _listed(path: str, models: Models) -> Reply:
    there = [(name, _created(model)) for model in models.values() for name in model.names()]
    if path == MODELS:
        return Reply(200, replies.models(there))
    wanted = path.removeprefix(f"{MODELS}/")
    for name, created in there:
        if name == wanted:
            return Reply(200, msgspec.json.encode(replies.model(name, created)))
    return _refusal(_unknown(wanted))


def _created(model: LanguageModel) -> int:
    return int(datetime.fromisoformat(model.bundle.created).timestamp())


async def _generate(endpoint: Endpoint, asked: Asked, models: Models) -> Reply:
    loop = asyncio.get_running_loop()
    began = loop.time()
    wanted = parse(asked.body, Chat) if endpoint == "chat" else parse(asked.body, Completion)
    found = find(wanted.model, models)
    if found is None:
        return _refusal(_unknown(wanted.model))
    model, adapter = found
    asks = chat_asks(wanted, adapter) if isinstance(wanted, Chat) else completion_asks(wanted, adapter)
    _refuse_too_long(asks, model)
    request = _Request(model, began, began + min(asked.seconds, model.settings.deadline))
    try:
        await request.begin(asks)
        tells_logprobs = asks[0].sampling.logprobs is not None
        writer = Writer(endpoint, wanted.model, request.version, tells_logprobs)
        # Choices of one prompt share it.
        prompt_tokens = sum(a.prompt_tokens for a in request.answers[:: (wanted.n or 1)])
        if wanted.streams:
            body = _stream(request, writer, prompt_tokens, wanted.tells_usage)
            return Reply(200, body, _STREAM, model.name, request.version)
        choices = [Choice(index) for index in range(len(asks))]
        async for index, part in request.parts():
            choices[index].add(part)
        request.close()
        return Reply(200, writer.whole(choices, prompt_tokens), _JSON, model.name, request.version)
    except BaseException:
        request.close()
        raise


class _Request:
    """The answers that one request waits for."""

    def __init__(self, model: LanguageModel, began: float, deadline: float) -> None:
        self._model, self._began, self._deadline = model, began, deadline
        self.answers: list[Answer] = []
        self.version = ""
        self.tokens = 0

    async def begin(self, asks: Sequence[Ask]) -> None:
        """Until all prompts are found good. Raises BadInput, Unavailable, DeadlineExceeded."""
        for ask in asks:
            self.answers.append(self._model.ask(ask, self._deadline))
        self.version = self.answers[0].version
        for answer in self.answers:
            await answer.begun()
            self._model.observer.tokens(self._model.name, self.version, "prompt", answer.prompt_tokens)

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """(index of the choice, what a step brought), to the end of all. Raises Unavailable, DeadlineExceeded."""
        loop = asyncio.get_running_loop()
        last: dict[int, float] = {}
        observer, name = self._model.observer, self._model.name
        async for index, part in _merged(self.answers):
            now = loop.time()
            self.tokens += part.tokens
            observer.tokens(name, self.version, "completion", part.tokens)
            if index in last:
                observer.between_tokens(name, self.version, now - last[index])
            else:
                observer.first_token(name, self.version, now - self._began)
            last[index] = now
            yield index, part
        self._model.answered(loop.time() - self._began)

    def close(self) -> None:
        """Free the places of answers that are not whole."""
        for answer in self.answers:
            answer.close()


async def _merged(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Part]]:
    """The parts of several answers as they come."""
    if len(answers) == 1:
        async for part in answers[0].parts():
            yield 0, part
        return
    mixed: asyncio.Queue[tuple[int, Part | Exception | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async for part in answers[index].parts():
                mixed.put_nowait((index, part))
            mixed.put_nowait((index, None))
        except Exception as error:
            mixed.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index)) for index in range(len(answers))]
    try:
        left = len(tasks)
        while left:
            index, item = await mixed.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()


async def _stream(request: _Request, writer: Writer, prompt_tokens: int, tells_usage: bool) -> AsyncIterator[bytes]:
    """The events of an answer; an error that comes after the first of them is the last."""
    lengths = [0] * len(request.answers)
    try:
        if writer.endpoint == "chat":
            for index in range(len(lengths)):
                yield writer.begin(index)
        async for index, part in request.parts():
            if part.text or part.finish is not None or part.logprobs:
                yield writer.chunk(index, part, lengths[index])
            lengths[index] += len(part.text)
        if tells_usage:
            yield writer.usage(prompt_tokens, request.tokens)
        yield replies.DONE
    except Exception as error:
        yield replies.event(_problem(error).content)
    finally:
        request.close()


def _refuse_too_long(asks: Sequence[Ask], model: LanguageModel) -> None:
    """Before the engine spends time on cutting it into tokens."""
    ready = model.engine.ready
    if ready is not None and (field := too_long(list(asks), ready.context * ready.longest_token)):
        raise BadInput(field, f"has more than {ready.context} tokens, which is all that this model takes")


def _unknown(wanted: str) -> Problem:
    return Problem(404, f"there is no model {wanted[:100]!r}; GET {MODELS} lists them", "model", "model_not_found")


def _refusal(problem: Problem) -> Reply:
    more = {"retry-after": str(problem.retry_after)} if problem.retry_after is not None else {}
    return Reply(problem.status, msgspec.json.encode(problem.content), {**_JSON, **more})


def _problem(error: Exception) -> Problem:
    found = replies.problem(error)
    if found.status == 500:
        print(f"{time.strftime('%FT%T')} error in a language model's request", file=sys.stderr)
        traceback.print_exception(error)
    return found
