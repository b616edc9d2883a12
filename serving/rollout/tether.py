"""Runs a program that must not outlive its parent: `python -m serving.rollout.tether PARENT PROGRAM [ARGUMENT ...]`.

The kernel sends it SIGKILL when the parent ends, however that ends. The wish survives exec; it is of the thread that
started the program, which is the front's only one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    """Become the program; does not return."""
    parent, program = int(argv[0]), argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the wish was known
        os._exit(1)
    os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
