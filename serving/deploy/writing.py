"""From texts to a folder: never over what is there unasked, and with the server and the bundle in build contexts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from serving.bundle import MANIFEST, Bundle
from serving.errors import Mistake, ServingError

PACKAGE = Path(__file__).parent.parent
FOLDER_MODE, FILE_MODE, PROGRAM_MODE = 0o755, 0o644, 0o755
"""In a build context, whatever the umask: the image's user is another one."""
PROGRAMS = ("serve",)


def write(files: Mapping[str, str], output: Path, force: bool) -> list[str]:
    """Write all files or, where one is there and `force` is not given, none. Returns their paths in `output`."""
    present = [path for path in sorted(files) if os.path.lexists(output / path)]
    if present and not force:
        more = f" and {len(present) - 1} more" if len(present) > 1 else ""
        raise Mistake(
            f"{output / present[0]} is there already{more}: --force writes over it, --output writes elsewhere"
        )
    try:
        for path, text in files.items():
            file = output / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            file.chmod(PROGRAM_MODE if file.name in PROGRAMS else FILE_MODE)
    except OSError as error:
        raise ServingError(f"{error.filename or output}: can't be written ({error.strerror})") from error
    return sorted(files)


def add_context(context: Path, bundle: Bundle) -> None:
    """Put the `serving` package and the bundle into a build context, in place of those that are there."""
    try:
        for name in ("serving", "bundle"):
            if (context / name).exists():
                shutil.rmtree(context / name)
        shutil.copytree(PACKAGE, context / "serving", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for name in (MANIFEST, *bundle.files):
            target = context / "bundle" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(name), target)
        for folder in (context / "serving", context / "bundle"):
            _open_for_all(folder)
    except OSError as error:
        raise ServingError(f"{error.filename or context}: can't be written ({error.strerror})") from error


def _open_for_all(folder: Path) -> None:
    folder.chmod(FOLDER_MODE)
    for path in folder.rglob("*"):
        path.chmod(FOLDER_MODE if path.is_dir() else FILE_MODE)
