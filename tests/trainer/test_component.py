"""Names to files, Config without an import, and objects built from plain data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import pytest

from trainer.component import KINDS, ROOT, Component, available, construct, folder, locate, read_config_class, spec
from trainer.component_source import read_help
from trainer.errors import ConfigError, UserError

NET = '''
"""A small net.

More about it.
"""
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Annotated, Literal
import this_package_does_not_exist_anywhere

@dataclass(frozen=True)
class Block:
    width: Annotated[int, ">= 1"] = 8
    """Width of a block."""

@dataclass(frozen=True)
class Unrelated:
    x: int = undefined_name()

@dataclass(frozen=True)
class Config:
    """Its config."""

    depth: Annotated[int, ">= 1", "<= 9"]
    """Number of
    blocks."""
    act: Literal["relu", "gelu"] = "relu"
    """Activation."""
    block: Block = field(default_factory=Block)
    """One block."""
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    undocumented: float | None = None

    def __post_init__(self) -> None:
        import math
        if math.isclose(self.depth, 7):
            raise ValueError("depth: seven is too much")

    @property
    def area(self) -> int:
        return sum(size * size for size in self.sizes)

def build(config, *args, **kwargs):
    return config, args, kwargs
'''


Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def test_config_is_read_without_importing(write: Write) -> None:
    found = read_config_class(write("net.py", NET))
    assert found.doc == "A small net."
    assert [item.name for item in fields(found.config_class)] == ["depth", "act", "block", "sizes", "undocumented"]
    assert found.help_by_field == {"depth": "Number of blocks.", "act": "Activation.", "block": "One block."}
    hints = get_type_hints(found.config_class, include_extras=True)
    assert hints["depth"] == Annotated[int, ">= 1", "<= 9"]
    assert hints["act"] == Literal["relu", "gelu"]
    config = found.config_class(depth=2)
    assert config.area == 5
    assert config.block.width == 8
    with pytest.raises(ValueError, match="seven"):
        found.config_class(depth=7)


def test_a_file_without_config_has_no_fields(write: Write) -> None:
    found = read_config_class(write("plain.py", '"""Plain."""\ndef build(config): return config\n'))
    assert fields(found.config_class) == ()
    assert found.doc == "Plain."


HEAD = "from dataclasses import dataclass, field\n@dataclass(frozen=True)\nclass Config:\n"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (HEAD + "    a: int = max(1, 2)\n", 4, "Config.a: the default must be a literal"),
        (HEAD + "    a: list[int] = field(default_factory=make)\n", 0, "name 'make' is not defined"),
        (HEAD + "    a: int = field(default=compute())\n", 4, "Config.a: the default must be a literal"),
        (HEAD + "    a: torch.Tensor = None\n", 4, "`torch` is out of reach"),
        (HEAD + "    a: int = 1\n    def f(self):\n        return math.pi\n", 6, "`math` is out of reach"),
        (HEAD + "    a: int = 1\n    print(a)\n", 5, "may hold fields, docstrings and methods only"),
        (HEAD + "    a: list[int] = []\n", 0, "mutable default"),
        ("class Config:\n    a: int = 1\n", 1, "must be a dataclass"),
        ("from other import Config\n", 1, "must be a dataclass written in this file"),
        ("import other.thing as Config\n", 1, "must be a dataclass written in this file"),
        ("x = 1\nConfig = dict\n", 2, "must be a dataclass written in this file"),
        ("class Config(:\n", 1, "Python syntax"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(write: Write, text: str, line: int, expected: str) -> None:
    path = write("bad.py", text)
    with pytest.raises(ConfigError) as caught:
        read_config_class(path)
    (problem,) = caught.value.problems
    assert problem.file == str(path)
    assert expected in problem.message
    if line:
        assert problem.line == line


def test_a_method_may_use_its_own_names(write: Write) -> None:
    text = HEAD + (
        "    a: int = 1\n"
        "    def f(self, other):\n"
        "        from math import pi as circle\n"
        "        total = sum(item for item in [other, circle])\n"
        "        try:\n            return total\n"
        "        except ValueError as error:\n            return error\n"
    )
    assert read_config_class(write("own.py", text)).config_class().f(1) > 4


def test_missing_file_and_null_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config_class(tmp_path / "none.py")
    (tmp_path / "null.py").write_bytes(b"a = 1\x00")
    with pytest.raises(ConfigError):
        read_config_class(tmp_path / "null.py")


def test_help_of_all_classes(write: Write) -> None:
    found = read_help(write("net.py", NET))
    assert found["Config"][0] == "Its config."
    assert found["Block"] == ("", {"width": "Width of a block."})


@pytest.mark.parametrize("kind", KINDS)
def test_every_shipped_component_can_be_read(kind: str) -> None:
    assert folder(kind).is_relative_to(ROOT)
    names = available(kind)
    assert names == sorted(names)
    assert not any(name.startswith("_") for name in names)
    for name in names:
        found = spec(kind, name)
        assert found.doc, f"{kind} {name} has no docstring"
        assert found.config_class.__dataclass_params__.frozen, f"{kind} {name}: Config must be frozen"  # type: ignore[attr-defined]
        documented = {item.name for item in fields(found.config_class)}
        assert set(found.help_by_field) == documented, f"{kind} {name}: a field has no help"


def test_unknown_shipped_name() -> None:
    with pytest.raises(UserError) as caught:
        locate("optimizer", "adamww")
    message = str(caught.value)
    assert "did you mean 'adamw'?" in message
    assert ", ".join(available("optimizer")) in message
    assert "trainer/optimizers/adamww.py" in message


@pytest.mark.parametrize("name", ["", "../secret", "a/b", ".net", "net.", "a..b", "1net", "né t", "a\x00b"])
def test_names_that_are_no_name(name: str) -> None:
    with pytest.raises(UserError, match="is no name"):
        locate("model", name)


def test_own_module_is_found_without_import(write: Write) -> None:
    marker = "raise RuntimeError('imported')\n"
    write("compkg_a/__init__.py", marker)
    file = write("compkg_a/nets/tiny.py", marker)
    package = write("compkg_a/nets/big/__init__.py", marker)
    assert locate("model", "compkg_a.nets.tiny").samefile(file)
    assert locate("model", "compkg_a.nets.big").samefile(package)
    assert not [name for name in sys.modules if name.startswith("compkg_a")]
    for missing in ("compkg_a.nets.none", "nowhere_a.b", "compkg_a.nets.tiny.deeper", "compkg_a.nets"):
        with pytest.raises(UserError, match="no module"):
            locate("model", missing)


def test_own_module_on_the_search_path(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("elsewhere/compkg_b/net.py", "")
    monkeypatch.syspath_prepend(str(tmp_path / "elsewhere"))
    assert locate("model", "compkg_b.net").samefile(file)


def test_own_module_of_an_editable_install(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("src/compkg_c/__init__.py", "")

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None) -> Any:
            from importlib.util import spec_from_file_location

            places = [str(file.parent)]
            return (
                spec_from_file_location(name, file, submodule_search_locations=places) if name == "compkg_c" else None
            )

    net = write("src/compkg_c/net.py", "")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert locate("model", "compkg_c.net").samefile(net)


def test_a_module_without_source_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match=r"no module 'zlib\.x'"):
        locate("model", "zlib.x")


def test_build_passes_config_and_arguments(write: Write) -> None:
    write(
        "compkg_d/net.py",
        NET.replace("import this_package_does_not_exist_anywhere\n", "").replace("undefined_name()", "1"),
    )
    component = Component("model", "compkg_d.net", {"depth": 3, "block": {"width": 4}, "sizes": [3]})
    config, args, kwargs = component.build("a", b=1)
    assert (config.depth, config.block.width, config.sizes) == (3, 4, [3])
    assert (args, kwargs) == (("a",), {"b": 1})


def test_build_without_config(write: Write) -> None:
    write("compkg_e.py", "")
    write("compkg_f/net.py", "def build(config, x):\n    return config, x\n")
    assert Component("model", "compkg_f.net", {}).build(5) == (None, 5)
    write("compkg_g/net.py", "")
    with pytest.raises(UserError, match="has no function `build`"):
        Component("model", "compkg_g.net", {}).build()


def test_missing_dependency_is_named(write: Write) -> None:
    write("compkg_h/net.py", "import a_package_that_is_not_there\n")
    with pytest.raises(UserError, match="needs the module 'a_package_that_is_not_there', which is not installed"):
        Component("model", "compkg_h.net", {}).module()


def test_shipped_component_is_imported_from_its_file() -> None:
    module = Component("schedule", "constant", {}).module()
    assert module.__file__ is not None
    assert Path(module.__file__).samefile(locate("schedule", "constant"))


@pytest.mark.parametrize("other", ["recipes/__init__.py", "recipes/data/digits.py", "recipes.py"])
def test_a_package_that_shadows_ours_is_named(tmp_path: Path, other: str) -> None:
    path = tmp_path / other
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    if path.parent != tmp_path:
        (tmp_path / "recipes" / "__init__.py").touch()
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from trainer.component import Component\n"
        "from trainer.errors import UserError\n"
        "try:\n    Component('data', 'digits', {}).module()\n"
        "except UserError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "another package 'recipes'" in done.stdout
    assert str(tmp_path) in done.stdout


def test_construct_makes_tuples_and_nested_dataclasses(write: Write) -> None:
    text = (
        "from dataclasses import dataclass, field\n"
        "from typing import Annotated, Any\n"
        "@dataclass(frozen=True)\nclass Part:\n    size: tuple[int, int] = (1, 2)\n"
        + HEAD.partition("\n")[2]
        + "    part: Part | None = None\n"
        "    parts: list[Part] = field(default_factory=list)\n"
        "    by_name: dict[str, Part] = field(default_factory=dict)\n"
        "    any_size: Annotated[tuple[int, ...], 'x'] = ()\n"
        "    bare: tuple = ()\n"
        "    other: Any = None\n"
        "    maybe: int | None = None\n"
    )
    cls = read_config_class(write("c.py", text)).config_class
    config = construct(
        cls,
        {
            "part": {"size": [3, 4]},
            "parts": [{"size": [5, 6]}],
            "by_name": {"a": {}},
            "any_size": [1, 2, 3],
            "bare": [1],
            "other": [{"x": 1}],
            "maybe": 3,
        },
    )
    assert config.part.size == (3, 4)
    assert config.parts[0].size == (5, 6)
    assert config.by_name["a"].size == (1, 2)
    assert config.any_size == (1, 2, 3)
    assert config.bare == (1,)
    assert config.other == [{"x": 1}]
    assert config.maybe == 3
