"""One rank of a training that verify listens to: `python -m trainer.verify.probe ORDER.json`, see `verify.Order`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer import cli, world
from trainer.__main__ import end
from trainer.errors import EXIT_DONE, Preempted
from trainer.fit import fit
from trainer.load import load
from trainer.progress import print_line
from trainer.run import Run
from trainer.verify import Order
from trainer.verify.recording import Recorder


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the order says; prints errors as `trainer` does, and returns its exit codes."""
    (path,) = sys.argv[1:] if argv is None else argv
    order = Order(**json.loads(Path(path).read_text()))
    try:
        place = world.from_environment()

        def say(text: str) -> None:
            if place.is_main:
                print_line(text)

        def tell(error: BaseException) -> None:
            _report(error)

        resume = Run.open(order.resume) if order.resume else None
        fit(load(order.config), resume, place, say, tell=tell, prepare=lambda job: Recorder(job, order).attach())
    except Preempted as error:
        return EXIT_DONE if order.stops else _report(error)
    except Exception as error:
        return _report(error)
    return EXIT_DONE


def _report(error: BaseException) -> int:
    return cli.report(error, as_json=False, debug=False)


if __name__ == "__main__":
    end(main())
