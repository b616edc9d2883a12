"""The same trials under plain Ray Tune: `tune_with_ray.py BASE.yaml TRIALS OUT.json [--reuse-actors] [--empty]`.

Space, sampler (Optuna's TPE, by Ray Tune's OptunaSearch), scheduler (none, which is Ray Tune's default) and trainable
are those of `benchmarks/tune_overhead.py`; all else is as Ray Tune has it where nothing is said. A trial is the same
`trainer.fit.fit` on the same config as under `trainer tune`, and reports as often.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any


class Reports:
    """The channel of a trial: its evaluations go to Ray Tune's session, which always says to go on."""

    def __init__(self) -> None:
        self.ended: dict[str, Any] = {}

    def send(self, message: dict[str, Any]) -> None:
        from ray import tune

        if message["event"] == "report":
            tune.report({name.replace("/", "_"): value for name, value in message["metrics"].items()})
        elif message["event"] == "ended":
            self.ended = message

    def recv(self) -> dict[str, Any]:
        return {"verdict": "continue"}


def train(params: dict[str, Any]) -> None:
    """One trial."""
    from ray import tune

    from trainer.fit import fit
    from trainer.preemption import Preemption
    from trainer.search.child import trial_config
    from trainer.search.telling import Telling
    from trainer.world import World

    class Unsignalled(Preemption):
        """Ray Tune calls its trainables in a thread, where no signal arrives."""

        def _take(self, number: Any) -> None:
            pass

    order = {
        "config": params["base"],
        "overrides": [f"optimizer.lr={params['lr']!r}", f"optimizer.weight_decay={params['decay']!r}"],
        "trials_dir": tempfile.mkdtemp(prefix="trial-", dir=params["folder"]),
        "name": "t",
        "threads": 1,
    }
    channel = Reports()
    telling = Telling(channel)
    telling.ended(fit(trial_config(order), None, World(), print, Unsignalled(), prepare=telling.prepare))
    seconds = channel.ended["seconds"]
    metrics = {name.replace("/", "_"): value for name, value in channel.ended["metrics"].items()}
    tune.report({**metrics, "training_seconds": seconds["train"] + seconds["evaluate"]})


def empty(params: dict[str, Any]) -> None:
    """A trial that does nothing."""
    from ray import tune

    tune.report({"val_accuracy": params["lr"], "training_seconds": 0.0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("trials", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reuse-actors", action="store_true")
    parser.add_argument("--empty", action="store_true")
    arguments = parser.parse_args()

    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    with tempfile.TemporaryDirectory() as folder:
        space = {
            "lr": tune.loguniform(1e-4, 1e-1),
            "decay": tune.uniform(0.0, 0.1),
            "base": str(Path(arguments.base).resolve()),
            "folder": folder,
        }
        tuner = tune.Tuner(
            empty if arguments.empty else train,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric="val_accuracy",
                mode="max",
                num_samples=arguments.trials,
                search_alg=OptunaSearch(seed=0),
                reuse_actors=arguments.reuse_actors,
            ),
            run_config=tune.RunConfig(storage_path=folder, name="search", verbose=0),
        )
        results = tuner.fit()
        seconds = [result.metrics["training_seconds"] for result in results]
        arguments.out.write_text(json.dumps({"training": sum(seconds), "errors": results.num_errors}))


if __name__ == "__main__":
    main()
