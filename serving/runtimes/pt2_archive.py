"""Is the file of a torch.export program data alone? torch's loader would run what a forged one asks for.

It unpickles members of the archive, looks functions up by their names, evaluates expressions of sizes as Python,
imports modules named by tree structures, and loads native code beside the program. So everything is looked at before:
members, operators, expressions and structures are those that `trainer export` writes, or the file is refused.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MEMBERS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt|models/model\.json|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment|version"
)
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|torchvision|quantized_decomposed)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.(wrap_with_set_grad_enabled|wrap_with_autocast|cond|while_loop|scan)"
    r"|torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt|pow)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|abs|and_|or_|not_|eq|ne|lt|le|gt|ge)"
)
_REFUSED = ("torch.ops.aten.from_file.",)
"""Reads and writes files."""
_TOKENS = re.compile(r"\s+|'[a-z]+\d+'|\d+(\.\d+)?|[A-Za-z][A-Za-z0-9]*|\*\*|[<>=]=?|[-+*/(),]")
_NAMES = re.compile(
    r"[su]\d+|Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilToInt|IntTrueDiv"
    r"|ToFloat|FloorToInt|TruncToInt|positive|nonnegative|integer|real|precision|oo|True|False"
)
_STRUCTURES = (None, "builtins.tuple", "builtins.list", "builtins.dict")


class Forged(Exception):
    """Something that `trainer export` does not write; the text says what."""


def require_data(path: Path) -> None:
    """Raises Forged for a file that holds more than a graph of torch's own operators and its numbers."""
    from torch.export.pt2_archive._package import PT2ArchiveReader

    # By the reader that torch's loader will use: another one might see other members in the same bytes.
    with PT2ArchiveReader(str(path)) as reader:
        for name in reader.get_file_names():
            if _MEMBERS.fullmatch(name) is None:
                raise Forged(f"holds {name[:80]!r}")
        _check_example(reader.read_bytes("data/sample_inputs/model.pt"))
        for config in ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json"):
            for entry in json.loads(reader.read_bytes(config))["config"].values():
                if entry["use_pickle"]:
                    raise Forged("holds pickled tensors")
        _check_graph(json.loads(reader.read_bytes("models/model.json")))


def _check_example(data: bytes) -> None:
    """Where tensors are not all there is in it, torch's loader would unpickle whatever it is."""
    import torch

    try:
        if data:
            torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # whatever it meets: the loader must not meet it
        raise Forged("holds example inputs that are no tensors") from error


def _check_graph(model: Any) -> None:
    for part in _parts(model):
        operators = [part["target"]] if "target" in part and "inputs" in part else []
        for operator in [*operators, part.get("as_operator", "torch.sym_max")]:
            if _OPERATORS.fullmatch(operator) is None or operator.startswith(_REFUSED):
                raise Forged(f"calls {operator[:80]!r}")
        if "as_custom_obj" in part:
            raise Forged("holds an object of a class")
        if "expr_str" in part:
            _check_expression(part["expr_str"])
        for key in ("in_spec", "out_spec"):
            if isinstance(part.get(key), str) and part[key]:
                _check_structure(json.loads(part[key]))


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON document."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _check_expression(text: str) -> None:
    position = 0
    while position < len(text):
        token = _TOKENS.match(text, position)
        word = token[0] if token else ""
        if not word or (word[0].isalpha() and _NAMES.fullmatch(word) is None):
            raise Forged(f"computes a size by {text[:80]!r}")
        position += len(word)


def _check_structure(spec: Any) -> None:
    for part in _parts(spec):
        if part.get("type") not in _STRUCTURES:
            raise Forged(f"builds a {str(part.get('type'))[:80]}")
        context = part.get("context")
        if isinstance(context, str) and any(_parts(json.loads(context))):
            raise Forged("builds a structure with keys that are objects")
