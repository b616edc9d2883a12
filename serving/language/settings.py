"""How a language model is served: how many answers at once, how long a queue, how much memory."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.errors import Mistake
from serving.workers.settings import cores

Runtime = Literal["auto", "transformers", "vllm"]


@dataclass(frozen=True)
class LanguageSettings:
    """Of one model; seconds and tokens."""

    threads: int | None = None
    """Of the engine; as many as `cores` by default."""
    cores: int | None = None
    """By default all that this process may use."""
    max_rows: int = 16
    """Answers that are made at once."""
    queue: int = 64
    """Requests that may wait beside them."""
    kv_tokens: int | None = None
    """Tokens to keep keys and values of, each row padded to the longest; by default what a quarter of the free memory
    holds. A prompt with its answer can't be longer."""
    chunk: int = 256
    """Tokens of a prompt that are read between two tokens of the running answers."""
    deadline: float = 300.0
    """Longest that an answer may take; a request may ask for less."""
    drain_seconds: float = 30.0
    """How long an old version may take to answer what it holds after a reload."""
    start_seconds: float = 600.0
    """How long an engine may take to load and to answer its golden prompts."""
    hang_seconds: float = 120.0
    """An engine that holds requests and has said nothing for so long is killed."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is a device."""
    runtime: Runtime = "auto"
    """`auto`: vLLM where there is CUDA and it is installed, else transformers."""

    def threads_used(self) -> int:
        """Threads of the engine."""
        return self.threads or self.cores or cores()

    def worker(self) -> str:
        """The module of the engine's process. Raises Mistake for a vLLM that is not installed."""
        has_vllm = importlib.util.find_spec("vllm") is not None
        if self.runtime == "vllm" and not has_vllm:
            raise Mistake("runtime vllm: vLLM is not installed; install it, or take transformers")
        has_gpu = self.device != "cpu" and any(Path("/dev").glob("nvidia[0-9]*"))
        return (
            "vllm_worker" if self.runtime == "vllm" or (self.runtime == "auto" and has_gpu and has_vllm) else "worker"
        )
