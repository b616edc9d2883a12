"""What a client may ask for, in OpenAI's form: checked, and turned into what the engine is asked."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from serving.errors import BadInput
from serving.language.messages import Ask
from serving.language.sampling import Sampling

MOST_CHOICES = 16
"""Answers to one request: prompts times `n`."""
MOST_STOPS, LONGEST_STOP = 16, 256
DEFAULT_COMPLETION = 16
"""Tokens of a completion that does not say how many it wants, as in OpenAI's own service."""
_SEEDS = 1 << 63

Probability = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=1, le=1 << 31)]
Token = Annotated[int, Meta(ge=0, le=1 << 31)]
Stop = Annotated[str, Meta(extra_json_schema={"minLength": 1, "maxLength": LONGEST_STOP})]
# A model that begins each text with a token of its own goes on from an empty one, too; others can't.
Text = Annotated[str, Meta(extra_json_schema={"minLength": 1})]
_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXTS = {"maxItems": MOST_CHOICES, "items": {"type": "string", "minLength": 1}}
OneKind = Meta(
    extra_json_schema={"minItems": 1, "anyOf": [_TEXTS, _TOKENS, {"maxItems": MOST_CHOICES, "items": _TOKENS}]}
)
TokenNumbers = Meta(extra_json_schema={"propertyNames": {"pattern": "^[0-9]{1,9}$"}})
OnlyText = Meta(extra_json_schema={"properties": {"type": {"const": "text"}}})

_WITHOUT = {
    "tools": "tools are not supported",
    "functions": "tools are not supported",
    "audio": "this model answers with text only",
    "web_search_options": "there is no web search",
    "guided_json": "guided decoding is not supported",
    "guided_regex": "guided decoding is not supported",
    "suffix": "filling in is not supported",
    "echo": "echoing the prompt is not supported",
    "prompt_logprobs": "log-probabilities of the prompt are not supported",
    "use_beam_search": "beam search is not supported",
}
"""Fields that would change the answer, and which are refused rather than passed over."""


class StreamOptions(Struct):
    """`include_usage`: a last chunk tells the numbers of tokens."""

    include_usage: bool | None = None


class Common(Struct, kw_only=True):
    """What both endpoints take. Other fields, e.g. `user`, change nothing here."""

    model: str
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-_SEEDS, le=_SEEDS - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], TokenNumbers] | None = None
    max_tokens: Count | None = None
    stop: Stop | Annotated[list[Stop], Meta(extra_json_schema={"maxItems": MOST_STOPS})] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: Annotated[dict[str, Any], OnlyText] | None = None
    best_of: int | None = None
    modalities: Annotated[list[str], Meta(extra_json_schema={"const": ["text"]})] | None = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def tells_usage(self) -> bool:
        """At the end of a stream."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(Struct):
    """One turn."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None


class Chat(Common, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class Completion(Common, kw_only=True):
    """POST /v1/completions"""

    prompt: Text | Annotated[list[str | Token | list[Token]], OneKind]
    """A text, its tokens, or a list of either."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


Wanted = TypeVar("Wanted", bound=Common)


def parse(body: bytes, kind: type[Wanted]) -> Wanted:
    """A request's body. Raises BadInput, which names the field."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadInput("", f"the body is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadInput("", "the body must be a JSON object")
    for field, why in _WITHOUT.items():
        if content.get(field) not in (None, False, [], {}, ""):
            raise BadInput(field, why)
    try:
        found = msgspec.convert(content, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        text, _, place = str(error).partition(" - at `$")
        field = place.rstrip("`").lstrip(".").removesuffix("[...]")
        if not place and text.startswith("Object missing required field"):
            field = text.split("`")[1]
        raise BadInput(field, _lower(text)) from error
    _check(found)
    return found


def chat_asks(wanted: Chat, adapter: str | None) -> list[Ask]:
    """What the engine is asked: one answer for each choice."""
    logprobs = (wanted.top_logprobs or 0) if wanted.logprobs else None
    if wanted.top_logprobs and not wanted.logprobs:
        raise BadInput("top_logprobs", "wants `logprobs: true` beside it")
    messages = [_message(turn, f"messages[{index}]") for index, turn in enumerate(wanted.messages)]
    most = wanted.max_completion_tokens or wanted.max_tokens or 0
    return [
        Ask(0, None, messages, adapter, _sampling(wanted, most, logprobs, choice)) for choice in range(wanted.n or 1)
    ]


def completion_asks(wanted: Completion, adapter: str | None) -> list[Ask]:
    """What the engine is asked: one answer for each prompt and choice, in the order of their indices."""
    prompts = _prompts(wanted.prompt)
    count = wanted.n or 1
    if len(prompts) * count > MOST_CHOICES:
        raise BadInput("prompt", f"{len(prompts)} prompts times n = {count}: at most {MOST_CHOICES} answers a request")
    most = wanted.max_tokens or DEFAULT_COMPLETION
    return [
        Ask(0, prompt, None, adapter, _sampling(wanted, most, wanted.logprobs, choice))
        for prompt in prompts
        for choice in range(count)
    ]


def too_long(asks: list[Ask], characters: int) -> str | None:
    """The field of a text that can't fit, however it is cut into tokens."""
    for ask in asks[:1] if asks[0].messages is not None else asks:
        if ask.messages is not None and sum(len(turn["content"]) for turn in ask.messages) > characters:
            return "messages"
        if ask.prompt is not None and len(ask.prompt) > characters:
            return "prompt"
    return None


def _check(wanted: Common) -> None:
    kind = (wanted.response_format or {}).get("type", "text")
    if kind != "text":
        raise BadInput("response_format", f"{kind!r} is not supported; only text is")
    if wanted.best_of not in (None, 1, wanted.n):
        raise BadInput("best_of", "only as many as `n` are supported")
    if wanted.modalities not in (None, ["text"]):
        raise BadInput("modalities", "this model answers with text only")
    if wanted.stream_options is not None and not wanted.streams:
        raise BadInput("stream_options", "wants `stream: true` beside it")


def _sampling(wanted: Common, max_tokens: int, logprobs: int | None, choice: int) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if wanted.temperature is None else wanted.temperature,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        top_k=max(0, wanted.top_k or 0),
        min_p=wanted.min_p or 0.0,
        # Choices of one request differ, and come out the same each time.
        seed=None if wanted.seed is None else (wanted.seed + choice + _SEEDS) % (2 * _SEEDS) - _SEEDS,
        presence_penalty=wanted.presence_penalty or 0.0,
        frequency_penalty=wanted.frequency_penalty or 0.0,
        logit_bias=_bias(wanted.logit_bias or {}),
        stop=_stops(wanted.stop),
        ignore_eos=bool(wanted.ignore_eos),
        logprobs=logprobs,
    )


def _bias(bias: dict[str, float]) -> dict[int, float]:
    if wrong := [token for token in bias if not (token.isascii() and token.isdecimal() and len(token) < 10)]:
        raise BadInput("logit_bias", f"{wrong[0]!r} is no number of a token")
    return {int(token): value for token, value in bias.items()}


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(found) > MOST_STOPS or any(not 0 < len(text) <= LONGEST_STOP for text in found):
        raise BadInput("stop", f"wants up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")
    return found


def _message(turn: ChatMessage, where: str) -> dict[str, str]:
    content = turn.content or ""
    if not isinstance(content, str):
        for index, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise BadInput(f"{where}.content[{index}]", f"of type {part.type!r}; this model reads text only")
        content = "".join(part.text or "" for part in content)
    # OpenAI's newer name of the same role, which templates don't know.
    return {"role": "system" if turn.role == "developer" else turn.role, "content": content}


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    tokens = [item for item in prompt if isinstance(item, int)]
    others = [item for item in prompt if not isinstance(item, int)]
    if not prompt or (tokens and others):
        raise BadInput("prompt", "wants a text, a list of tokens, or a list of either")
    return [tokens] if tokens else others


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
