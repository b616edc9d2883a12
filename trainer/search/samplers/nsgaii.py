"""NSGA-II, a genetic algorithm for several objectives. Deb et al. 2002."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from trainer.search.study import Setting


@dataclass(frozen=True)
class Config:
    population: Annotated[int, ">= 2"] = 20
    """Finished trials of a generation; the first generation is random."""
    mutation: Annotated[float, ">= 0", "<= 1"] | None = None
    """Probability that a parameter is drawn anew; null: 1 / number of parameters."""
    crossover: Annotated[float, ">= 0", "<= 1"] = 0.9
    """Probability that a trial has two parents rather than one."""
    swapping: Annotated[float, ">= 0", "<= 1"] = 0.5
    """Probability that a parameter is taken from the second parent."""


def build(config: Config, setting: Setting) -> BaseSampler:
    from optuna.samplers import NSGAIISampler

    return NSGAIISampler(
        population_size=config.population,
        mutation_prob=config.mutation,
        crossover_prob=config.crossover,
        swapping_prob=config.swapping,
        seed=setting.trial_seed,
    )
