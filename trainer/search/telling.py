"""How a trial tells of itself: its start, each evaluation, its end; and what it hears in return. No torch."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from trainer.errors import EXIT_DONE, EXIT_FAILURE, EXIT_PREEMPTED, Followed, Preempted, TrainerError
from trainer.run import FAILED, FINISHED, STOPPED, Run
from trainer.verdict import ENDS, PAUSE_REASON, Verdict

if TYPE_CHECKING:
    from trainer.fit import Result
    from trainer.loop import Job
    from trainer.state import Progress

Event = dict[str, Any]
PAUSED = "paused"
"""How a training ended that has a checkpoint to go on from; the record of its run says `preempted`."""
TRACEBACK_CHARACTERS = 20_000


class Channel(Protocol):
    """The way to whoever started the trial."""

    def send(self, message: Event) -> None:
        """Raises OSError where the other end is gone."""
        ...

    def recv(self) -> Event | None:
        """The next message; None, or OSError or EOFError, where the other end is gone."""
        ...


class Telling:
    """One per rank and training; only rank 0 says anything."""

    def __init__(self, channel: Channel, reported: int = 0) -> None:
        """`reported`: evaluations that the other side knows already."""
        self.is_main = True
        self.inherited = 0
        """Step up to which the log is that of another run, see `branching`."""
        self._channel = channel
        self._reported = reported
        self._is_heard = True
        self._began = time.monotonic()
        self._run: Run | None = None
        self._job: Job | None = None
        self._set_up = 0.0
        self._waited = 0.0
        self._iteration = 0
        self._before = 0.0
        """Seconds of earlier attempts."""
        self._since = 0.0

    def prepare(self, job: Job) -> None:
        """Every rank, before its first step: say that it begins, and be there for its evaluations."""
        self._job, self._set_up, self._since = job, time.monotonic() - self._began, time.monotonic()
        verdict = Verdict.CONTINUE
        if self.is_main:
            assert job.report.run is not None
            self._run = job.report.run
            self._tell({"event": "started", "run": str(self._run.path), "iterations": _evaluations(job)})
            verdict = self._tell_again(self._run, job.total_steps)
            self._before = spent(self._run.record["attempts"], _times(self._run))
            job.judge = self._judge
        verdict = job.engine.from_main(verdict)
        # A pause or a save of back then has been carried out: the checkpoint that the run goes on from is its own.
        job.judged = verdict if verdict in ENDS else Verdict.CONTINUE

    def known(self, run: Run) -> int:
        """For a run that had ended before: tell what came of it."""
        self._run = run
        evaluations = list(read_evaluations(run))
        status = run.status
        self._tell({"event": "started", "run": str(run.path), "iterations": len(evaluations)})
        self._tell_again(run, evaluations[-1]["step"] if evaluations and status == FINISHED else None)
        metrics: dict[str, float] = {}
        for entry in run.read_metrics():
            metrics |= {name: value for name, value in entry.items() if name.startswith(("val/", "test/"))}
        return self._end(status, EXIT_DONE, metrics)

    def ended(self, result: Result | None) -> int:
        """For a training that came to its end, or was stopped; the result is that of rank 0."""
        status = STOPPED if result is not None and result.stopped else FINISHED
        return self._end(status, EXIT_DONE, result.metrics if result is not None else {})

    def paused(self, why: Preempted) -> int:
        """For a training with a checkpoint to go on from."""
        reason = "judged" if PAUSE_REASON in str(why) else "interrupted"
        return self._end(PAUSED, EXIT_PREEMPTED, self._last_metrics(), reason=reason)

    def failed(self, error: BaseException) -> int:
        """For any other end; nothing is raised."""
        text = str(error) if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
        if isinstance(error, Followed) and self._run is not None:  # rank 0 was not the one to fail
            with suppress(TrainerError):
                text = str(self._run.record.get("exit_reason") or text)
        trace = "".join(traceback.format_exception(error))[-TRACEBACK_CHARACTERS:]
        is_plain = isinstance(error, TrainerError) and not isinstance(error, Followed)
        code = error.exit_code if isinstance(error, TrainerError) else EXIT_FAILURE
        line = "; ".join(text.splitlines()) or type(error).__name__
        return self._end(FAILED, code, self._last_metrics(), error=line, traceback=None if is_plain else trace)

    def _judge(self, progress: Progress, metrics: dict[str, float]) -> Verdict:
        assert self._job is not None
        self._job.saver.wait()  # once this is heard, another trial may go on from what was to be saved before
        self._iteration += 1
        seconds = self._before + time.monotonic() - self._since
        epoch = round(progress.consumed / self._job.report.samples_per_epoch, 4)
        is_last = progress.step >= self._job.total_steps
        return self._report(self._iteration, progress.step, epoch, metrics, seconds, is_last)

    def _report(
        self, iteration: int, step: int, epoch: float, metrics: dict[str, float], seconds: float, is_last: bool
    ) -> Verdict:
        before = time.monotonic()
        what = {"iteration": iteration, "step": step, "epoch": epoch, "metrics": metrics}
        self._tell({"event": "report", **what, "seconds": round(seconds, 3), "is_last": is_last})
        answer = self._hear()
        self._waited += time.monotonic() - before
        return answer

    def _tell_again(self, run: Run, total_steps: int | None) -> Verdict:
        """Tell the evaluations of earlier attempts that nobody may have heard; the verdict of the last one."""
        verdict = Verdict.CONTINUE
        times, attempts = _times(run), run.record["attempts"]
        for number, one in enumerate(read_evaluations(run), 1):
            self._iteration = number
            if number <= self._reported or one["step"] <= self.inherited:
                continue
            seconds = spent(attempts, [at for at in times if at <= one["time"]])
            is_last = total_steps is not None and one["step"] >= total_steps
            verdict = self._report(number, one["step"], one["epoch"], one["metrics"], seconds, is_last)
        return verdict

    def _tell(self, event: Event) -> None:
        if not (self.is_main and self._is_heard):
            return
        try:
            self._channel.send(event)
        except (OSError, EOFError):
            self._is_heard = False

    def _hear(self) -> Verdict:
        """The verdict; a pause where there is nobody left to give one: what was trained is kept."""
        answer = None
        with suppress(OSError, EOFError):
            answer = self._channel.recv() if self._is_heard else None
        self._is_heard = answer is not None
        return Verdict(answer["verdict"]) if answer is not None else Verdict.PAUSE

    def _end(self, status: str, code: int, metrics: Mapping[str, float], **more: Any) -> int:
        training = self._job.report.training_seconds() - self._waited if self._job is not None else 0.0
        aside = self._job.report.aside if self._job is not None else 0.0
        set_up = self._set_up or time.monotonic() - self._began
        seconds = {"setup": round(set_up, 3), "train": round(max(training, 0.0), 3), "evaluate": round(aside, 3)}
        said = {"error": None, "traceback": None, "reason": None, **more}
        run = str(self._run.path) if self._run is not None else None
        what = {"status": status, "metrics": dict(metrics), "exit_code": code, "seconds": seconds, "run": run}
        self._tell({"event": "ended", **what, **said})
        return code

    def _last_metrics(self) -> dict[str, float]:
        try:
            found = list(read_evaluations(self._run)) if self._run is not None else []
        except TrainerError:  # what can't be read is no reason to end without a word
            return {}
        return found[-1]["metrics"] if found else {}


def read_evaluations(run: Run) -> Iterator[dict[str, Any]]:
    """The evaluations of `val` after a step that the run has logged: `step`, `epoch`, `time` and `metrics`."""
    for entry in run.read_metrics():
        metrics = {name: value for name, value in entry.items() if name.startswith("val/")}
        if metrics and entry["step"] > 0:
            yield {"step": entry["step"], "epoch": entry["epoch"], "time": entry["time"], "metrics": metrics}


def spent(attempts: list[dict[str, Any]], times: list[float]) -> float:
    """Seconds of all attempts, each from its start to the last of the (Unix) `times` that falls into it."""
    starts = [datetime.fromisoformat(attempt["started"]).timestamp() for attempt in attempts]
    total = 0.0
    for start, end in zip(starts, [*starts[1:], float("inf")], strict=True):
        total += max((at - start for at in times if start <= at < end), default=0.0)
    return total


def _times(run: Run) -> list[float]:
    return [entry["time"] for entry in run.read_metrics() if "time" in entry]


def _evaluations(job: Job) -> int:
    """How many evaluations the whole training has."""
    if job.val_set is None:
        return 0
    when, last, epoch = job.config.evaluate, job.total_steps, job.plan.steps_per_epoch
    due = {last} if last else set()
    for every in (when.every_steps, when.every_epochs and when.every_epochs * epoch):
        due |= set(range(every, last + 1, every)) if every else set()
    return len(due)
