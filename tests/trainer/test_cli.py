"""Dispatch, arguments, and what is printed when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainer.commands
from trainer import __main__, __version__, cli

VERB = '''"""Say hello.

More about it.
"""
import sys
from trainer.cli import add_config_arguments
from trainer.errors import ConfigError, Preempted, Problem, TrainerError, UserError

def configure(parser):
    add_config_arguments(parser, required=False)
    parser.add_argument("--fail")

def run(args):
    if args.fail == "user":
        raise UserError("no such thing: name another")
    if args.fail == "one":
        raise ConfigError([Problem("bad", "a.b", "f.yaml", 3)])
    if args.fail == "two":
        raise ConfigError([Problem("bad", "a.b", "f.yaml", 3), Problem("worse\\n\\x1b[31m")])
    if args.fail == "failure":
        raise TrainerError("the node is gone")
    if args.fail == "preempted":
        raise Preempted("saved at step 3")
    if args.fail == "bug":
        raise ZeroDivisionError("by\\nzero")
    if args.fail == "silent":
        raise AssertionError
    if args.fail == "interrupt":
        raise KeyboardInterrupt
    if args.fail == "pipe":
        for number in range(100_000):
            print(number)
    print(args.config, args.overrides)
    return 7 if args.fail == "code" else 0
'''
PASS_ON = '''"""Pass on."""
import argparse

def configure(parser):
    parser.add_argument("where")
    parser.add_argument("rest", nargs=argparse.REMAINDER)

def run(args):
    print(args.where, args.rest, args.json)
    return 0
'''


@pytest.fixture(autouse=True)
def verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "commands"
    folder.mkdir()
    (folder / "say_hello.py").write_text(VERB)
    (folder / "pass_on.py").write_text(PASS_ON)
    (folder / "broken.py").write_text('"""Broken."""\nraise RuntimeError("imported")\n')
    (folder / "_shared.py").write_text('"""No verb."""\n')
    monkeypatch.setattr(cli, "COMMANDS", folder)
    monkeypatch.setattr(trainer.commands, "__path__", [str(folder)])
    for name in ("say_hello", "pass_on", "broken"):
        monkeypatch.delitem(sys.modules, f"trainer.commands.{name}", raising=False)
    return folder


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_lists_the_verbs_without_importing_them(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "  say-hello  Say hello.\n" in out
    assert "  broken     Broken.\n" in out
    assert "shared" not in out


def test_no_verb_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: trainer VERB" in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"trainer {__version__}\n"


@pytest.mark.parametrize("verb", ["say-hallo", "say_hello", "../say-hello", "_shared", "-x", "", "-"])
def test_unknown_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"trainer: error: unknown verb {verb!r}")
    assert "there are: broken, pass-on, say-hello" in err
    assert ("did you mean 'say-hello'?" in err) == ("hello" in verb or "hallo" in verb)


def test_help_of_a_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["say-hello", "--help"]) == 0
    out = capsys.readouterr().out
    for part in ("trainer say-hello", "More about it.", "--config FILE", "key=value", "--json", "--debug"):
        assert part in out


@pytest.mark.parametrize(
    "argv",
    [
        ["--config", "c", "a=1", "b.c=2"],
        ["a=1", "--config", "c", "b.c=2"],
        ["a=1", "b.c=2", "--config=c"],
        ["a=1", "--json", "b.c=2", "--config", "c", "--debug"],
    ],
)
def test_overrides_stand_anywhere(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["say-hello", *argv]) == 0
    assert capsys.readouterr().out == "c ['a=1', 'b.c=2']\n"


def test_no_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["say-hello"]) == 0
    assert capsys.readouterr().out == "None []\n"
    assert cli.main(["say-hello", "a=-1", "b="]) == 0
    assert capsys.readouterr().out == "None ['a=-1', 'b=']\n"


def test_a_verb_without_config_parses_as_usual(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pass-on", "here", "--", "fit", "--json"]) == 0
    assert "'fit', '--json'] False" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["c.yaml"], "'c.yaml' has no `=`: write a config as --config FILE"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--conf", "c"], "unrecognized arguments: --conf"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_wrong_arguments(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["say-hello", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("trainer: error: ")
    assert expected in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        ("user", 2, ["trainer: error: no such thing: name another"]),
        ("one", 2, ["trainer: error: f.yaml:3: a.b: bad"]),
        (
            "two",
            2,
            [
                "trainer: error: f.yaml:3: a.b: bad",
                "trainer: error: worse \\x1b[31m",
                "trainer: 2 problems in the config, nothing was started",
            ],
        ),
        ("failure", 1, ["trainer: error: the node is gone"]),
        ("preempted", 75, ["trainer: preempted: saved at step 3"]),
        ("bug", 1, ["trainer: failed: ZeroDivisionError: by zero (--debug shows the traceback)"]),
        ("silent", 1, ["trainer: failed: AssertionError (--debug shows the traceback)"]),
        ("interrupt", 130, ["trainer: interrupted"]),
        ("code", 7, []),
    ],
)
def test_exit_codes_and_lines(kind: str, code: int, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["say-hello", "--fail", kind]) == code
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize("kind", ["user", "bug"])
def test_debug_shows_the_traceback(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["say-hello", "--fail", kind, "--debug"]) in (1, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("trainer: ")
    assert "--debug" not in lines[-1]


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["say-hello", "--fail", "two", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["problems"][0] == {"message": "bad", "key": "a.b", "file": "f.yaml", "line": 3}
    assert found["error"].startswith("f.yaml:3: a.b: bad")
    assert cli.main(["say-hello", "--fail", "bug", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "ZeroDivisionError: by zero", "problems": []}
    assert cli.main(["say-hello", "--bogus", "--json"]) == 2
    assert "--bogus" in json.loads(capsys.readouterr().out)["error"]
    assert cli.main(["pass-on", "--", "--json"]) == 0 or capsys.readouterr().out == "", "what follows -- is another's"


def test_a_verb_that_cannot_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["broken"]) == 1
    assert "trainer: failed: RuntimeError: imported" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error(tmp_path: Path, verbs: Path) -> None:
    code = (
        "import sys, trainer.commands\nfrom pathlib import Path\nfrom trainer import cli\n"
        f"cli.COMMANDS = Path({str(verbs)!r}); trainer.commands.__path__ = [{str(verbs)!r}]\n"
        "sys.exit(cli.main(['say-hello', '--fail', 'pipe']))\n"
    )
    root = Path(cli.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_main_reads_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer", "--version"])
    assert __main__.main() == 0
    assert capsys.readouterr().out == f"trainer {__version__}\n"


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 15, 0), (2, 7, 18), (4, 0, 0)])
def test_other_pythons_get_one_clear_line(
    version: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", version)
    assert __main__.main() == 2
    err = capsys.readouterr().err
    assert err.startswith("trainer: error: needs Python 3.11 to 3.14, this is " + ".".join(map(str, version)))
    assert len(err.splitlines()) == 1


def test_the_guard_parses_on_old_pythons() -> None:
    import ast

    for module in (__main__, trainer):
        assert module.__file__ is not None
        ast.parse(Path(module.__file__).read_text(), feature_version=(3, 4))
