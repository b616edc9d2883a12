"""The same process as `worker`, with vLLM's engine in it: for machines with a GPU where vLLM is installed.

Written for vLLM 0.33 (`AsyncLLM`, as its own example of streaming uses it). **It has not been run**: there was no GPU
to run it on. Batching, memory and adapters are vLLM's own; bounds of the queue, deadlines, golden prompts are ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from serving.bundle import Bundle
from serving.errors import BadInput, Mistake, ServingError
from serving.language import golden
from serving.language.choosing import Chosen
from serving.language.messages import Ask, Begun, Cancel, Denied, Load, Part, Ready, Refused, Step, TokenLogprob
from serving.language.prompts import Prompts
from serving.language.sampling import Sampling
from serving.language.worker import Line, inherited, verified

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, as vLLM takes them."""


class VllmEngine:
    """vLLM behind the messages of `serving.language.messages`."""

    def __init__(self, line: Line, bundle: Bundle, load: Load) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        folders = {name: bundle.path / folder for name, folder in bundle.adapters.items()}
        more: dict[str, Any] = {}
        if folders:
            rank = max(_rank(folder) for folder in folders.values())
            fitting = next((size for size in RANKS if size >= rank), None)
            if fitting is None:
                raise Mistake(f"{bundle.path}: an adapter of rank {rank}; vLLM takes up to {RANKS[-1]}")
            more = {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": fitting}
        model = bundle.path / bundle.program.file
        arguments = AsyncEngineArgs(
            model=str(model),
            dtype=bundle.program.dtype,
            max_num_seqs=load.max_rows,
            logprobs_mode="raw_logprobs",
            generation_config="vllm",  # none of the folder's own: the request says how, as it does without vLLM
            **more,
        )
        self._engine = AsyncLLM.from_engine_args(arguments)
        self._line, self._bundle = line, bundle
        self._adapters = {name: (number, folder) for number, (name, folder) in enumerate(folders.items(), 1)}
        self.prompts = Prompts(model)
        self.prompts.context = int(self._engine.model_config.max_model_len)
        self.prompts.vocabulary = int(self._engine.model_config.get_vocab_size())
        self._running: dict[int, asyncio.Task[None]] = {}

    async def replay(self) -> golden.Replayed:
        """Answer the golden prompts. Raises ServingError where the answers are not the run's."""
        entries = golden.read(self._bundle)
        for number, entry in enumerate(entries):
            golden.require_prompt(self.prompts, entry, number)
        answers = await asyncio.gather(*(self._golden(number, entry) for number, entry in enumerate(entries)))
        return golden.compare(entries, list(answers), self._bundle.golden.tolerance)

    async def serve(self) -> None:
        """Until the front is gone."""
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        threading.Thread(target=_listen, args=(self._line, inbox, loop), name="requests", daemon=True).start()
        while True:
            message = await inbox.get()
            if isinstance(message, Cancel):
                task = self._running.get(message.id)
                if task is not None:
                    task.cancel()
            else:
                assert isinstance(message, Ask)
                self._running[message.id] = asyncio.create_task(self._answer(message))

    async def _answer(self, ask: Ask) -> None:
        try:
            tokens, sampling = await asyncio.to_thread(self.prompts.parse, ask)
            self._line.send(Begun(ask.id, len(tokens)))
            async for completion in self._generate(str(ask.id), tokens, sampling, ask.adapter):
                logprobs = [] if sampling.logprobs is None else self._told(completion, sampling.logprobs)
                count, finish = len(completion.token_ids), completion.finish_reason
                part = Part(ask.id, count, completion.text, finish, logprobs)
                self._line.send(Step([part], len(self._running), 0))
        except BadInput as error:
            self._line.send(Denied(ask.id, error.field, error.message))
        except asyncio.CancelledError:
            await self._engine.abort(str(ask.id))
        except Exception:  # vLLM's engine is dead or does not know the request: the front starts another
            traceback.print_exc()
            os._exit(1)
        finally:
            self._running.pop(ask.id, None)

    async def _generate(self, name: str, tokens: list[int], sampling: Sampling, adapter: str | None) -> Any:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        wanted = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=sampling.logit_bias or None,
            stop=list(sampling.stop) or None,
            ignore_eos=sampling.ignore_eos,
            logprobs=sampling.logprobs,
            output_kind=RequestOutputKind.DELTA,
        )
        lora = None
        if adapter is not None:
            number, folder = self._adapters[adapter]
            lora = LoRARequest(adapter, number, str(folder))
        prompt = {"prompt_token_ids": tokens}
        async for output in self._engine.generate(prompt, wanted, name, lora_request=lora):
            for completion in output.outputs:
                yield completion

    async def _golden(self, number: int, entry: golden.Golden) -> list[Chosen]:
        chosen = []
        async for completion in self._generate(f"golden-{number}", entry.prompt, golden.sampling(entry), entry.adapter):
            for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
                top = tuple((other, told.logprob) for other, told in position.items())
                chosen.append(Chosen(token, position[token].logprob, top))
        return chosen

    def _told(self, completion: Any, count: int) -> list[TokenLogprob]:
        found = []
        for token, position in zip(completion.token_ids, completion.logprobs, strict=True):
            likeliest = sorted(position.values(), key=lambda told: -told.logprob)[:count]
            top = [(told.decoded_token or "", told.logprob) for told in likeliest]
            found.append(TokenLogprob(position[token].decoded_token or "", token, position[token].logprob, top))
        return found


def _listen(line: Line, inbox: asyncio.Queue[Any], loop: asyncio.AbstractEventLoop) -> None:
    try:
        while True:
            loop.call_soon_threadsafe(inbox.put_nowait, line.receive())
    except (EOFError, OSError):  # the front is gone, and with it everybody who waits for an answer
        os._exit(0)


def _rank(folder: Path) -> int:
    return int(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["r"])


async def main(descriptor: int) -> int:
    """Serve until the front closes the socket; 1 where the bundle can't be served."""
    line, load = inherited(descriptor)
    started = time.monotonic()
    try:
        engine = VllmEngine(line, verified(load), load)
        replayed = await engine.replay()
    except ServingError as error:
        line.send(Refused(str(error), isinstance(error, Mistake)))
        return 1
    except Exception:
        traceback.print_exc()
        line.send(
            Refused(f"{load.path}: vLLM can't load it; see the log, or serve it with --runtime transformers", False)
        )
        return 1
    prompts, seconds = engine.prompts, time.monotonic() - started
    line.send(Ready(prompts.context, 0, prompts.longest_token, replayed.deviation, replayed.count, seconds))
    await engine.serve()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(int(sys.argv[1]))))
