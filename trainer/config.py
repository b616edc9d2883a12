"""The schema of a run: frozen sections, a docstring under each field (its help), no torch.

Sections that name a component (`model`, `data`, ...) own only the fields that every component of the
kind shares; the rest stands in the component's own `Config`, in its own file. Field types are built-in
types, `Literal` and `Annotated[type, "> 0"]`, whose strings are bounds (`>`, `>=`, `<`, `<=`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from trainer.component import Component, default


@dataclass(frozen=True)
class Loading:
    """The part of `data` that is the same for every data set."""

    batch_size: Annotated[int, ">= 1"] = 32
    """Samples per device and micro-batch; the global batch is this × processes × `train.accumulate`."""
    workers: Annotated[int, ">= 0"] = 0
    """Processes per rank that load and augment; 0 loads in the training process."""
    prefetch: Annotated[int, ">= 1"] = 4
    """Batches that each worker keeps ready."""
    drop_last: bool = False
    """Leave out the last, smaller global batch of an epoch."""
    max_bad_samples: Annotated[int, ">= 0"] = 0
    """Unreadable samples that are skipped (and listed in `bad_samples.jsonl`) before the run ends with an error."""


@dataclass(frozen=True)
class Train:
    """How long and how exactly to train."""

    max_epochs: Annotated[int, ">= 1"] | None = None
    """Passes over the training data; this or `max_steps` (or both: whichever ends first)."""
    max_steps: Annotated[int, ">= 1"] | None = None
    """Optimizer steps."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; `auto` takes the accelerator where there is one."""
    precision: Literal["32", "bf16-mixed", "16-mixed", "bf16"] = "32"
    """`*-mixed` computes in half precision with weights in fp32 (`16-mixed` scales the loss); `bf16` keeps the
    weights in bf16."""
    accumulate: Annotated[int, ">= 1"] = 1
    """Micro-batches per optimizer step; gradients are exchanged on the last one only."""
    clip_norm: Annotated[float, "> 0"] | None = None
    """Largest L2 norm of all gradients together."""
    activation_checkpointing: str = "none"
    """`none`, `full` (each block), or a regular expression of module names, e.g. `layer[34]\\.\\d+`."""
    compile: bool = False
    """Compile the model's blocks with torch.compile."""
    ema_decay: Annotated[float, "> 0", "< 1"] | None = None
    """Keep an exponential moving average of the weights; evaluation uses it."""
    deterministic: bool = True
    """Use deterministic kernels, so that a resumed run has the same bits; off may be faster on an accelerator."""
    log_every: Annotated[int, ">= 1"] = 10
    """Steps between two entries of `metrics.jsonl`."""
    non_finite: Literal["stop", "skip", "rollback"] = "stop"
    """What a loss or gradient that is NaN or infinite does: `stop` the run, `skip` the update of that step, or go back
    to the last checkpoint and leave that step out (`rollback`)."""
    step_timeout: Annotated[float, "> 0"] | None = 600.0
    """Seconds that a step, a batch of an evaluation or a save may take before the stacks of all ranks are written down
    and the job ends; null waits for ever."""
    threads: Annotated[int, ">= 1"] | None = None
    """CPU threads of each process that trains; as many as torch chooses where not given. Another number adds in another
    order: the last bits of the results differ."""
    elastic: Literal["accumulate", "refuse"] = "accumulate"
    """On another number of processes than before: keep the global batch by more or fewer micro-batches (`accumulate`),
    or `refuse` to go on."""


@dataclass(frozen=True)
class Evaluate:
    """When to evaluate, on which batches."""

    every_epochs: Annotated[int, ">= 1"] | None = 1
    """Evaluate on the `val` split after this many epochs."""
    every_steps: Annotated[int, ">= 1"] | None = None
    """Evaluate on the `val` split after this many optimizer steps."""
    at_start: bool = False
    """Evaluate on `val` and `test` before the first step, too: the closing table then shows before and after."""
    batch_size: Annotated[int, ">= 1"] | None = None
    """Samples per device; the training batch size where not given."""
    test: bool = True
    """Evaluate once on the `test` split (where the data has one) when training is done, with the best weights
    where `checkpoint.monitor` is set."""
    pictures: bool = True
    """Write pictures and tables of the first and the last evaluation; without them, nothing is compared with the
    start."""


@dataclass(frozen=True)
class Checkpoint:
    """When to save, what to keep."""

    every_steps: Annotated[int, ">= 1"] | None = None
    """Save after this many optimizer steps."""
    every_minutes: Annotated[float, "> 0"] | None = 10.0
    """Save after this many minutes."""
    every_epochs: Annotated[int, ">= 1"] | None = None
    """Save after this many epochs."""
    keep: Annotated[int, ">= 1"] = 3
    """Newest checkpoints to keep, beside the best one."""
    monitor: str | None = None
    """Metric that picks the best, e.g. `val/accuracy`; each new best is saved."""
    mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller `monitor` is better."""


@dataclass(frozen=True)
class Holdout:
    """Which training samples are held out for `val`; the split `test` is never touched."""

    method: Literal["given", "none", "k_fold", "stratified", "grouped", "time_series"] = "given"
    """`given`: the splits of the data set. `none`: `train` and `val` are both trained on, and there is no `val`. The
    others pool the two, cut them into folds and hold one of these out: at random (`k_fold`), with every class in the
    same proportion (`stratified`), with each group on one side (`grouped`), or in order of time, where a fold is
    trained on what comes before it (`time_series`)."""
    folds: Annotated[int, ">= 2"] = 5
    """Into how many parts the pool is cut."""
    fold: Annotated[int, ">= 0"] = 0
    """Which part is held out, from 0."""
    seed: Annotated[int, ">= 0", "<= 4294967295"] = 0
    """Which samples go into which part; apart from the run's `seed`, so that runs share their folds."""
    group_by: str | None = None
    """For `grouped`, what makes a group; for `time_series`, what gives the order. Each data set has its own names."""


@dataclass(frozen=True)
class Tracking:
    """MLflow; `metrics.jsonl` in the run directory is written in any case."""

    enabled: bool = True
    """Mirror the run to MLflow."""
    uri: str | None = None
    """MLflow server (`https://...`) or database (`sqlite:///...`); where not given, the
    environment's `MLFLOW_TRACKING_URI`, else a SQLite file beside the runs."""
    experiment: str | None = None
    """MLflow experiment; the run's `name` where not given."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the MLflow run."""
    system_metrics: bool = True
    """Record CPU, memory and GPU use every ten seconds."""


@dataclass(frozen=True)
class Tune:
    """What `trainer tune` searches, and how; `trainer fit` leaves it aside."""

    space: dict[str, Any] = field(default_factory=dict)
    """What is varied: dotted key of this config -> `{uniform: [low, high]}`, `{log_uniform: [low, high]}`,
    `{int: [low, high]}` (with `log: true` on a log scale), `{quantized: [low, high, step]}` or `{choice: [...]}`;
    `when: {key: value or list of values}` beside it varies it only where another key of the space has such a value."""
    objective: dict[str, Literal["max", "min"]] = field(default_factory=dict)
    """Metric of the val split -> `max` or `min`; `checkpoint.monitor` and its mode where not given. Several give the
    trials that no other one beats in all of them."""
    value: Literal["last", "best"] = "last"
    """Which evaluation of a trial counts."""
    num_samples: Annotated[int, ">= 1"] = 20
    """Trials."""
    sampler: Component = field(default_factory=lambda: default("sampler", "tpe"))
    """What proposes the next trial: a file of `trainer/search/samplers/`."""
    scheduler: Component = field(default_factory=lambda: default("scheduler", "asha"))
    """What ends unpromising trials early: a file of `trainer/search/schedulers/`."""
    cross_validate: bool = False
    """Train every trial on all folds of `holdout`; the mean over the folds counts."""
    cpus_per_trial: Annotated[float, "> 0"] = 1.0
    """CPUs that a trial takes."""
    gpus_per_trial: Annotated[float, ">= 0"] = 0.0
    """GPUs that a trial takes; 0.5 lets two share one."""
    processes_per_trial: Annotated[int, ">= 1"] = 1
    """Processes that train a trial together, on one node."""
    max_concurrent: Annotated[int, ">= 1"] | None = None
    """Largest number of trials at the same time; null: as many as fit."""
    max_failures: Annotated[int, ">= 0"] = 2
    """How often a trial may lose its worker and go on before it counts as failed."""
    keep_checkpoints: Annotated[int, ">= 0"] = 1
    """Best trials that keep their checkpoints."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Only commands and the engine's assembly see it; components get their own section."""

    name: str
    """Name of the experiment; runs are written to `<runs_dir>/<name>/<run_id>/`. Letters, digits, `.`, `_`, `-`."""
    recipe: Component
    """What is learnt: a file of `recipes/`."""
    model: Component
    """The network: a file of `recipes/models/`."""
    data: Component
    """The data set: a file of `recipes/data/`."""
    loading: Loading
    """The common part of the section `data` (in the YAML it stands there)."""
    optimizer: Component
    """A file of `trainer/optimizers/`."""
    schedule: Component
    """How the learning rate moves: a file of `trainer/schedules/`."""
    strategy: Component
    """How processes share the work: a file of `trainer/strategies/`."""
    train: Train = field(default_factory=Train)
    """How long and how exactly to train."""
    evaluate: Evaluate = field(default_factory=Evaluate)
    """When to evaluate."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """When to save, what to keep."""
    tracking: Tracking = field(default_factory=Tracking)
    """MLflow."""
    holdout: Holdout = field(default_factory=Holdout)
    """Which training samples are held out for `val`."""
    tune: Tune = field(default_factory=Tune)
    """What `trainer tune` searches, and how."""
    seed: Annotated[int, ">= 0", "<= 9223372036854775807"] = 0
    """Seed of weights, order of the data, augmentation and dropout."""
    init_from: str | None = None
    """Pretrained weights to begin with: a folder (safetensors), a GGUF file, a hub id, or `package:NAME/PATH` for a
    file or folder inside an installed Python package; null begins from scratch."""
    adapter: Component | None = None
    """Train a few weights beside those of `init_from`, which are frozen: a file of `trainer/adapters/`."""
    runs_dir: str = "runs"
    """Folder of all runs."""
    resume: Literal["never", "auto"] = "never"
    """`auto` goes on with the newest unfinished run of this same config, or starts one where there is none."""
