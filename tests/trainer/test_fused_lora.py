"""LoRA in one pass against PEFT's own forward."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from lora_reference import fill
from peft import LoraConfig, get_peft_model
from torch import nn

from trainer.fused_lora import fuse


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.config = {"model_type": "none", "tie_word_embeddings": False}
        self.first, self.second = nn.Linear(12, 20, bias=bias), nn.Linear(20, 9, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(bias: bool = True, **options: Any) -> tuple[nn.Module, nn.Module, int]:
    """PEFT's model, the same one fused, and how many layers were."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["first", "second"], **options)
    plain: Any = get_peft_model(Net(bias), config)
    fill(plain, 0.5)
    other = deepcopy(plain)
    return plain, other, fuse(other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (1, 1, 12), (0, 12)])
@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_those_of_peft(bias: bool, shape: tuple[int, ...], rslora: bool) -> None:
    plain, fused, count = pair(bias, use_rslora=rslora)
    plain.double(), fused.double()
    assert count == 2
    x = torch.randn(shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(value) for model, value in zip((plain, fused), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    grads = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in (plain, fused)]
    for name, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][name], wanted)
    assert all(p.grad is None for p in fused.parameters() if not p.requires_grad)


def test_nothing_below_the_first_adapter_is_computed_backwards() -> None:
    _, fused, _ = pair()
    x = torch.randn(4, 12)
    fused(x).sum().backward()
    assert x.grad is None


def test_autocast_computes_in_its_type_and_gradients_are_in_the_weights() -> None:
    plain, fused, _ = pair()
    x = torch.randn(6, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [model(x) for model in (plain, fused)]
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.02, atol=0.05)
    outputs[1].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fused.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_what_is_not_plain_keeps_pefts_forward(options: dict[str, Any]) -> None:
    assert pair(**options)[2] == 0


def test_a_disabled_or_merged_adapter_goes_through_peft() -> None:
    plain, fused, _ = pair()
    x = torch.randn(4, 12)
    wanted = plain(x)
    with fused.disable_adapter():  # type: ignore[operator]
        off = fused(x)
    with plain.disable_adapter():  # type: ignore[operator]
        torch.testing.assert_close(off, plain(x))
    fused.merge_adapter()  # type: ignore[operator]
    torch.testing.assert_close(fused(x), wanted, rtol=1e-5, atol=1e-6)
