"""Attention of packed documents: each token sees its own document only, as if it stood alone.

Documents lie end to end in one row, without padding; this function, registered with transformers as `documents`,
cuts queries, keys and values at the documents' borders and calls torch's fused causal attention for each. Work grows
with the sum of squared document lengths, not with the square of the sum, and no mask is made.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from trainer.errors import UserError

NAME = "documents"
"""As `attn_implementation`."""
_UNDERSTOOD = {
    "position_ids",
    "cu_seq_lens_q",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "is_causal",
}
"""Arguments of transformers that change nothing here."""


FLASH, SDPA = "flash_attention_2", "sdpa"
"""transformers' own; the first finds the documents by their positions."""


def use(model: Any) -> None:
    """Let a transformers model, or a PEFT model around one, attend by documents; each call then says `starts`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    causal.set_attn_implementation(NAME)


def of(model: Any) -> str:
    """The model's attention implementation."""
    return str(model.config._attn_implementation)


def looks_ahead(model: Any) -> bool:
    """Whether no attention of the model is causal (BERT and the like, where `is_decoder` is not set)."""
    flags = [bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")]
    return bool(flags) and not any(flags)


def can_pack(model: Any) -> bool:
    """Whether the model's attention goes through transformers' interface in every layer, and is plain.

    Args:
        model: transformers', without an adapter; on the device `meta` the answer costs next to nothing.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        getattr(model, "_supports_attention_backend", False)
        and of(model) in (FLASH, SDPA)
        and getattr(config, "attn_logit_softcapping", None) is None
        and kinds <= {"full_attention", "sliding_attention"}
        and not looks_ahead(model)
        and (of(model) == FLASH or _takes_documents(model))
    )


def _takes_documents(model: Any) -> bool:
    """Whether two documents go through: some models make a mask of their own all the same, or ask for more."""
    before = of(model)
    use(model)
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        with torch.no_grad():
            model(input_ids=ids, position_ids=torch.zeros_like(ids), starts=(0, 1, 2), use_cache=False)
    except (UserError, TypeError):  # the latter of a forward without other arguments
        return False
    except (RuntimeError, NotImplementedError):
        pass  # a mixture of experts can't be routed without numbers; its first attention has been passed by then
    finally:
        model.set_attn_implementation(before)
    return True


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    starts: tuple[int, ...] = (),
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document.

    Args:
        query: [1, heads, T, head_dim]; `key` and `value` may have fewer heads, each shared by a group of queries'.
        attention_mask: none is wanted.
        starts: where documents begin, and the end of the last: 0, ..., T.

    Returns [1, T, heads, head_dim] and no weights.
    """
    strange = {name for name, value in others.items() if value is not None} - _UNDERSTOOD
    strange |= {"is_causal"} if others.get("is_causal") is False or not getattr(module, "is_causal", True) else set()
    if strange or attention_mask is not None or len(query) != 1 or not starts:
        what = ", ".join(sorted(strange)) or "a mask, a cache or a batch of several rows"
        raise UserError(f"recipe.packing: this model's attention uses {what}; set recipe.packing=padded")
    groups = query.shape[1] // key.shape[1]
    lengths = [end - start for start, end in pairwise(starts)]
    parts = [
        scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_window(length, sliding_window, q.device),
            dropout_p=dropout,
            is_causal=sliding_window is None or length <= sliding_window,
            scale=scaling,
            enable_gqa=groups > 1,
        )
        for length, q, k, v in zip(
            lengths, *(torch.split(whole, lengths, 2) for whole in (query, key, value)), strict=True
        )
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], 1), None


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Mask [length, length] of a sliding window where the document is longer than it."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)
