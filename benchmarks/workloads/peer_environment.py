"""An environment for a peer's package: made once under `.bench/`, it shares what ours has and adds what is missing.

The same torch, transformers and PEFT thus run in both, so that a difference is the peer's or ours and not a version's.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent.parent / ".bench"
SHARED = ("torch", "torchvision", "transformers", "peft", "accelerate", "numpy", "pyarrow", "safetensors", "pandas")
"""Must not be replaced in the peer's environment."""


def interpreter(name: str, requirements: Sequence[str]) -> Path:
    """Python of the environment `.bench/<name>` with `requirements` (exact versions), which is made where it is not
    there or was made with others."""
    folder = FOLDER / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    constraints = "".join(f"{package}=={metadata.version(package)}\n" for package in SHARED)
    wanted = "".join(f"{line}\n" for line in requirements) + constraints
    if done.is_file() and done.read_text() == wanted:
        return python
    print(f"Making the environment {folder} ({', '.join(requirements)}) ...", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    # Our packages by a path file: a venv's --system-site-packages would be those of the Python below ours.
    paths = sysconfig.get_paths()
    ours = "".join(f"{path}\n" for path in dict.fromkeys((paths["purelib"], paths["platlib"])))
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(site, "shared.pth").write_text(ours)
    pinned = folder / "constraints.txt"
    pinned.write_text(constraints)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", pinned]
    subprocess.run([*command, *requirements], check=True, stdout=sys.stderr)
    done.write_text(wanted)
    return python
