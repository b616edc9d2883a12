"""A causal language model of transformers: pretrained (`init_from`), or from scratch by its `architecture`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from recipes.language.base import quiet
from trainer.errors import UserError

if TYPE_CHECKING:
    from recipes.language.base import Base


@dataclass(frozen=True)
class Config:
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Kernel of attention; `auto` takes `flash_attention_2` where it is installed and the weights are in half precision
    on CUDA, else `sdpa`, or `eager` for a model that can't do otherwise."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in memory; those of an adapter are in fp32 in any case."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Without `init_from`: transformers' own configuration, e.g. `{model_type: llama, hidden_size: 256,
    num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 1024}`; the vocabulary is the tokenizer's."""

    def __post_init__(self) -> None:
        if self.architecture and not isinstance(self.architecture.get("model_type"), str):
            raise ValueError("architecture: needs a model_type, e.g. llama")


def build(
    config: Config,
    base: Base | None = None,
    tokenizer: Any = None,
    quantization: Any = None,
    device: str | None = None,
) -> nn.Module:
    """transformers' model, with `use_cache` off, since a training never asks twice for the same token.

    Args:
        base: whose weights to load; None begins from scratch with random ones.
        tokenizer: of the data; from scratch it gives the size of the vocabulary and the special tokens.
        quantization: transformers' `BitsAndBytesConfig` for the weights of `base`.
        device: `meta` gives the model's modules without weights, in no time and memory.

    Raises UserError for a base whose vocabulary is smaller than the tokenizer's, or what transformers refuses.
    """
    _require_one_source(config, base)
    dtype = getattr(torch, config.dtype)
    ours = base.config() if base is not None else _from_scratch(config.architecture, tokenizer)
    _check_vocabulary(ours, tokenizer)
    attention = _attention(config)
    if base is not None and device is None:
        model = base.load(dtype, attention, quantization)
    else:
        model = _empty(ours, dtype, attention, device or "cpu")
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


def _require_one_source(config: Config, base: Base | None) -> None:
    if base is None and not config.architecture:
        raise UserError("model.architecture: is needed to begin from scratch; set it, or set init_from")
    if base is not None and config.architecture:
        raise UserError("model.architecture: init_from brings its own; leave one of the two out")


def _from_scratch(architecture: dict[str, Any], tokenizer: Any) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = architecture["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = difflib.get_close_matches(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3)
        hint = f"; near: {', '.join(near)}" if near else ", e.g. llama"
        raise UserError(f"model.architecture: {kind!r} is no causal language model of transformers{hint}")
    options = {key: value for key, value in architecture.items() if key != "model_type"}
    if tokenizer is not None:
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        options = {"vocab_size": len(tokenizer), **special, **options}
    try:
        made = AutoConfig.for_model(kind, **options)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.architecture: {str(error).partition(chr(10))[0]}") from error
    unknown = sorted(key for key in options if not hasattr(type(made)(), key))
    if unknown:
        raise UserError(f"model.architecture: {kind} has no {', '.join(unknown)}")
    return made


def _check_vocabulary(ours: Any, tokenizer: Any) -> None:
    size = ours.get_text_config().vocab_size
    if tokenizer is not None and len(tokenizer) > size:
        raise UserError(f"model: its vocabulary has {size} tokens and the tokenizer gives up to {len(tokenizer)}")


def _attention(config: Config) -> str | None:
    """None leaves it to transformers: `sdpa`, or `eager` for a model that has nothing else."""
    from transformers.utils import is_flash_attn_2_available

    if config.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError("model.attention: flash_attention_2 needs the library flash-attn and CUDA; use auto or sdpa")
    if config.attention != "auto":
        return config.attention
    return "flash_attention_2" if config.dtype != "float32" and is_flash_attn_2_available() else None


def _empty(ours: Any, dtype: torch.dtype, attention: str | None, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), torch.device(device):
            model: nn.Module = AutoModelForCausalLM.from_config(ours, dtype=dtype, attn_implementation=attention)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(f"model: transformers can't make it: {str(error).partition(chr(10))[0]}") from error
    return model
