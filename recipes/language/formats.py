"""What the keys of a row mean: Alpaca, prompt and completion, chat messages, ShareGPT, plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recipes.language.conversations import BadRow, Conversation, Message, Role
from trainer.errors import UserError

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Names of roles as data sets write them (OpenAI, ShareGPT and their relatives) -> ours."""
_SHOWN = 6


@dataclass(frozen=True)
class _Shape:
    """A format by its keys."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    messages: Callable[[Mapping[str, Any], str], list[Message]]


@dataclass(frozen=True)
class RowFormat:
    """A format, with the names that the data's columns have and the system prompt for all."""

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our key -> the data's column, where they differ."""
    system: str | None = None
    """System turn of conversations that have none."""

    def conversation(self, row: Mapping[str, Any], place: str) -> Conversation:
        """Read one row. Raises BadRow, with the place, for one that is not of this format."""
        shape = SHAPES[self.name]
        named = {key: row.get(self.columns.get(key, key)) for key in (*shape.required, *shape.optional)}
        missing = [self.columns.get(key, key) for key in shape.required if self.columns.get(key, key) not in row]
        if missing:
            raise BadRow(f"{place}: expected the keys {_list(missing)} (format {self.name}), found {_list(row)}")
        if self.name == "text":
            return Conversation((), place, _text(named["text"], "text", place))
        messages = shape.messages(named, place)
        if not any(message.role == "assistant" for message in messages):
            raise BadRow(f"{place}: no turn of the assistant, so there is nothing to learn")
        if self.system and messages[0].role != "system":
            messages.insert(0, Message("system", self.system))
        return Conversation(tuple(messages), place)


def recognise(row: Mapping[str, Any], columns: Mapping[str, str], place: str) -> str:
    """The format whose required keys the row has. Raises UserError where it has those of none."""
    for name, shape in SHAPES.items():
        if all(columns.get(key, key) in row for key in shape.required):
            return name
    known = "; ".join(f"{name}: {_list(shape.required)}" for name, shape in SHAPES.items())
    raise UserError(
        f"{place}: no known format has the keys {_list(row)} ({known}); name the columns, "
        f"e.g. data.columns={{prompt: {_nth(row, 0)}, completion: {_nth(row, 1)}}}"
    )


def require_columns(columns: Mapping[str, str], name: str) -> None:
    """Raises UserError for a key of `columns` that no format, or not the format `name`, has."""
    shapes = list(SHAPES.values()) if name == "auto" else [SHAPES[name]]
    known = sorted({key for shape in shapes for key in (*shape.required, *shape.optional)})
    for key in columns:
        if key not in known:
            of = "any format" if name == "auto" else f"the format {name}"
            raise UserError(f"data.columns.{key}: is no key of {of}; there are: {', '.join(known)}")


def _alpaca(row: Mapping[str, Any], place: str) -> list[Message]:
    instruction = _text(row["instruction"], "instruction", place)
    context = _optional(row["input"], "input", place)
    prompt = f"{instruction}\n\n{context}" if context else instruction
    return [*_system(row, place), Message("user", prompt), _answer(row["output"], "output", place)]


def _prompt_completion(row: Mapping[str, Any], place: str) -> list[Message]:
    prompt = _text(row["prompt"], "prompt", place)
    return [*_system(row, place), Message("user", prompt), _answer(row["completion"], "completion", place)]


def _chat(row: Mapping[str, Any], place: str) -> list[Message]:
    return _with_system(row, _turns(row["messages"], "messages", "role", "content", place), place)


def _sharegpt(row: Mapping[str, Any], place: str) -> list[Message]:
    return _with_system(row, _turns(row["conversations"], "conversations", "from", "value", place), place)


SHAPES = {
    "chat": _Shape(("messages",), ("system",), _chat),
    "sharegpt": _Shape(("conversations",), ("system",), _sharegpt),
    "alpaca": _Shape(("instruction", "output"), ("input", "system"), _alpaca),
    "prompt_completion": _Shape(("prompt", "completion"), ("system",), _prompt_completion),
    "text": _Shape(("text",), (), lambda row, place: []),
}
"""In the order in which they are recognised: files for other tools often hold a rendered `text` as well."""


def _turns(turns: Any, key: str, role_key: str, content_key: str, place: str) -> list[Message]:
    if isinstance(turns, Mapping) and turns and all(isinstance(column, list) for column in turns.values()):
        # `datasets.Sequence` of records is stored as a record of columns.
        turns = [dict(zip(turns, values, strict=False)) for values in zip(*turns.values(), strict=False)]
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRow(f"{place}: {key}: expected a list of turns, found {_kind(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        at = f"{key}[{number}]"
        if not isinstance(turn, Mapping):
            raise BadRow(f"{place}: {at}: expected a turn with {role_key} and {content_key}, found {_kind(turn)}")
        if role_key not in turn and {"role", "content"} <= set(turn):
            role_key, content_key = "role", "content"  # OpenAI's keys under ShareGPT's name are common
        elif role_key not in turn and {"from", "value"} <= set(turn):
            role_key, content_key = "from", "value"
        if role_key not in turn or content_key not in turn:
            raise BadRow(f"{place}: {at}: expected the keys {role_key} and {content_key}, found {_list(turn)}")
        role = _ROLES.get(str(turn[role_key]).lower())
        if role is None:
            known = ", ".join(_ROLES)
            raise BadRow(f"{place}: {at}: the role {turn[role_key]!r} is unknown; there are: {known}")
        if not turn[content_key] and turn.get("tool_calls"):
            raise BadRow(f"{place}: {at}: calls tools without saying a word; write the calls into {content_key}")
        content = _parts(turn[content_key], f"{at}.{content_key}", place)
        messages.append(_answer(content, at, place) if role == "assistant" else Message(role, content))
    return messages


def _parts(content: Any, key: str, place: str) -> str:
    """Text, also where it is given as OpenAI's list of parts."""
    if not isinstance(content, list | tuple):
        return _text(content, key, place)
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type", "no text") if isinstance(part, Mapping) else _kind(part)
            raise BadRow(f"{place}: {key}: has a part that is no text ({kind}); only text can be learnt here")
        texts.append(part["text"])
    return "".join(texts)


def _with_system(row: Mapping[str, Any], messages: list[Message], place: str) -> list[Message]:
    return messages if messages[0].role == "system" else [*_system(row, place), *messages]


def _system(row: Mapping[str, Any], place: str) -> list[Message]:
    text = _optional(row["system"], "system", place)
    return [Message("system", text)] if text else []


def _answer(value: Any, key: str, place: str) -> Message:
    text = _optional(value, key, place)
    if not text.strip():
        raise BadRow(f"{place}: {key}: the completion is empty; fill it, or leave such rows out: data.bad_rows=skip")
    return Message("assistant", text)


def _optional(value: Any, key: str, place: str) -> str:
    return "" if value is None else _text(value, key, place)


def _text(value: Any, key: str, place: str) -> str:
    if isinstance(value, str):
        return value if value.isascii() else _valid(value)
    # A file's "answer": 42 is meant as its text; what has parts of its own is another format.
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"{place}: {key}: expected text, found {_kind(value)}")


def _valid(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer takes; it becomes the sign for what can't be read."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {_list(value)}"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."


def _list(keys: Any) -> str:
    names = [str(key) for key in keys]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def _nth(row: Mapping[str, Any], number: int) -> str:
    names = list(row)
    return str(names[number]) if number < len(names) else ("QUESTION", "ANSWER")[number]
