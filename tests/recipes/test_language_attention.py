"""Packed documents against each one alone in plain transformers, for many families of models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.language import attention
from recipes.language.batches import TokenDataset
from recipes.language.causal import CausalLM
from recipes.language.grouping import Layout, group
from recipes.language.tokens import Tokens

VOCABULARY = 97
LENGTHS = (1, 17, 2, 9, 30, 1, 5)
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
PACKED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "mistral-sliding": {"sliding_window": 7},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "gemma": {},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {},
    "gpt_neox": {},
    "granitemoe": {"logits_scaling": 4.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 2},
    "minicpm3": LATENT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bert": {"is_decoder": True},  # its output layer comes after one more
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("eager", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "sliding_window": 6}),
    "bloom": ("eager", {"n_layer": 2, "n_head": 4}),
    "llama": ("eager", {}),
    "nemotron": ("sdpa", {}),  # makes a mask of its own
    "doge": ("sdpa", {}),  # so does this one
    "recurrent_gemma": ("sdpa", {"lru_width": 32, "attention_window_size": 64}),
}


def model(name: str, changes: dict[str, Any], implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition("-")[0], **(TINY | changes))
    made = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():  # what transformers begins with as zeros or ones would hide what is left out
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def documents() -> tuple[Tokens, list[Tensor]]:
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, VOCABULARY, length).astype(np.int32) for length in LENGTHS]
    is_target = np.concatenate([(draw.random(length) < 0.7) & (np.arange(length) > 0) for length in LENGTHS])
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    tokens = Tokens(np.concatenate(ids), is_target, offsets, np.arange(len(LENGTHS)), "")
    return tokens, [torch.from_numpy(part.astype(np.int64)) for part in ids]


def alone(causal: Any) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each document: losses of its targets, and logits at them, by one forward for each."""
    tokens, ids = documents()
    found = {}
    for index, document in enumerate(ids):
        counted = torch.from_numpy(tokens.document(index)[1].copy()).nonzero()[:, 0]
        with torch.no_grad():
            logits = causal(input_ids=document[None], use_cache=False).logits[0, counted - 1].float()
        found[index] = F.cross_entropy(logits, document[counted], reduction="none"), logits
    return found


def together(causal: Any, layout: Layout) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Of each document: losses and hits of its targets through `CausalLM`, all in one batch; and the batch's sum."""
    tokens, _ = documents()
    data = TokenDataset(tokens, group(tokens.lengths, 40, layout, 0), layout)
    lm = CausalLM(causal)
    found = {}
    for indices in [range(len(data))] if layout == "packed" else [[index] for index in range(len(data))]:
        batch = data.batch(indices, 0)
        with torch.no_grad():
            losses, hits = lm(batch, per_token=True)
            total = lm(batch)
        assert total.item() == pytest.approx(losses.sum().item(), rel=1e-5, abs=1e-6)
        for document in batch["document"].tolist():
            mine = batch["chosen_document"] == document
            found[document] = losses[mine], hits[mine], total
    return found


def assert_same(causal: Any, layout: Layout, wanted: dict[int, tuple[Tensor, Tensor]]) -> None:
    got = together(causal, layout)
    assert got.keys() == wanted.keys()
    assert sum(len(losses) for losses, _ in wanted.values()) > 30
    for index, (losses, logits) in wanted.items():
        torch.testing.assert_close(got[index][0], losses, rtol=1e-5, atol=1e-5, msg=lambda m, i=index: f"{i}: {m}")
        _, ids = documents()
        counted = torch.from_numpy(documents()[0].document(index)[1].copy())
        assert got[index][1].tolist() == (logits.argmax(-1) == ids[index][counted]).tolist()


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_are_predicted_as_if_each_stood_alone(name: str) -> None:
    causal = model(name, PACKED[name])
    wanted = alone(causal)
    assert attention.can_pack(causal)
    assert_same(causal, "padded", wanted)
    attention.use(causal)
    assert_same(causal, "packed", wanted)


@pytest.mark.parametrize("name", PADDED)
def test_a_model_whose_attention_is_another_is_padded(name: str) -> None:
    implementation, changes = PADDED[name]
    causal = model(name, changes, implementation)
    assert not attention.can_pack(causal) and attention.of(causal) == implementation
    assert_same(causal, "padded", alone(causal))


def test_a_model_that_sees_what_comes_after_is_none_for_this() -> None:
    causal = model("bert", {})
    assert attention.looks_ahead(causal) and not attention.can_pack(causal)
    assert not attention.looks_ahead(model("bert", {"is_decoder": True}))


def test_a_skeleton_without_weights_tells_whether_it_can_be_packed() -> None:
    with torch.device("meta"):
        for name in ("llama", "mixtral", "nemotron"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **TINY), attn_implementation="sdpa")
            assert attention.can_pack(skeleton) == (name != "nemotron")
            assert attention.of(skeleton) == "sdpa"
