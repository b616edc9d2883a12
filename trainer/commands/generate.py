"""Try a language model: one prompt, a file of prompts, or a chat in the terminal.

trainer generate RUN --prompt "What is a ledger?"       the run's best checkpoint, or a folder that merge has written
trainer generate FOLDER                                 a chat; Ctrl-C stops an answer, Ctrl-D ends the chat
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from trainer.generate import Sampling


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("model", metavar="RUN|FOLDER", help="a run, or a folder that transformers or PEFT reads")
    parser.add_argument("--checkpoint", default="best", help="of a run: best, newest, or a step (default: best)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="one question")
    source.add_argument("--file", metavar="FILE", help=".jsonl with `prompt` or `messages`, else one prompt a line")
    parser.add_argument("--system", metavar="TEXT", help="system message before each conversation")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn, with a temperature (0)")


def run(args: argparse.Namespace) -> int:
    """Load the model and answer."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: wanted 1 or more")
    if not args.temperature >= 0:
        raise UserError(f"--temperature {args.temperature}: wanted 0 or more")
    if args.json and args.prompt is None and args.file is None:
        raise UserError("--json: needs --prompt or --file; a chat is for the terminal")
    import torch

    from trainer.generate import Sampling, answer
    from trainer.language_model import read_prompts

    asked = read_prompts(Path(args.file)) if args.file else [[{"role": "user", "content": args.prompt}]]
    model, tokenizer = _open(args)
    torch.manual_seed(args.seed)
    sampling = Sampling(args.max_new_tokens, args.temperature)
    system = [{"role": "system", "content": args.system}] if args.system else []
    if args.prompt is None and args.file is None:
        _chat(model, tokenizer, system, sampling)
        return EXIT_DONE
    answers = []
    for messages in asked:
        if args.file and not args.json:
            print(f"> {messages[-1]['content']}", flush=True)
        answers.append(answer(model, tokenizer, [*system, *messages], sampling, streams=not args.json))
    if args.json:
        rows = [{"messages": m, "answer": a} for m, a in zip(asked, answers, strict=True)]
        print(json.dumps({"model": args.model, "answers": rows}))
    return EXIT_DONE


def _open(args: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    from trainer.language_model import open_folder, open_run
    from trainer.run import Run

    folder = Path(args.model)
    if folder.is_dir() and not (folder / "run.json").is_file():
        model, tokenizer = open_folder(folder)
    else:
        run = Run.open(args.model)
        opened = open_run(run, run.config(), args.checkpoint, lambda text: print(text, file=sys.stderr))
        model, tokenizer = opened.model, opened.task.tokenizer
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _chat(model: Any, tokenizer: Any, system: list[dict[str, str]], sampling: Sampling) -> None:
    """Turn after turn until Ctrl-D, or Ctrl-C at the prompt."""
    from trainer.generate import answer

    messages = list(system)
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        try:
            said = answer(model, tokenizer, messages, sampling, streams=True)
        except KeyboardInterrupt:  # the answer is stopped, and the question forgotten with it
            print("\n(stopped)")
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": said})
