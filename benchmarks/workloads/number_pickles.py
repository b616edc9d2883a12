"""Reads a pickle that holds nothing but dictionaries, lists, texts and numbers, without unpickling it.

A pickle is a program, and unpickling runs it. Here its instructions are only listed (`pickletools`), and those that
build such plain data are followed; a pickle with any other is refused. Nothing of the file can thereby call anything.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any

MARK = object()


def read_numbers(file: Path) -> Any:
    """What the pickle holds; ValueError where it holds more than plain data."""
    stack: list[Any] = []
    memo: list[Any] = []
    for instruction, argument, position in pickletools.genops(file.read_bytes()):
        match instruction.name:
            case "BINFLOAT" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                stack.append(MARK)
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPENDS":
                items = _since_mark(stack)
                stack[-1].extend(items)
            case "SETITEMS":
                items = _since_mark(stack)
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"{file}: instruction {other} at byte {position} is not one of plain data")
    raise ValueError(f"{file}: ends without STOP")


def _since_mark(stack: list[Any]) -> list[Any]:
    items = []
    while (item := stack.pop()) is not MARK:
        items.append(item)
    return items[::-1]
