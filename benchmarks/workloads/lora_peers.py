"""The peers of `lora_speed.py`, each in a process of its own: `python -m workloads.lora_peers PEER WORK FOLDER`.

WORK is `Work.as_json()`. Into FOLDER go the adapter and `result.json`: tokens and seconds of the timed steps, and the
training loss. What they share beside `Work` is the clock: a step's tokens are counted where the batch meets the model,
padding left out, and a step ends where the Trainer says so.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from workloads.lora import Work, load, lora, read, tokenise


class Clock(TrainerCallback):
    """Tokens and seconds after the warm-up."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.steps = 0
        self.tokens = 0
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(self, arguments: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.warmup_steps:
            self.tokens, self._began = 0, time.perf_counter()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **others: Any) -> None:
        self.steps, self.seconds = state.global_step, time.perf_counter() - self._began


def counted(kind: type[Trainer], clock: Clock) -> type[Trainer]:
    """This Trainer, which tells the clock how many tokens each micro-batch holds."""

    class Counted(kind):
        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **others: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            clock.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *rest, **others)

    return Counted


def common(work: Work, folder: Path) -> dict[str, Any]:
    """Arguments in which the peers agree with us; the others stay as they come. Nothing is saved in the training."""
    return {
        "output_dir": str(folder / "output"),
        "num_train_epochs": 1,
        "max_steps": work.max_steps or -1,
        "learning_rate": work.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": work.clip_norm,
        "bf16": work.precision == "bf16-mixed",
        "use_cpu": not torch.cuda.is_available(),
        "seed": work.seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "disable_tqdm": True,
    }


def trainer_peft(work: Work, folder: Path, clock: Clock) -> Trainer:
    """transformers' Trainer with `get_peft_model` as PEFT's documentation has it: rows in random order, each batch
    padded to its longest row, the prompt masked by labels."""
    from peft import get_peft_model

    model, tokenizer = load(work)
    model = get_peft_model(model, lora(work))
    rows = Dataset.from_list([{"messages": messages} for messages in read(work.train)])
    rows = rows.map(lambda row: tokenise(tokenizer, row["messages"]), remove_columns=["messages"])
    return counted(Trainer, clock)(
        model=model,
        args=TrainingArguments(per_device_train_batch_size=work.rows_per_step, **common(work, folder)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[clock],
    )


def trl_packed(work: Work, folder: Path, clock: Clock) -> Trainer:
    """TRL's SFTTrainer with best-fit packing, which makes it padding-free.

    One packed sequence a micro-batch: without flash attention, the attention is as wide as all sequences of the
    micro-batch together. (Three in one took 1.3 times as long, and twice the memory, on two cores.) Its default of
    recomputing activations is off: nobody else does it.
    """
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(work)
    rows = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in read(work.train)]
    return counted(SFTTrainer, clock)(
        model=model,
        args=SFTConfig(
            packing=True,
            packing_strategy="bfd",
            max_length=work.max_length,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=work.packs_per_step,
            completion_only_loss=True,
            gradient_checkpointing=False,
            **common(work, folder),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(work),
        callbacks=[clock],
    )


PEERS = {"trainer-peft": trainer_peft, "trl-packed": trl_packed}


def main(name: str, text: str, to: str) -> None:
    work, folder = Work.from_json(text), Path(to)
    clock = Clock(work.warmup_steps)
    trainer = PEERS[name](work, folder, clock)
    trained = trainer.train()
    trainer.model.save_pretrained(folder / "adapter")
    result = {
        "steps": clock.steps,
        "timed_steps": clock.steps - work.warmup_steps,
        "tokens": clock.tokens,
        "seconds": clock.seconds,
        "train_loss": trained.training_loss,
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
