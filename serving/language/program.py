"""A language model and its adapters, loaded from a bundle's folders: the part that computes."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from serving.errors import BadBundle
from serving.language.prompts import Prompts
from serving.language.rows import Rows, keys_and_values

KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class Program(Prompts):
    """A model that reads prompts one by one, and makes a token for each row of a batch."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path], dtype: str, device: str = "auto") -> None:
        """Raises BadBundle for a folder that transformers can't load, or whose kind of model rows can't hold."""
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.device = torch.device(_device(device))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                super().__init__(folder)
                model: Any = AutoModelForCausalLM.from_pretrained(
                    str(folder), dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
                )
                self.base = model.to(self.device).eval()
                self.model: Any = _with_adapters(self.base, adapters)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise BadBundle(f"{folder}: can't be loaded ({type(error).__name__}: {first})") from error
        self.adapters = tuple(adapters)
        self.context = _context(self.base.config.get_text_config(), folder)
        self.vocabulary = int(self.base.get_input_embeddings().weight.shape[0])
        self.ends = _ends(self.base, self.tokenizer)
        named = inspect.signature(self.base.forward).parameters
        # A prompt's logits at all positions would fill the memory, so the last alone is asked for where a model can.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in named else {}
        self._cache = "cache" if "cache" in named else "past_key_values"
        self.is_additive = self.base.config._attn_implementation == "eager"
        self._selected: str | None = None
        self.cell_bytes = 0
        """Bytes that a token's keys and values take; known after the first prompt."""
        if self.adapters:
            self.model.base_model.disable_adapter_layers()

    def rows(self) -> Rows:
        """An empty batch for sequences of one adapter."""
        return Rows(self.device, self.is_additive)

    def select(self, adapter: str | None) -> None:
        """What is computed next is computed with this adapter; with None by the base alone."""
        if adapter == self._selected:
            return
        if adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            if self._selected is None:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(adapter)
        self._selected = adapter

    def read(self, tokens: Sequence[int], cache: DynamicCache) -> Tensor:
        """Read tokens of one sequence behind those in `cache`; logits [1, V] of what comes after them."""
        ids = torch.tensor([list(tokens)], device=self.device)
        made = self.model(input_ids=ids, use_cache=True, **{self._cache: cache}, **self._last_only)
        if not self.cell_bytes:
            self.cell_bytes = _bytes_per_token(cache)
        logits: Tensor = made.logits[:, -1]
        return logits

    def step(self, tokens: Sequence[int], rows: Rows) -> Tensor:
        """Read one token for each row; logits [rows, V]."""
        positions, mask = rows.prepare()
        ids = torch.tensor(tokens, device=self.device)[:, None]
        made = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, **{self._cache: rows.cache}
        )
        rows.advance()
        logits: Tensor = made.logits[:, -1]
        return logits


def _with_adapters(base: Any, adapters: Mapping[str, Path]) -> Any:
    if not adapters:
        return base
    from peft import PeftModel

    model: Any = None
    for name, folder in adapters.items():
        if not (folder / "adapter_model.safetensors").is_file():
            raise BadBundle(f"{folder}: holds no adapter_model.safetensors; export the run again")
        kind = json.loads((folder / "adapter_config.json").read_text()).get("peft_type")
        if kind not in ("LORA",):
            raise BadBundle(f"{folder}: an adapter of type {kind}; only LORA is served")
        if model is None:
            model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
        else:
            model.load_adapter(str(folder), adapter_name=name)
    model.eval()
    return model


def _device(wanted: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _context(config: Any, folder: Path) -> int:
    """Tokens that a sequence may have: what the model was made for, and no more than a window that slides over it."""
    kinds = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    if kinds:
        raise BadBundle(f"{folder}: layers of kind {', '.join(sorted(kinds))} can't be batched here; serve it by vLLM")
    bounds = [getattr(config, "max_position_embeddings", None)]
    uses_window = "sliding_attention" in (getattr(config, "layer_types", None) or ("sliding_attention",))
    bounds.append(getattr(config, "sliding_window", None) if uses_window else None)
    return int(min(bound for bound in [*bounds, 1 << 20] if bound))


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id, tokenizer.eos_token_id):
        found |= set(value) if isinstance(value, list | tuple) else {value}
    return frozenset(int(token) for token in found if token is not None and token >= 0)


def _bytes_per_token(cache: DynamicCache) -> int:
    tensors = [tensor for pair in keys_and_values(cache) for tensor in pair if tensor is not None]
    return sum(tensor[0, :, 0].numel() * tensor.element_size() for tensor in tensors)
