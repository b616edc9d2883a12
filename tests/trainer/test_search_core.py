"""The core of a search: it ends, tells the samplers and schedulers the truth, and keeps what it must."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import FIXTURES, environment
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState
from searching import COUNTABLE, METRIC, MIXED, NUMBERS, Executor, curve, recorded, search_config

from trainer.config import Evaluate, Train
from trainer.errors import TrainerError, UserError
from trainer.search.journal import Journal
from trainer.search.length import evaluations
from trainer.search.search import Search
from trainer.search.simulate import simulate
from trainer.search.trial import FAILED, FINISHED, PAUSED, PRUNED, RUNNING, WAITING, Report, Trial, Verdict

SAMPLERS = ["random", "tpe", "gp", "cmaes", "nsgaii", "qmc", "grid"]
SCHEDULERS = ["none", "asha", "median", "hyperband", "pbt"]


def report(iteration: int, value: float, step: int | None = None) -> Report:
    return Report(iteration, step or 10 * iteration, float(iteration), {METRIC: value}, float(iteration))


def new(*args: Any, **options: Any) -> Search:
    return Search(*search_config(*args, **options), Journal())


def start(search: Search) -> Trial:
    trial = search.next()
    assert trial is not None
    return trial


def direct(search: Search) -> Callable[..., Any]:
    """Calls of an executor, not written down."""
    return lambda method, *args: getattr(search, method)(*args)


def number_of(search: Search) -> int:
    return start(search).number


# -- it ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_combination_ends(sampler: str, scheduler: str) -> None:
    space = COUNTABLE if sampler == "grid" else MIXED
    config, found = search_config(sampler, scheduler, 9, space=space)
    result = simulate(config, found, curve, slots=2)
    states = Counter(trial.state for trial in result.search.trials.values())
    assert result.search.is_done and states.total() == 9 and set(states) <= {FINISHED, PRUNED}
    assert result.search.best() and result.seconds > 0
    assert result.evaluations >= sum(len(trial.reports) for trial in result.search.trials.values())


@settings(max_examples=60, deadline=None)
@given(
    scheduler=st.sampled_from([("asha", {}), ("hyperband", {}), ("hyperband", {"reduction": 2.0}), ("median", {})])
    | st.sampled_from([("pbt", {"interval": 1}), ("pbt", {"interval": 1, "synchronous": True, "quantile": 0.5})]),
    num_samples=st.integers(1, 30),
    slots=st.integers(1, 5),
    length=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    rates=st.tuples(st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.0, 0.1]), st.sampled_from([0.0, 0.1])),
)
def test_every_search_ends(
    scheduler: tuple[str, dict[str, Any]], num_samples: int, slots: int, length: int, seed: int, rates: Any
) -> None:
    name, options = scheduler
    config, space = search_config("random", name, num_samples, epochs=length, scheduler_options=options)
    fail, lose, interrupt = rates
    recorder = recorded(
        config,
        space,
        points=lambda params: curve(params, length),
        slots=slots,
        seed=seed,
        fail=fail,
        lose=lose,
        interrupt=interrupt,
    )
    trials = recorder.search.trials
    assert sorted(trials) == list(range(num_samples)) and all(trial.has_ended for trial in trials.values())
    assert len(recorder.search.optuna_study.trials) == num_samples
    assert all(trial.state.is_finished() for trial in recorder.search.optuna_study.trials)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_trial_with_many_slots(scheduler: str) -> None:
    config, space = search_config("tpe", scheduler, 1)
    result = simulate(config, space, curve, slots=5)
    assert [trial.state for trial in result.search.trials.values()] == [FINISHED]
    assert result.evaluations == 4


def test_trials_of_one_evaluation_finish() -> None:
    for scheduler in SCHEDULERS:
        config, space = search_config("random", scheduler, 5, epochs=1)
        result = simulate(config, space, lambda params: curve(params, 1), slots=2)
        assert {trial.state for trial in result.search.trials.values()} == {FINISHED}, scheduler


def test_a_bracket_whose_last_missing_trial_fails_is_halved() -> None:
    """Ray 2.60 waits for ever after the first halving: it never takes back that a bracket is being processed."""
    search = new("random", "hyperband", 17, epochs=9)
    numbers = [number_of(search) for _ in range(17)]
    bracket = numbers[8:]  # of 3 + 5 + 9 trials, which are halved at 9, 3 and 1 evaluations
    for number in bracket:
        verdict = search.report(number, report(1, number / 100))
        if verdict == Verdict.PAUSE:
            search.paused(number)
    assert verdict == Verdict.CONTINUE, "the best one came last"
    assert [search.trials[number].state for number in bracket] == [PRUNED] * 6 + [PAUSED] * 2 + [RUNNING]
    assert {number_of(search), number_of(search)} == set(bracket[6:8])
    for number in bracket[6:8]:
        search.report(number, report(2, 0.5 + number / 100))
        assert search.report(number, report(3, 0.5 + number / 100)) == Verdict.PAUSE
        search.paused(number)
    search.failed(bracket[8], "ValueError: no")
    assert [search.trials[number].state for number in bracket[6:]] == [PRUNED, PAUSED, FAILED]
    assert number_of(search) == bracket[7]


# -- the truth --------------------------------------------------------------------------------------------------------


def test_the_study_is_told_what_became_of_trials() -> None:
    search = new("tpe", "asha", 4, scheduler_options={"reduction": 2.0})
    good, bad, broken, running = (number_of(search) for _ in range(4))
    assert search.report(good, report(1, 0.8)) == Verdict.CONTINUE
    assert search.report(bad, report(1, 0.1)) == Verdict.STOP
    search.pruned(bad, {"train": 1.5}, "trials/t0001/a")
    search.report(running, report(1, 0.9))
    search.failed(broken, "ValueError: no", "Traceback ...")
    for iteration in (2, 3, 4):
        search.report(good, report(iteration, (0.7, 0.8, 0.9)[iteration - 2]))
    search.finished(good)
    told = search.optuna_study.trials
    assert [trial.state for trial in told] == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.RUNNING,
    ]
    assert told[good].value == 0.9 and told[good].intermediate_values == {1: 0.8, 2: 0.7, 3: 0.8, 4: 0.9}
    assert told[bad].intermediate_values == {1: 0.1} and told[bad].params.keys() == NUMBERS.keys()
    assert search.trials[bad].values == (0.1,) and search.trials[bad].seconds == {"train": 1.5}
    assert search.trials[bad].runs == ["trials/t0001/a"]
    assert search.trials[broken].error == "ValueError: no" and search.trials[broken].values is None
    assert [trial.number for trial in search.best()] == [good] and not search.is_done
    assert search.running() == [running]


def test_running_trials_count_for_tpe() -> None:
    """Two that are asked for one after another differ by more than the seed: the first is taken for a bad one."""
    seen = []
    for constant_liar in (True, False):
        options = {"startup": 2, "constant_liar": constant_liar}
        search = new("tpe", "none", 9, sampler_options=options)
        for value in (0.1, 0.9, 0.4):
            search.finished(number_of(search), {METRIC: value})
        seen.append([start(search).params for _ in range(4)])
    assert seen[0][0] == seen[1][0] and seen[0][1:] != seen[1][1:]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_what_is_no_number_is_a_failure(value: float, mode: str) -> None:
    search = new("tpe", "asha", 3, objective={METRIC: mode})
    good, bad, finishing = (number_of(search) for _ in range(3))
    assert search.report(good, report(1, 0.5)) == Verdict.CONTINUE
    assert search.report(bad, report(1, value)) == Verdict.STOP, "worse than any number, whatever the direction"
    search.pruned(bad)
    search.report(finishing, report(1, 0.6))
    search.report(finishing, report(4, value), is_last=True)
    search.finished(finishing)
    for number in (bad, finishing):
        assert search.trials[number].state == FAILED and "not a number" in (search.trials[number].error or "")
        assert search.optuna_study.trials[number].state == TrialState.FAIL


def test_numbers_that_json_does_not_have_come_back_from_the_journal(tmp_path: Path) -> None:
    config, space = search_config("random", "none", 1)
    journal = Journal(tmp_path / "journal.jsonl")
    search = Search(config, space, journal)
    search.report(number_of(search), report(1, math.nan))
    search.report(0, report(2, -math.inf))
    for line in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    values = [entry.metrics[METRIC] for entry in Search(config, space, journal).trials[0].reports]
    assert math.isnan(values[0]) and values[1] == -math.inf


@pytest.mark.parametrize(
    ("value", "mode", "wanted"), [("last", "max", 0.6), ("best", "max", 0.9), ("best", "min", 0.2)]
)
def test_which_evaluation_counts(value: str, mode: str, wanted: float) -> None:
    search = new("random", "none", 1, objective={METRIC: mode}, value=value)
    number = number_of(search)
    for iteration, reported in enumerate((0.2, 0.9, math.nan, 0.6), 1):
        search.report(number, report(iteration, reported))
    search.finished(number, {METRIC: 0.6})
    assert search.trials[number].values == (wanted,)


def test_a_metric_that_nobody_reports() -> None:
    search = new("random", "asha", 1, objective={"val/f1": "max"})
    number = number_of(search)
    events = search._ledger.events
    with pytest.raises(UserError, match=r"'val/f1'; there are: val/accuracy"):
        search.report(number, report(1, 0.5))
    with pytest.raises(UserError, match="there are: none"):
        search.finished(number)
    assert search._ledger.events == events, "nothing of it counts"


def test_the_last_evaluation_never_stops_a_trial() -> None:
    for scheduler in ("asha", "median", "hyperband"):
        search = new("random", scheduler, 5, epochs=1)
        for value in (0.9, 0.8, 0.7, 0.1, 0.0):
            number = number_of(search)
            assert search.report(number, report(1, value)) == Verdict.CONTINUE
            search.finished(number)
        assert {trial.state for trial in search.trials.values()} == {FINISHED}


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_an_iteration_that_was_reported_gets_its_verdict_again_and_counts_once() -> None:
    search = new("random", "asha", 3)
    first, second = number_of(search), number_of(search)
    search.report(first, report(1, 0.8))
    assert search.report(second, report(1, 0.1)) == Verdict.STOP
    search.lost(second, "killed by SIGKILL")
    assert search.trials[second].state == PRUNED, "what the scheduler has decided stands"
    search.report(first, report(2, 0.9))
    search.interrupted(first)
    assert search.trials[first].state == WAITING and search.trials[first].failures == 0
    assert number_of(search) == first and search.trials[first].attempts == 2
    assert search.report(first, report(2, 0.9)) == Verdict.CONTINUE
    assert [entry.iteration for entry in search.trials[first].reports] == [1, 2]


def test_a_lost_worker_is_a_failure_after_some_times() -> None:
    search = new("random", "none", 1, max_failures=2)
    for _ in range(2):
        search.lost(number_of(search), "killed", {"slot": 1.0})
        assert search.trials[0].state == WAITING
    search.lost(number_of(search), "killed by SIGSEGV", {"slot": 1.0})
    trial = search.trials[0]
    assert (trial.state, trial.failures, trial.attempts, trial.error) == (FAILED, 3, 3, "killed by SIGSEGV")
    assert trial.seconds == {"slot": 3.0} and search.is_done
    assert search.optuna_study.trials[0].state == TrialState.FAIL


def test_more_trials_on_resume() -> None:
    for scheduler in SCHEDULERS:
        config, space = search_config("random", scheduler, 4)
        recorder = recorded(config, space)
        more, _space = search_config("random", scheduler, 9)
        search = Search(more, space, recorder.journal)
        assert search.num_samples == 9 and not search.is_done
        Executor(direct(search), search).run()
        assert sorted(search.trials) == list(range(9))
        again = Search(more, space, recorder.journal)
        assert {n: vars(t) for n, t in again.trials.items()} == {n: vars(t) for n, t in search.trials.items()}


def test_fewer_trials_on_resume() -> None:
    for scheduler in SCHEDULERS:
        config, space = search_config("random", scheduler, 9)
        journal = Journal()
        running = Search(config, space, journal)
        for _ in range(3):
            running.next()
        fewer, _space = search_config("random", scheduler, 2)
        search = Search(fewer, space, journal)
        for number in search.running():
            search.interrupted(number)
        Executor(direct(search), search).run()
        assert sorted(search.trials) == [0, 1, 2], "what has begun is brought to its end"


def test_a_length_that_only_the_run_knows() -> None:
    for scheduler in ("asha", "hyperband"):
        config, space = search_config("random", scheduler, 6, space={**NUMBERS, "train.max_epochs": {"int": [3, 4]}})
        journal = Journal()
        search = Search(config, space, journal)
        assert search.max_iterations is None
        numbers = [number_of(search) for _ in range(3)]
        unknown = Search(config, space, Journal())
        number = number_of(unknown)
        with pytest.raises(UserError, match=r"tune\.scheduler\.max"):
            unknown.report(number, report(1, 0.5))
        search.learn_iterations(4)
        search.learn_iterations(3)
        assert search.max_iterations == 4
        assert search.report(numbers[0], report(1, 0.5)) in (Verdict.CONTINUE, Verdict.PAUSE)
        assert Search(config, space, journal).max_iterations == 4


def test_evaluations_of_a_config() -> None:
    config, _space = search_config(epochs=7)
    assert evaluations(config) == 7
    assert evaluations(replace(config, evaluate=Evaluate(every_epochs=2))) == 4, "the end is evaluated, too"
    steps = replace(config, train=Train(max_steps=100), evaluate=Evaluate(every_epochs=None, every_steps=30))
    assert evaluations(steps) == 4
    assert evaluations(replace(config, evaluate=Evaluate(every_epochs=1, every_steps=30))) is None
    assert evaluations(replace(config, train=Train(max_steps=100))) is None
    assert evaluations(config, ["train.max_epochs"]) is None
    assert evaluations(search_config(epochs=3, cross_validate=True)[0]) == 3


def test_another_scheduler_than_the_journals_is_noticed() -> None:
    config, space = search_config("random", "asha", 8)
    recorder = recorded(config, space)
    assert any(trial.state == PRUNED for trial in recorder.search.trials.values())
    other, _space = search_config("random", "none", 8)
    with pytest.raises(TrainerError, match=r"journal:\d+: the scheduler decides otherwise"):
        Search(other, space, recorder.journal)


# -- the journal ------------------------------------------------------------------------------------------------------


def test_a_journal_cut_at_any_byte_can_be_replayed(tmp_path: Path) -> None:
    config, space = search_config("tpe", "asha", 3)
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    search = Search(config, space, journal)
    Executor(direct(search), search).run()
    data = path.read_bytes()
    whole = [0, *(index + 1 for index, byte in enumerate(data) if byte == ord("\n"))]
    cuts = {cut + more for cut in whole for more in (-1, 0, 1, 17) if 0 <= cut + more <= len(data)}
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        replayed = Search(config, space, Journal(path))
        assert len(replayed._journal.read()) >= max(1, sum(end <= cut for end in whole) - 1)
        assert replayed.next() is not None or replayed.running() or replayed.is_done
    path.write_bytes(data)
    assert Search(config, space, Journal(path)).is_done


@pytest.mark.parametrize("damage", [b"{torn\n", b"[1]\n", b'"begin"\n'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"event": "samples", "samples": 3, "time": 0}\n' + damage + b'{"event": "iterations"}\n')
    with pytest.raises(TrainerError, match=r"journal\.jsonl:2: damaged line"):
        Search(*search_config(), Journal(path))


@pytest.mark.parametrize("event", ['{"event": "resume", "number": 7}', '{"event": "celebrate"}', '{"event": "report"}'])
def test_a_line_that_does_not_follow_is_named(tmp_path: Path, event: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"event": "samples", "samples": 3}}\n{event}\n')
    with pytest.raises(TrainerError, match=r"journal\.jsonl:2: does not follow"):
        Search(*search_config(), Journal(path))


def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="could not be written"):
        Search(*search_config(), Journal(tmp_path / "gone" / "journal.jsonl"))


# -- samplers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "nsgaii", "qmc", "gp"])
def test_proposals_lie_in_the_space(sampler: str) -> None:
    options = {"startup": 4} if sampler in ("tpe", "gp", "cmaes") else {"population": 4} if sampler == "nsgaii" else {}
    trials = 7 if sampler == "gp" else 14  # a second each
    config, space = search_config(sampler, "none", trials, space=MIXED, epochs=1, sampler_options=options)
    result = simulate(config, space, lambda params: curve(params, 1), slots=2)
    for trial in result.search.trials.values():
        assert list(trial.params) == [parameter.key for parameter in space.active(trial.params)]
        for key, value in trial.params.items():
            assert space[key].contains(value), (key, value)
    assert {trial.params["optimizer.name"] for trial in result.search.trials.values()} == {"sgd", "adamw"}
    assert {type(trial.params["data.flip"]) for trial in result.search.trials.values()} == {bool}


def test_a_grid_tries_each_combination_once() -> None:
    config, space = search_config("grid", "none", 50, space=COUNTABLE, epochs=1)
    result = simulate(config, space, lambda params: curve(params, 1), slots=3)
    tried = [json.dumps(trial.params, sort_keys=True) for trial in result.search.trials.values()]
    assert space.size() == 9 == len(tried) == len(set(tried)) == result.search.num_samples
    few, _space = search_config("grid", "none", 4, space=COUNTABLE, epochs=1)
    first = simulate(few, space, lambda params: curve(params, 1), slots=3)
    assert [trial.params for trial in first.search.trials.values()] == [
        result.search.trials[number].params for number in range(4)
    ]


def test_a_grid_of_ranges() -> None:
    space = {"optimizer.lr": {"log_uniform": [1e-4, 1e-2]}, "train.accumulate": {"int": [1, 100]}}
    config, found = search_config("grid", "none", 50, space=space, epochs=1, sampler_options={"points": 3})
    result = simulate(config, found, lambda params: curve(params, 1), slots=3)
    assert sorted({trial.params["optimizer.lr"] for trial in result.search.trials.values()}) == pytest.approx(
        [1e-4, 1e-3, 1e-2]
    )
    assert {trial.params["train.accumulate"] for trial in result.search.trials.values()} == {1, 51, 100}
    endless, _space = search_config("grid", "none", 50, space=space)
    with pytest.raises(UserError, match=r"optimizer\.lr has no end of values"):
        Search(endless, found, Journal())


def test_proposals_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Neither on the hashes of text, which differ between processes, nor on the global random state."""
    script = (
        "import random, json; import numpy as np\n"
        "from searching import MIXED, curve, search_config\n"
        "from trainer.search.simulate import simulate\n"
        "random.seed(); np.random.seed()\n"
        "for sampler, options in (('tpe', {'startup': 3, 'group': True}), ('nsgaii', {'population': 3})):\n"
        "    config, space = search_config(sampler, 'asha', 12, space=MIXED, sampler_options=options)\n"
        "    search = simulate(config, space, curve, 3).search\n"
        "    print(json.dumps([trial.params for trial in search.trials.values()]))\n"
    )
    outputs = []
    for hashes in ("1", "2"):
        env = {**environment(), "PYTHONHASHSEED": hashes, "PYTHONPATH": f"{FIXTURES}:{Path(__file__).parents[2]}"}
        done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and outputs[0].count("\n") == 2


def test_the_global_random_state_is_left_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    config, space = search_config("tpe", "pbt", 6, scheduler_options={"interval": 1})
    simulate(config, space, curve, slots=2)
    after = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    assert after == (random.random(), np.random.random())


@pytest.mark.parametrize("sequence", ["sobol", "halton"])
def test_a_sequence_covers_conditions_evenly(sequence: str) -> None:
    config, space = search_config("qmc", "none", 16, space=MIXED, epochs=1, sampler_options={"sequence": sequence})
    result = simulate(config, space, lambda params: curve(params, 1), slots=4)
    trials = result.search.trials.values()
    names = Counter(trial.params["optimizer.name"] for trial in trials)
    assert names == {"sgd": 8, "adamw": 8}
    eighths = Counter(int((math.log10(trial.params["optimizer.lr"]) + 4) / 3 * 8) for trial in trials)
    assert len(eighths) == 8, "no eighth of the scale is left out"


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (Trial(0, {"optimizer.lr": 7.0}, FINISHED, values=(0.5,), origin="tune-1/t0000"), "tune-1/t0000: optimizer.lr"),
        (Trial(0, {"model.width": 7}, FINISHED, values=(0.5,)), "a known trial: model.width=7 is not in the space"),
        (Trial(0, {"optimizer.lr": 0.01}, FINISHED, values=(0.5, 1.0)), "has 2 objectives, wanted 1"),
    ],
)
def test_known_trials_that_do_not_fit(trial: Trial, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Search(*search_config("tpe"), Journal(), [trial])


def test_known_trials_are_told_as_what_they_were() -> None:
    params = {"optimizer.lr": 0.01, "optimizer.momentum": 0.5}
    known = [
        Trial(0, params, FINISHED, [report(1, 0.5)], (0.5,)),
        Trial(1, params, PRUNED, [report(1, 0.25)], (0.25,)),
        Trial(2, params, FAILED, error="ValueError: no"),
        Trial(3, params, FINISHED, values=(math.nan,)),
        Trial(4, {"optimizer.lr": 0.01}, FINISHED, values=(0.5,)),
        Trial(5, params, RUNNING),
    ]
    search = Search(*search_config("tpe", num_samples=1), Journal(), known)
    complete, pruned, failed = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
    states = [trial.state for trial in search.optuna_study.trials]
    assert states == [complete, pruned, failed, failed, complete, failed]
    assert search.num_samples == 1 and not search.is_done and search.best() == []
    assert number_of(search) == 0 and search.optuna_study.trials[6].state == TrialState.RUNNING
    search.finished(0, {METRIC: 0.75})
    assert search.is_done and [trial.number for trial in search.best()] == [0]
    assert search.optuna_study.trials[6].value == 0.75


def test_tpe_is_better_than_chance() -> None:
    found = {}
    for sampler in ("random", "tpe"):
        values = []
        for seed in range(5):
            config, space = search_config(sampler, "none", 40, epochs=1)
            result = simulate(replace(config, seed=seed), space, lambda params: curve(params, 1), slots=2)
            values.append(result.search.best()[0].values[0])
        found[sampler] = sum(values)
    assert found["tpe"] > found["random"]


# -- populations ------------------------------------------------------------------------------------------------------


def population(num_samples: int = 4, **options: Any) -> Search:
    options = {"interval": 1, "quantile": 0.25, **options}
    return new("random", "pbt", num_samples, epochs=5, scheduler_options=options)


def test_a_bad_trial_goes_on_from_a_good_one() -> None:
    search = population()
    numbers = [number_of(search) for _ in range(4)]
    assert search.report(numbers[3], report(1, 0.9)) == Verdict.CONTINUE
    assert search.report(numbers[3], report(2, 0.9)) == Verdict.CONTINUE, "there is nobody to compare with"
    search.report(numbers[1], report(1, 0.5))
    assert search.report(numbers[3], report(3, 0.95)) == Verdict.SAVE
    before = dict(search.trials[0].params)
    assert search.report(numbers[0], report(1, 0.1)) == Verdict.REPLACE
    trial = search.trials[0]
    assert (trial.source, trial.segment, trial.state) == ((3, 30), 1, RUNNING)
    assert trial.history == [{"params": before, "iteration": 1}] and trial.params != before
    search.pruned(0)
    assert trial.state == WAITING and (3, 30) in search.needed_checkpoints()
    assert search.next() is None, "the checkpoint is not known to be there yet"
    assert search.report(3, report(4, 0.95)) == Verdict.SAVE, "nobody waits for its slot"
    assert number_of(search) == 0
    assert search.report(0, report(4, 0.9)) == Verdict.CONTINUE
    assert [entry.iteration for entry in trial.reports] == [1, 4]
    told = search.optuna_study.trials[0]
    assert told.params == trial.params and told.state == TrialState.RUNNING


def test_trials_take_turns_where_slots_are_few() -> None:
    search = population(synchronous=False)
    first, second = number_of(search), number_of(search)
    assert search.report(first, report(1, 0.9)) == Verdict.PAUSE, "two have not begun"
    search.paused(first)
    assert number_of(search) == 2, "the one that is least far"
    assert search.report(second, report(1, 0.8)) == Verdict.PAUSE
    search.paused(second)
    assert (number_of(search), search.running()) == (3, [2, 3])
    assert search.report(3, report(1, 0.5)) == Verdict.PAUSE, "the others have saved nothing that it could go on from"
    search.paused(3)
    assert search.report(2, report(1, 0.4)) == Verdict.PAUSE
    search.paused(2)
    assert {number_of(search), number_of(search)} == {0, 1}


def test_a_checkpoint_that_was_never_saved_is_given_up() -> None:
    search = population()
    numbers = [number_of(search) for _ in range(4)]
    search.report(numbers[1], report(1, 0.5))
    assert search.report(numbers[3], report(1, 0.95)) == Verdict.SAVE
    assert search.report(numbers[0], report(1, 0.1)) == Verdict.REPLACE
    search.pruned(0)
    search.failed(3, "OSError: no space left")
    assert search.trials[0].source is None and number_of(search) == 0


def test_explored_parameters_stay_in_the_space() -> None:
    space = {**MIXED}
    config, found = search_config("random", "pbt", 12, space=space, epochs=8, scheduler_options={"interval": 1})
    result = simulate(config, found, lambda params: curve(params, 8), slots=4)
    changed = [trial for trial in result.search.trials.values() if trial.segment]
    assert changed
    for trial in changed:
        assert list(trial.params) == [parameter.key for parameter in found.active(trial.params)]
        assert all(found[key].contains(value) for key, value in trial.params.items())


def test_a_paused_trial_keeps_its_checkpoint() -> None:
    search = new("random", "hyperband", 5, epochs=9)
    numbers = [number_of(search) for _ in range(5)]
    verdicts = {}
    for iteration in (1, 2, 3):
        for number in numbers[3:]:
            verdicts[number] = search.report(number, report(iteration, 0.1))
    paused = [number for number, verdict in verdicts.items() if verdict == Verdict.PAUSE]
    assert paused
    search.paused(paused[0])
    assert search.trials[paused[0]].state == PAUSED and (paused[0], None) in search.needed_checkpoints()


# -- how long it takes ------------------------------------------------------------------------------------------------


def test_a_thousand_trials_are_cheap(tmp_path: Path) -> None:
    config, space = search_config("random", "asha", 1000)
    path = tmp_path / "journal.jsonl"
    began = time.process_time()
    result = simulate(config, space, curve, slots=8, journal=Journal(path))
    calls = 1000 + 1000 + result.evaluations
    assert (time.process_time() - began) / calls < 0.01
    assert path.stat().st_size / calls < 400, "bytes of an event"


def test_simulated_time() -> None:
    config, space = search_config("random", "none", 4)
    one, two = (simulate(config, space, curve, slots=slots, setup=0.5) for slots in (1, 2))
    assert one.seconds == 4 * 4.5 and two.seconds == 2 * 4.5 and one.busy == two.busy == 18.0
    assert one.evaluations == 16
    values = [value for _time, value in one.progress]
    assert values == sorted(values) and one.progress[-1][1] == max(t.values[0] for t in one.search.best() if t.values)
    assert one.finished[-1][1] == one.progress[-1][1] and one.finished[0][0] == 4.5


def test_a_curve_that_fails_is_a_failed_trial() -> None:
    def broken(params: Any) -> Any:
        raise ValueError("no")

    config, space = search_config("tpe", "asha", 3)
    result = simulate(config, space, broken, slots=2)
    assert [trial.error for trial in result.search.trials.values()] == ["ValueError: no"] * 3
