"""A causal language model as the loop calls it: from a micro-batch of tokens to the sum of its cross-entropies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.language import attention
from recipes.language.loss import score, summed_cross_entropy
from trainer.task import Batch

_BENT_LOGITS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "output_multiplier",
    "unpadded_vocab_size",
)
"""Settings of models that change their logits after the output layer."""


class CausalLM(nn.Module):
    """Wraps a transformers model, or a PEFT model around one.

    Logits are computed only at positions that have a target: a prompt's tokens need none, and in a small model the
    vocabulary is a third of the work.
    """

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        causal = self._causal
        head = causal.get_output_embeddings()
        plain = all(getattr(causal.config.get_text_config(), name, None) is None for name in _BENT_LOGITS)
        # What else stands beside the decoder has a part in the logits, e.g. the transformation before BERT's output
        parts = {name for name, child in causal.named_children() if child is not head}
        self._is_plain = plain and type(head) is nn.Linear and parts == {causal.base_model_prefix}
        """Whether logits are nothing but the output layer of the decoder's last hidden states."""

    def forward(self, batch: Batch, per_token: bool = False) -> Any:
        """The sum of cross-entropies over all targets of the micro-batch: a scalar in fp32 with a graph.

        With `per_token`, for evaluation: the cross-entropy [N] of each target, and whether the likeliest token is the
        right one [N].
        """
        if self._is_plain:
            hidden, targets = self._hidden(batch)
            head = self._causal.get_output_embeddings()
            loss = score if per_token else summed_cross_entropy
            return loss(hidden, head.weight, targets, head.bias)
        logits, targets = self._logits(batch)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        return (losses, logits.argmax(-1) == targets) if per_token else losses.sum()

    @property
    def _causal(self) -> Any:
        lm: Any = self.lm
        return lm.get_base_model() if hasattr(lm, "get_base_model") else lm

    def _arguments(self, batch: Batch) -> tuple[dict[str, Any], Tensor]:
        inputs, targets = _inputs(batch)
        if attention.of(self._causal) == attention.NAME:
            inputs["starts"] = batch["starts"]
        return inputs, targets

    def _hidden(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states [N, D] after the decoder's last norm, and targets [N], where there are targets."""
        causal = self._causal
        inputs, targets = self._arguments(batch)
        chosen = batch["chosen"]
        output = getattr(causal, causal.base_model_prefix)(**inputs)
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)[chosen], targets.flatten()[chosen]

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [N, V] as the model's own forward makes them."""
        inputs, targets = self._arguments(batch)
        columns = torch.unique(batch["chosen"] % targets.shape[1])  # transformers keeps the same ones of all rows
        logits: Tensor = self._causal(**inputs, logits_to_keep=columns).logits
        wanted = targets[:, columns]
        return logits[wanted != -100], wanted[wanted != -100]


def _inputs(batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a transformers model, and targets [rows, length]."""
    names = ("input_ids", "position_ids", "attention_mask")
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    targets: Tensor = batch["targets"]
    if "starts" in batch:  # packed: one row
        inputs = {name: value[None] for name, value in inputs.items()}
        targets = targets[None]
    return {**inputs, "use_cache": False}, targets
