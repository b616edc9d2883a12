"""A GGUF file as a folder of fp32 safetensors: `python -m workloads.lora_base FILE FOLDER`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(file: str, to: str) -> None:
    source, folder = Path(file), Path(to)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # What was read are plain fp32 weights; a folder that called itself quantised would not load as such.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)


if __name__ == "__main__":
    main(*sys.argv[1:])
