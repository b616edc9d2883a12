"""Adapters: what their checkpoints hold, that trainings go on to the same bits, and what they leave to others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import environment
from lm import case, tiny
from outcome import assert_same_bits, losses, only_run, state
from processes import ForkServer, wait_until

QLORA = {"name": "qlora", "r": 4, "dropout": 0.1}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "single-lora": (1, {"train": {"max_steps": 8, "device": "cpu", "log_every": 1, "ema_decay": 0.9}}),
    "ddp-lora": (2, {"strategy": "ddp"}),
    "ddp-qlora": (2, {"strategy": "ddp", "adapter": QLORA}),
    "fsdp-lora": (2, {"strategy": "fsdp"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_killed_training_goes_on_to_the_same_bits(way: str, tmp_path: Path, server: ForkServer) -> None:
    processes, sections = WAYS[way]
    slow = {"name": "lm.sentences", "batch_size": 4 // processes, "delay": 0.4}
    undisturbed = case.config(tmp_path, "undisturbed", **sections, data={**slow, "delay": 0.0})
    killed = case.config(tmp_path, "killed", **sections, data=slow)
    first = server.start("fit", "--config", str(killed), cwd=tmp_path, processes=processes)
    wait_until(lambda: list(tmp_path.glob("runs/killed/*/checkpoints/step-00000004")), f"a checkpoint\n{first.log()}")
    first.kill()
    run = only_run(tmp_path, "killed")
    assert not (run / "checkpoints" / "step-00000008").exists(), "it was to be killed in the middle"
    second = server.start("fit", "--resume", str(run), cwd=tmp_path, processes=processes)
    reference = server.start("fit", "--config", str(undisturbed), cwd=tmp_path, processes=processes)
    assert second.wait() == reference.wait() == [0] * processes, second.log() + reference.log()
    assert_same_bits(run, only_run(tmp_path, "undisturbed"))
    tensors, numbers = state(run)
    trained = {name.split("/")[1] for name in tensors if name.startswith("model/")}
    assert trained and all("lora_" in name for name in trained), "frozen weights are in no checkpoint"
    assert len(numbers["base"]) == 64
    ours, theirs = (path / "adapter" / "adapter_model.safetensors" for path in (run, only_run(tmp_path, "undisturbed")))
    assert ours.read_bytes() == theirs.read_bytes()


def test_one_adapter_on_one_process_or_two_and_from_one_to_the_other(tmp_path: Path, server: ForkServer) -> None:
    lora = {"adapter": {"name": "lora", "r": 4}}
    half = {"data": {"name": "lm.sentences", "batch_size": 2}}
    alone = case.config(tmp_path, "alone", **lora)
    sharded = case.config(tmp_path, "sharded", **lora, **half, strategy="fsdp")
    done = server.start("fit", "--config", str(alone), cwd=tmp_path)
    first = server.start("fit", "--config", str(sharded), "train.max_steps=4", cwd=tmp_path, processes=2)
    assert done.wait() == [0] and first.wait() == [0, 0], done.log() + first.log()
    run = only_run(tmp_path, "sharded")
    second = server.run("fit", "--resume", str(run), "train.max_steps=8", "strategy=auto", cwd=tmp_path)
    assert second.wait() == [0], second.log()
    assert losses(run) == pytest.approx(losses(only_run(tmp_path, "alone")), rel=1e-5)
    tensors, _ = state(run)
    wanted, _ = state(only_run(tmp_path, "alone"))
    for name in wanted:
        if name.startswith("model/"):
            torch.testing.assert_close(tensors[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_beside_its_own_base_only(tmp_path: Path, server: ForkServer) -> None:
    config = case.config(tmp_path, "moved")
    first = server.run("fit", "--config", str(config), "train.max_steps=2", cwd=tmp_path)
    assert first.wait() == [0], first.log()
    run = only_run(tmp_path, "moved")
    tiny.write(tmp_path / "base", seed=1)
    second = server.run("fit", "--resume", str(run), "train.max_steps=4", cwd=tmp_path)
    assert second.wait() == [2]
    (line,) = (line for line in second.log().splitlines() if line.startswith("trainer: error"))
    assert "init_from: the checkpoint was trained beside other frozen weights" in line and "put the former back" in line
    other = server.run("fit", "--resume", str(run), "adapter.r=8", cwd=tmp_path)
    assert other.wait() == [2] and "adapter.r differ" in other.log()


PLAIN_PEFT = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
assert not any(name.split(".")[0] in ("trainer", "recipes") for name in sys.modules)
base, adapter, ids = sys.argv[1], sys.argv[2], torch.arange(5, 60)[None]
ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
auto = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()  # finds the base by what the adapter says of it
with torch.no_grad():
    assert torch.equal(ours(ids).logits, auto(ids).logits)
    print(json.dumps(ours(ids).logits[0].tolist()))
"""


def test_plain_peft_reads_the_best_adapter(tmp_path: Path, server: ForkServer) -> None:
    config = case.config(
        tmp_path,
        "plain",
        adapter={"name": "lora", "r": 4, "rslora": True, "dora": True, "modules_to_save": ["norm"]},
        checkpoint={"every_steps": 2, "monitor": "val/loss", "mode": "max"},  # the best is then an earlier one
    )
    done = server.run("fit", "--config", str(config), cwd=tmp_path)
    assert done.wait() == [0], done.log()
    run = only_run(tmp_path, "plain")
    plain = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", PLAIN_PEFT, str(tmp_path / "base"), str(run / "adapter")]
    other = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, timeout=120)
    assert other.returncode == 0, other.stderr
    theirs = torch.tensor(json.loads(other.stdout))
    torch.testing.assert_close(theirs, _logits(run, "best"), rtol=1e-5, atol=1e-5)
    assert (theirs - _logits(run, "newest")).abs().max() > 1e-3, "the best differs from the last"


def _logits(run: Path, which: str) -> torch.Tensor:
    """What the task's own model says with a checkpoint's weights."""
    from trainer import saving
    from trainer.assembly import build_data, build_task
    from trainer.evaluate import choose
    from trainer.peft_adapter import find_adapted
    from trainer.run import Run

    opened = Run.open(run)
    config = opened.config()
    task = build_task(config, build_data(config))
    found = choose(opened.checkpoints, config, which, print)
    task.model.load_state_dict(saving.load(found.path, found.manifest).model, strict=False)
    model = find_adapted(task.model)
    assert model is not None
    with torch.no_grad():
        return model.eval()(torch.arange(5, 60)[None]).logits[0]  # type: ignore[no-any-return]
