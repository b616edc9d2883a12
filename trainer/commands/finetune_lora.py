"""Fine-tune a language model with LoRA or QLoRA; without --config, a small one on questions of arithmetic.

trainer finetune-lora                                       configs/lora-smollm2.yaml: ten minutes on two cores
trainer finetune-lora --config FILE init_from=MODEL data.path=FILE.jsonl
It is `trainer fit` for a config with `init_from` and `adapter`; a run goes on with `trainer fit --resume RUN`, too.
"""

from __future__ import annotations

import argparse

from trainer.commands import fit
from trainer.config import RunConfig
from trainer.errors import UserError

SHIPPED = "lora-smollm2.yaml"


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of `fit`."""
    fit.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Train the adapter."""
    if not args.config and not args.resume:
        args.config = SHIPPED
    return fit.run(args, _require_adapter)


def _require_adapter(config: RunConfig) -> None:
    if config.init_from is None:
        raise UserError("init_from: is needed: a folder, a GGUF file or a hub id of the model to fine-tune")
    if config.adapter is None:
        raise UserError("adapter: is needed: lora or qlora; `trainer fit` trains all weights")
