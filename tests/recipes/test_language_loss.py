"""Cross-entropy in chunks against torch's own, on the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.language import loss as ours
from recipes.language.loss import score, summed_cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "CHUNK_BYTES", 4 * 101 * 7)  # seven rows of the vocabulary below


def case(rows: int, kind: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rows)
    hidden, weight, bias = (torch.randn(*shape, generator=draw) for shape in ((rows, 16), (101, 16), (101,)))
    targets = torch.randint(0, 101, (rows,), generator=draw)
    return (3 * hidden).to(kind), weight.to(kind), bias.to(kind), targets


@pytest.mark.parametrize("rows", [1, 6, 7, 8, 50])
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_all_gradients_are_those_of_torch(rows: int, biased: bool) -> None:
    hidden, weight, bias, targets = case(rows)
    leaves = [value.clone().requires_grad_() for value in (hidden, weight, bias)]
    exact = [value.double().requires_grad_() for value in (hidden, weight, bias)]
    (2.5 * summed_cross_entropy(leaves[0], leaves[1], targets, leaves[2] if biased else None)).backward()
    logits = exact[0] @ exact[1].T + (exact[2] if biased else 0)
    reference = 2.5 * F.cross_entropy(logits, targets, reduction="sum")
    reference.backward()
    got = summed_cross_entropy(hidden, weight, targets, bias if biased else None)
    assert 2.5 * got.item() == pytest.approx(reference.item(), rel=1e-6)
    for mine, wanted in zip(leaves[: 2 + biased], exact[: 2 + biased], strict=True):
        assert mine.grad is not None and wanted.grad is not None
        torch.testing.assert_close(mine.grad.double(), wanted.grad, rtol=1e-5, atol=1e-5)
    assert biased or leaves[2].grad is None


def test_a_frozen_output_layer_gets_no_gradient_and_the_hidden_states_theirs() -> None:
    hidden, weight, _, targets = case(20)
    hidden.requires_grad_()
    summed_cross_entropy(hidden, weight, targets).backward()
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.double().T, targets, reduction="sum").backward()
    assert hidden.grad is not None and exact.grad is not None and weight.grad is None
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


def test_a_token_that_is_nearly_certain_keeps_its_gradient() -> None:
    hidden = torch.tensor([[10.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.2]])
    summed_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    exact = torch.tensor([[10.0]], dtype=torch.float64, requires_grad=True)
    F.cross_entropy(exact @ weight.double().T, torch.tensor([0]), reduction="sum").backward()
    assert hidden.grad is not None and exact.grad is not None
    assert hidden.grad.item() == pytest.approx(exact.grad.item(), rel=4e-4)  # logits minus logsumexp: 3e-3


def test_no_target_at_all_is_zero_with_a_graph() -> None:
    hidden, weight, _, targets = case(0)
    hidden.requires_grad_()
    loss = summed_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and hidden.grad.shape == (0, 16)
    losses, hits = score(hidden.detach(), weight, targets)
    assert losses.shape == hits.shape == (0,)


def test_half_precision_computes_logits_in_it_and_the_loss_in_fp32() -> None:
    hidden, weight, _, targets = case(30, torch.bfloat16)
    hidden.requires_grad_()
    got = summed_cross_entropy(hidden, weight, targets)
    got.backward()
    wanted = F.cross_entropy((hidden.detach() @ weight.T).float(), targets, reduction="sum")
    assert got.dtype == torch.float32 and got.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_autocast_computes_logits_in_its_type() -> None:
    hidden, weight, _, targets = case(30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = summed_cross_entropy(hidden, weight, targets)
    logits = hidden.bfloat16() @ weight.bfloat16().T
    assert got.item() == pytest.approx(F.cross_entropy(logits.float(), targets, reduction="sum").item(), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_scores_are_each_targets_loss_and_whether_it_was_the_likeliest(rows: int) -> None:
    hidden, weight, bias, targets = case(rows)
    logits = hidden @ weight.T + bias
    targets[::2] = logits.argmax(1)[::2]
    losses, hits = score(hidden, weight, targets, bias)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-6)
    assert hits.tolist() == (logits.argmax(1) == targets).tolist() and hits[::2].all()
