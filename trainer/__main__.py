"""`python -m trainer`. Must parse on every Python 3, so that an old or too new one gets a clear line."""

import os
import sys


def main() -> int:
    """Check the version of Python, then run the command line."""
    if not (3, 11) <= sys.version_info[:2] < (3, 15):
        found = ".".join(str(part) for part in sys.version_info[:3])
        sys.stderr.write("trainer: error: needs Python 3.11 to 3.14, this is " + found + ": " + sys.executable + "\n")
        return 2
    from trainer.cli import main as run

    code = run()
    if code == 75:
        from trainer.preemption import ignore_signals

        ignore_signals()
    return code


def end(code: int) -> None:
    """End this process with `code`, and without tearing down the interpreter where ranks were connected.

    Destructors of torch's process groups were seen to hang there; a rank that has said how it ended must end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    end(main())
