"""What a run was made of, as content hashes: config, code, data. One id goes with it into everything that follows."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IRRELEVANT_KEYS = (
    "name",
    "runs_dir",
    "resume",
    "tracking",
    "checkpoint",
    "evaluate",
    "train.log_every",
    "train.threads",
    "data.workers",
    "data.prefetch",
)
"""Keys that say where a run is kept, watched and measured, not what is learnt: no part of the config's hash."""

DIFF_LIMIT = 1_000_000
"""Bytes of `git.diff` that are kept."""
UNTRACKED_LIMIT = 200
"""New Python files that are looked at."""
GIT_TIMEOUT = 10.0
SECRET_FILES = (".env*", "*.pem", "*.key", "*credentials*", "*secrets*")
PACKAGE = Path(__file__).resolve().parent
CODE_FOLDERS = (PACKAGE, PACKAGE.parent / "recipes")

URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]*):([^/\s@]+)@")


@dataclass(frozen=True)
class Git:
    """State of the git work tree that the job was started in."""

    top: Path
    commit: str
    branch: str
    """`HEAD` when detached."""
    diff: str
    """Changes since the commit, new Python files included, at most `DIFF_LIMIT` bytes; empty when clean."""
    diff_hash: str
    """Of the whole diff, also where `diff` was cut."""

    def record(self) -> dict[str, Any]:
        """The part that stands in `run.json`."""
        return {"commit": self.commit, "dirty": bool(self.diff), "branch": self.branch}


def without_password(text: str) -> str:
    """The text with `user:password@` in its URLs cut to `user@`: what may be written down."""
    return URL_PASSWORD.sub(r"\1@", text)


def lineage(config: dict[str, Any], git: Git | None, data_fingerprint: str, version: str) -> dict[str, str]:
    """Hashes of config, code and data, and `id`, the hash of the three."""
    parts = {
        "config": config_hash(config),
        "code": code_hash(git, version),
        "data": _digest(data_fingerprint),
    }
    return {**parts, "id": _digest("\n".join(parts.values()))}


def config_hash(config: dict[str, Any]) -> str:
    """Hash of the resolved config (as `load.as_dict` gives it) without `IRRELEVANT_KEYS`."""
    learnt = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in config.items()}
    for dotted in IRRELEVANT_KEYS:
        section, _, key = dotted.partition(".")
        if not key:
            learnt.pop(section, None)
        elif isinstance(learnt.get(section), dict):
            learnt[section].pop(key, None)
    return _digest(json.dumps(learnt, sort_keys=True))


def code_hash(git: Git | None, version: str) -> str:
    """Hash of the work tree (commit and changes), and of our own files where they lie outside it."""
    parts = [git.commit, git.diff_hash] if git else []
    if git is None or git.top not in PACKAGE.parents:
        parts += [version, _files_hash()]
    return _digest("\n".join(parts))


def read_git(folder: Path) -> Git | None:
    """The work tree around `folder`; None without git, outside of a work tree, or before the first commit."""
    head = _git(folder, "rev-parse", "--show-toplevel", "HEAD", "--abbrev-ref", "HEAD")
    if head is None:
        return None
    lines = os.fsdecode(head).splitlines()
    if len(lines) != 3:
        return None
    top, commit, branch = lines
    diff = _changes(Path(top))
    kept = diff[:DIFF_LIMIT].decode(errors="replace")
    if len(diff) > DIFF_LIMIT:
        kept += f"\n# cut here: the whole diff has {len(diff)} bytes\n"
    return Git(
        Path(top),
        commit,
        branch,
        without_password(kept),
        hashlib.sha256(diff).hexdigest(),
    )


def _changes(top: Path) -> bytes:
    hidden = [f":(exclude,icase,glob)**/{pattern}" for pattern in SECRET_FILES]
    # Neither drivers nor monitors that the repository's own settings name are run: starting a job only reads.
    diff = _git(
        top,
        "diff",
        "--no-ext-diff",
        "--no-textconv",
        "--no-color",
        "--full-index",
        "HEAD",
        "--",
        ".",
        *hidden,
    )
    new = _git(top, "ls-files", "-z", "--others", "--exclude-standard", "--", ":(glob)**/*.py",
               ":(exclude,glob)**/site-packages/**", *hidden)  # fmt: skip
    names = [os.fsdecode(name) for name in (new or b"").split(b"\0") if name]
    return (diff or b"") + b"".join(_as_diff(top, name) for name in names[:UNTRACKED_LIMIT])


def _as_diff(top: Path, name: str) -> bytes:
    try:
        lines = (top / name).read_text(errors="replace").splitlines(keepends=True)
    except OSError:  # gone again, or not ours to read: then it is no part of this run either
        return b""
    lines[-1:] = [line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines[-1:]]
    head = f"diff --git a/{name} b/{name}\nnew file mode 100644\n"
    return (head + "".join(difflib.unified_diff([], lines, "/dev/null", f"b/{name}"))).encode(errors="replace")


def _git(folder: Path, *arguments: str) -> bytes | None:
    command = [
        "git",
        "-C",
        str(folder),
        "-c",
        "core.fsmonitor=false",
        "-c",
        "core.quotePath=false",
        *arguments,
    ]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                env=environment,
                timeout=GIT_TIMEOUT,
            )
        except (
            OSError,
            subprocess.TimeoutExpired,
        ):  # no git here, or a work tree too slow to wait for
            return None
        output.seek(0)
        return output.read() if done.returncode == 0 else None


def _files_hash() -> str:
    digest = hashlib.sha256()
    for folder in CODE_FOLDERS:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(PACKAGE.parent)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
