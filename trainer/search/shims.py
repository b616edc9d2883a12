"""What Ray's schedulers need to see of a trial and of Tune's controller, and nothing else of Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

PENDING, RUNNING, PAUSED, TERMINATED, ERROR = "PENDING", "RUNNING", "PAUSED", "TERMINATED", "ERROR"
"""`ray.tune.experiment.Trial`'s states."""


class RayTrial:
    """A trial as a scheduler sees it. `checkpoint` is (trial number, step), or None."""

    def __init__(self, place: int) -> None:
        self.place = place
        """Count of trials told to the scheduler before this one."""
        self.number: int | None = None
        """Of the trial that has this place; None until it begins."""
        self.trial_id = f"{place:05d}"
        self.status = PENDING
        self.config: dict[str, Any] = {}
        self.evaluated_params: dict[str, Any] = {}
        self.experiment_tag = self.trial_id
        self.last_result: dict[str, Any] = {}
        self.is_saving = False
        self.temporary_state = SimpleNamespace(saving_to=None)
        manager = SimpleNamespace(checkpoint_config=SimpleNamespace(num_to_keep=None), _latest_checkpoint_result=None)
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)
        self.step = 0

    @property
    def checkpoint(self) -> tuple[int, int] | None:
        return None if self.number is None else (self.number, self.step)

    def is_finished(self) -> bool:
        return self.status in (TERMINATED, ERROR)

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag

    def take_source(self) -> tuple[int, int] | None:
        """The checkpoint of another trial that the scheduler has just given to this one."""
        manager = self.run_metadata.checkpoint_manager
        result, manager._latest_checkpoint_result = manager._latest_checkpoint_result, None
        return None if result is None else tuple(result.checkpoint)

    def __repr__(self) -> str:
        return self.trial_id


class Controller:
    """Tune's controller as a scheduler sees it; notes what a scheduler does to trials."""

    search_alg = None

    def __init__(self) -> None:
        self.scheduler: TrialScheduler | None = None
        self.trials: list[RayTrial] = []
        self.live: dict[int, RayTrial] = {}
        """Place -> trials that have not ended."""
        self.stopped: list[RayTrial] = []
        self.saves: list[RayTrial] = []

    def get_trials(self) -> list[RayTrial]:
        return self.trials

    def get_live_trials(self) -> list[RayTrial]:
        return list(self.live.values())

    def stop_trial(self, trial: RayTrial) -> None:
        """A paused trial is pruned."""
        assert self.scheduler is not None
        self.end(trial, TERMINATED)
        self.stopped.append(trial)
        self.scheduler.on_trial_remove(self, trial)  # type: ignore[arg-type]

    def pause_trial(self, trial: RayTrial, should_checkpoint: bool = True) -> None:
        trial.status = PAUSED

    def _schedule_trial_save(self, trial: RayTrial, result: Any = None) -> tuple[int, int] | None:
        self.saves.append(trial)
        return trial.checkpoint

    def end(self, trial: RayTrial, status: str) -> None:
        trial.status = status
        self.live.pop(trial.place, None)
