"""Folding an adapter into its base at full precision, and proving on real prompts that the model is the same."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainer.config import RunConfig
from trainer.errors import TrainerError, UserError
from trainer.files import reason, remedy, remove
from trainer.language_model import Opened, as_usual, open_run, quiet, real_prompts
from trainer.peft_adapter import write_adapter
from trainer.run import Run

Into = Literal["original", "dequantized"]
PROMPTS, PROMPT_TOKENS = 16, 64
MOST_IN_FP64 = 1_000_000_000
"""Parameters: 8 GB."""


@dataclass(frozen=True)
class Merged:
    """What was written, and how far its logits are from what they should be."""

    folder: str
    checkpoint: str
    into: Into
    prompts: int
    drift: float
    """Largest difference of a logit between merged and adapted model, beside the same base; weights in fp32, computed
    in fp64 where the model is small: in fp32 the order of additions alone makes 1e-4 in 30 layers."""
    drift_from_trained: float
    """The same to the model as it was trained: with the base's type in memory, or quantised."""


def merge(
    run: Run,
    config: RunConfig,
    which: str,
    output: Path,
    into: Into | None,
    tolerance: float,
    say: Callable[[str], None],
) -> Merged:
    """Write a Hugging Face folder with the adapter of a checkpoint folded into its base, in fp32.

    Args:
        into: the base as it was published, or as a quantised training saw it (the default of one).

    Raises UserError for what can't be merged, TrainerError beyond `tolerance`; nothing is left in `output` then.
    """
    if config.adapter is None:
        raise UserError(f"{run.path}: trained without an adapter, so there is nothing to merge")
    if os.path.lexists(output):
        raise UserError(f"--output: {output} is there already; name another folder, or remove it")
    chosen = chosen_base(config, into)
    return merge_opened(open_run(run, config, which, say), run, config, output, chosen, tolerance)


def chosen_base(config: RunConfig, into: Into | None) -> Into:
    """The base that an adapter is put into, checked. Raises UserError."""
    is_quantised = config.adapter is not None and config.adapter.name == "qlora"
    if into == "dequantized" and not is_quantised:
        raise UserError("--into dequantized: the base of this run was not quantised; leave --into out")
    return into or ("dequantized" if is_quantised else "original")


def merge_opened(opened: Opened, run: Run, config: RunConfig, output: Path, chosen: Into, tolerance: float) -> Merged:
    """`merge` for a checkpoint that is open."""
    prompts = real_prompts(opened, PROMPTS, PROMPT_TOKENS)
    trained = _logits(opened.model, prompts)
    adapted = at_full_precision(opened, chosen)
    wanted = _exact_logits(adapted, prompts)
    model = adapted.merge_and_unload()
    exact = _exact_logits(model, prompts)
    drift = _distance(exact, wanted)
    if not drift <= tolerance:
        raise TrainerError(
            f"merged and adapted model differ by {drift:.3g} in a logit, more than --tolerance {tolerance:g}: "
            "nothing was written; generate with the adapter as it is, or raise the tolerance"
        )
    result = Merged(str(output), opened.checkpoint.path.name, chosen, len(prompts), drift, _distance(exact, trained))
    _write(output, model, opened, run, config, result)
    return result


def at_full_precision(opened: Opened, into: Into) -> Any:
    """The adapter beside its base in fp32: as published, or with the values of the quantised weights."""
    from peft import PeftModel

    assert opened.task.pretrained is not None
    base: Any = opened.task.pretrained.load(torch.float32, None)
    if into == "dequantized":
        _take_quantised(base, opened.model)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(opened.task, opened.weights, Path(folder) / "adapter")
        with quiet():
            model = PeftModel.from_pretrained(base, str(Path(folder) / "adapter"))
    as_usual(model)
    return model


def drift_from_trained(opened: Opened, adapted: Any) -> float:
    """Largest difference of a logit between this model and the run's as it was trained, on real prompts."""
    prompts = real_prompts(opened, PROMPTS, PROMPT_TOKENS)
    return _distance(_logits(adapted, prompts), _logits(opened.model, prompts))


@torch.no_grad()
def _take_quantised(base: Any, trained: Any) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from peft.utils.integrations import dequantize_module_weight

    for name, module in trained.get_base_model().named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            target = base.get_submodule(name.removesuffix(".base_layer"))
            target.weight.copy_(dequantize_module_weight(module).to(target.weight.dtype))


@torch.no_grad()
def _logits(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    return [model(input_ids=ids.to(device)).logits[0].double().cpu() for ids in prompts]


def _exact_logits(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """In fp64 with the same weights, where that takes little memory."""
    if sum(parameter.numel() for parameter in model.parameters()) > MOST_IN_FP64:
        return _logits(model, prompts)
    logits = _logits(model.double(), prompts)
    model.float()  # exactly what it was: each value came from fp32
    return logits


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((left - right).abs().max()) for left, right in zip(a, b, strict=True))


def _write(output: Path, model: Any, opened: Opened, run: Run, config: RunConfig, result: Merged) -> None:
    making = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with quiet():
            model.save_pretrained(making)
        opened.task.tokenizer.save_pretrained(making)
        (making / "README.md").write_text(_card(opened, run, config, result), encoding="utf-8")
        os.rename(making, output)
    except OSError as error:
        raise TrainerError(f"{output}: could not be written ({reason(error)}); {remedy(error)}") from error
    finally:
        remove(making)


def _card(opened: Opened, run: Run, config: RunConfig, result: Merged) -> str:
    """The model card, README.md: what it is, where it comes from, what it scored."""
    base = opened.task.pretrained
    assert base is not None and config.adapter is not None
    head = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [" + config.adapter.name + "]"]
    head += [f"license: {base.license}"] if base.license else []
    scores = {**last_scores(run), **opened.checkpoint.manifest.metrics}
    lines = ["---", *head, "---", "", f"# {config.name}", ""]
    lines += [
        f"{base.name}, fine-tuned with {config.adapter.name} and merged in fp32.",
        "",
        "| | |",
        "| --- | --- |",
        f"| base | `{base.name}` |",
        f"| fingerprint of the base | `{base.fingerprint}` |",
        f"| licence of the base | {base.license or 'not stated by the base'} |",
        f"| adapter | `{json.dumps(config.adapter.options)}` |",
        f"| run, checkpoint | `{run.id}`, `{result.checkpoint}` |",
        f"| lineage | `{json.dumps(run.record['lineage'])}` |",
        f"| fingerprint of the data | `{opened.task.data.fingerprint}` |",
        f"| merged into | the {result.into} base |",
        f"| drift from the adapted model | {result.drift:.3g}: largest of a logit, {result.prompts} prompts |",
        f"| drift from the model as trained | {result.drift_from_trained:.3g} |",
        "",
        "## Metrics",
        "",
        *[f"- {name}: {value:.6g}" for name, value in sorted(scores.items())],
        "",
    ]
    return "\n".join(lines)


def last_scores(run: Run) -> dict[str, float]:
    """The run's test metrics."""
    found: dict[str, float] = {}
    for entry in run.read_metrics():
        found |= {name: value for name, value in entry.items() if name.startswith("test/")}
    return found


def as_record(result: Merged) -> dict[str, Any]:
    """For `--json`."""
    return asdict(result)
