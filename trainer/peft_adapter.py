"""What LoRA and QLoRA share: PEFT's configuration, targets that are checked before weights are loaded, plain errors."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from trainer.component import did_you_mean
from trainer.errors import TrainerError, UserError
from trainer.files import reason, remedy, remove
from trainer.fused_lora import fuse

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor, nn

    from trainer.task import Task

ALL_LINEAR = "all-linear"


class Load(Protocol):
    """Makes the base model, e.g. `partial(model.build, base=base, tokenizer=tokenizer)`."""

    def __call__(self, *, quantization: Any = None, device: str | None = None) -> nn.Module:
        """The base with its weights, quantised where asked; with `device="meta"` its modules alone."""
        ...


class LoraOptions(Protocol):
    """The part of an adapter's `Config` that makes LoRA's matrices."""

    @property
    def r(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def target_modules(self) -> str | list[str]: ...
    @property
    def rslora(self) -> bool: ...
    @property
    def dora(self) -> bool: ...
    @property
    def init(self) -> str: ...
    @property
    def modules_to_save(self) -> list[str]: ...


def check_options(options: LoraOptions) -> None:
    """What is wrong without knowing the model; ValueError as a component's `__post_init__` raises it."""
    targets = options.target_modules
    if not targets or (isinstance(targets, list) and not all(targets)):
        raise ValueError(f"target_modules: is empty: write {ALL_LINEAR}, names such as [q_proj, v_proj], or a pattern")
    if isinstance(targets, str) and targets != ALL_LINEAR:
        try:
            re.compile(targets)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"target_modules: wants {ALL_LINEAR}, a list or a regular expression: {error}") from error


def adapt(options: LoraOptions, load: Load, quantization: Any = None) -> PeftModel:
    """The base with frozen weights and LoRA's matrices, in fp32, beside its linear layers.

    Raises UserError, before a weight is read, for targets that the model does not have.
    """
    quiet_bitsandbytes()
    from peft import get_peft_model, prepare_model_for_kbit_training

    _check_targets(options, load(device="meta"))
    base: Any = load(quantization=quantization)
    if quantization is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        _keep_weights_as_they_are(base)
    with warnings.catch_warnings():
        # Tied embeddings among the targets are refused above; the rest is advice to library users.
        warnings.simplefilter("ignore")
        model: PeftModel = get_peft_model(base, lora_config(options))
    fuse(model)
    return model


def lora_config(options: LoraOptions) -> LoraConfig:
    """PEFT's configuration of the same adapter."""
    from peft import LoraConfig

    targets = options.target_modules
    return LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # PEFT divides it, and takes any number
        lora_dropout=options.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=options.rslora,
        use_dora=options.dora,
        init_lora_weights=True if options.init == "default" else options.init,  # type: ignore[arg-type]
        modules_to_save=list(options.modules_to_save) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def find_adapted(model: nn.Module) -> PeftModel | None:
    """The adapted model that `model` is or contains; None where there is none."""
    return next((module for module in model.modules() if _is_adapted(module)), None)


def quiet_bitsandbytes() -> None:
    """Before it is imported: it says which kernels it looked for in vain, and at each call that 8-bit layers compute in
    float16."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _keep_weights_as_they_are(model: nn.Module) -> None:
    """On CPUs with bfloat16 kernels bitsandbytes repacks its 4-bit weights at the first evaluation, with scales rounded
    to bfloat16, and goes on training with those: other weights than before, and after a resume others again."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _check_targets(options: LoraOptions, skeleton: Any) -> None:
    linear = _linear_layers(skeleton)
    output = skeleton.get_output_embeddings()
    names = [name for name, _ in skeleton.named_modules() if name]
    targets = options.target_modules
    wanted = [targets] if isinstance(targets, str) else targets
    matched: set[str] = set()
    for target in wanted:
        if targets == ALL_LINEAR:
            found = [name for name in linear if skeleton.get_submodule(name) is not output]
        elif isinstance(targets, str):
            found = [name for name in names if re.fullmatch(target, name)]
        else:
            found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not set(found) & set(linear):
            short = _short_names(linear)
            what = f"({found[0]}) is no linear layer" if found else "matches no module of the model"
            raise UserError(
                f"adapter.target_modules: {target!r} {what}{did_you_mean(target, short)}; "
                f"its linear layers: {', '.join(short)}"
            )
        matched |= set(found)
    for name in options.modules_to_save:
        if name not in {part.rpartition(".")[2] for part in names} | set(names):
            raise UserError(
                f"adapter.modules_to_save: the model has no module {name!r}; there are: "
                f"{', '.join(_short_names(names))}"
            )
    _refuse_tied(options, skeleton, matched)


def _refuse_tied(options: LoraOptions, skeleton: Any, matched: set[str]) -> None:
    """Input and output embeddings that are one weight can't be adapted at one end only."""
    if not getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False):
        return
    ends = {id(skeleton.get_input_embeddings()), id(skeleton.get_output_embeddings())}
    tied = {name for name, module in skeleton.named_modules() if id(module) in ends}
    saved = {name for name in tied if name.rpartition(".")[2] in options.modules_to_save}
    for key, found in (("target_modules", matched & tied), ("modules_to_save", saved)):
        if found:
            raise UserError(
                f"adapter.{key}: {min(found)} shares its weight with the embeddings at the other end of this model, "
                "and what is learnt at one end would change both when it is merged; leave it out"
            )


def _linear_layers(skeleton: nn.Module) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _short_names(names: Sequence[str]) -> list[str]:
    """Last parts of dotted names, each once: `q_proj` stands for that of every block."""
    return list(dict.fromkeys(last for name in names if not (last := name.rpartition(".")[2]).isdecimal()))


def write_adapter(task: Task, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the task's adapter in PEFT's own format, with the tokenizer, in place of what is in `folder`.

    `PeftModel.from_pretrained(base, folder)` and `AutoPeftModelForCausalLM.from_pretrained(folder)` read it.

    Args:
        tensors: weights by their name in `task.model`, whole and on the CPU, e.g. a checkpoint's.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    name, model = next((name, module) for name, module in task.model.named_modules() if _is_adapted(module))
    prefix = f"{name}." if name else ""
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    adapter = get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False)
    making = folder.with_name(f".{folder.name}.making")
    remove(making)
    try:
        making.mkdir()
        save_file({key: value.contiguous() for key, value in adapter.items()}, making / "adapter_model.safetensors")
        replace(model.peft_config["default"], inference_mode=True).save_pretrained(str(making))
        if task.tokenizer is not None:
            task.tokenizer.save_pretrained(making)
        remove(folder)
        os.replace(making, folder)
    except OSError as error:
        raise TrainerError(f"{folder}: the adapter could not be written ({reason(error)}); {remedy(error)}") from error
    finally:
        remove(making)


def _is_adapted(module: nn.Module) -> TypeGuard[PeftModel]:
    from peft import PeftModel

    return isinstance(module, PeftModel)
