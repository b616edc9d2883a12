"""Predict the next token: pre-training on text, or fine-tuning on conversations, whole or by adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from recipes.language import attention
from recipes.language.answers import Answer, answer, choose, compare, find_metric, write
from recipes.language.base import Base, find
from recipes.language.batches import TokenDataset
from recipes.language.cache import cache_folder
from recipes.language.causal import CausalLM
from recipes.language.conversations import ConversationSplits
from recipes.language.grouping import Layout, group
from recipes.language.preview import preview as show
from recipes.language.tokens import TokenOptions, tokenise
from recipes.metrics.language import LanguageMetrics
from trainer.errors import UserError
from trainer.files import reason
from trainer.task import Batch, Difference, Metrics, Pretrained, Preview, Task


@dataclass(frozen=True)
class Config:
    max_length: Annotated[int, ">= 2"] = 1024
    """Tokens of a conversation at most, and of a sample (whole conversations that are packed into one)."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Whether the loss counts the assistant's tokens alone; plain text is learnt as a whole."""
    too_long: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a conversation that is longer than `max_length`: cut its end off, leave it out, or stop."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """`packed` lays conversations end to end, each attending to itself alone; `padded` makes rows of near-equal length;
    `auto` packs where the model's attention allows it."""
    chat_template: str | None = None
    """File of a Jinja template that turns turns into text; the tokenizer's own where not given."""
    tokenizer: str | None = None
    """Folder, GGUF file or hub id of a tokenizer; that of `init_from` where not given."""
    answers: Annotated[int, ">= 0"] = 0
    """Conversations of each held-out split whose last turn the model gives itself, after the training (and before it,
    with `evaluate.at_start`): `artifacts/<split>/samples.md`, and metrics."""
    answer_tokens: Annotated[int, ">= 1"] = 128
    """Tokens of such an answer at most."""
    answer_metrics: list[str] = field(default_factory=lambda: ["exact_match", "rouge_l", "bleu"])
    """How answers are measured: `exact_match`, `rouge_l`, `bleu`, or a function of your own by its dotted name, which
    takes answers and references, two lists of texts, and returns a number."""


class ModelComponent(Protocol):
    """The model's section of the config."""

    def build(self, **options: Any) -> nn.Module: ...


class AdapterComponent(Protocol):
    """The adapter's section of the config."""

    def build(self, load: Callable[..., nn.Module]) -> nn.Module: ...


class LanguageData:
    """The splits of a data set as tokens, in samples."""

    def __init__(
        self, conversations: ConversationSplits, tokenizer: Any, options: TokenOptions, layout: Layout
    ) -> None:
        self.fingerprint = conversations.fingerprint
        self.notes = list(conversations.notes)
        """Lines for the user, on what was found and what became of it."""
        self.held_out = {name: part for name in ("val", "test") if (part := conversations.split(name)) is not None}
        self._splits: dict[str, TokenDataset] = {}
        for name in ("train", "val", "test"):
            found = conversations.split(name)
            if found is not None:
                tokens = tokenise(found, tokenizer, options, cache_folder(), self.notes.append, name)
                # The same samples for all seeds: the seed decides their order.
                groups = group(tokens.lengths, options.max_length, layout, seed=0)
                self._splits[name] = TokenDataset(tokens, groups, layout, tokenizer.pad_token_id or 0)

    def split(self, name: str) -> TokenDataset | None:
        return self._splits.get(name)


class LanguageModeling(Task):
    """Tokens to the cross-entropy of their successors."""

    data: LanguageData

    def __init__(
        self, config: Config, model: CausalLM, data: LanguageData, tokenizer: Any, pretrained: Pretrained | None
    ) -> None:
        self.model = model
        self.data = data
        self.tokenizer = tokenizer
        self.pretrained = pretrained
        self.answers_wanted = config.answers > 0
        self._config = config
        self._measures = {name.rpartition(".")[2]: find_metric(name) for name in config.answer_metrics}
        self._answered = {name: choose(part, config.answers) for name, part in data.held_out.items() if config.answers}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        """Sum of cross-entropies in nats, and the number of targets."""
        return model(batch), len(batch["chosen"])

    def metrics(self, device: torch.device) -> Metrics:
        splits = (self.data.split(name) for name in ("train", "val", "test"))  # any may be evaluated
        return LanguageMetrics(max((len(split.tokens) for split in splits if split is not None), default=0), device)

    def evaluate(self, model: nn.Module, batch: Batch, metrics: Metrics) -> None:
        assert isinstance(metrics, LanguageMetrics)
        losses, hits = model(batch, per_token=True)
        metrics.update(batch["chosen_document"], losses, hits)

    def answers(self, split: str, rank: int, world_size: int, beat: Callable[[], None]) -> list[Answer]:
        mine = self._answered[split][rank::world_size]
        tokens = self._config.answer_tokens
        return answer(self.model.lm, self.tokenizer, self.data.held_out[split], mine, tokens, beat)

    def judge(self, answers: list[Answer], folder: Path) -> dict[str, float]:
        write(answers, folder)
        texts = [[row[key] for row in answers] for key in ("answer", "reference")]
        return {name: float(measure(*texts)) for name, measure in self._measures.items()}

    def compare_answers(self, answers: list[Answer], before: Path) -> list[Difference]:
        return compare(before, answers, self._measures)


def build(
    config: Config,
    model: ModelComponent,
    data: ConversationSplits,
    init_from: str | None = None,
    adapter: AdapterComponent | None = None,
) -> LanguageModeling:
    base = find(init_from) if init_from is not None else None
    tokenizer = _tokenizer(config, base)
    options = _options(config, tokenizer)
    load = partial(model.build, base=base, tokenizer=tokenizer)
    skeleton = load(device="meta")
    _check_model(skeleton, config.max_length)
    layout = _choose_layout(config.packing, skeleton)
    tokens = LanguageData(data, tokenizer, options, layout)  # before the weights: what is wrong with it shows sooner
    lm: Any = adapter.build(load) if adapter is not None else load()
    if layout == "packed" and attention.of(lm) != attention.FLASH:
        attention.use(lm)
    return LanguageModeling(config, CausalLM(lm), tokens, tokenizer, base)


def preview(
    config: Config, data: ConversationSplits, init_from: str | None, split: str, num: int, seed: int
) -> Preview:
    """For `trainer data preview`: needs the tokenizer, not the weights."""
    tokenizer = _tokenizer(config, find(init_from) if init_from is not None else None)
    options = _options(config, tokenizer)
    return show(data, tokenizer, options, split=split, num=num, seed=seed)


def _tokenizer(config: Config, base: Base | None) -> Any:
    if config.tokenizer is not None:
        return find(config.tokenizer).tokenizer()
    if base is None:
        raise UserError("recipe.tokenizer: is needed to begin from scratch: a folder, a GGUF file or a hub id")
    return base.tokenizer()


def _options(config: Config, tokenizer: Any) -> TokenOptions:
    """How to make tokens; a template of the config becomes the tokenizer's, which is saved with the model."""
    template = None
    if config.chat_template is not None:
        try:
            template = Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = reason(error) if isinstance(error, OSError) else "it is no UTF-8"
            raise UserError(f"recipe.chat_template: {config.chat_template} can't be read ({why})") from error
        tokenizer.chat_template = template
    return TokenOptions(config.max_length, config.train_on, template, config.too_long)


def _check_model(skeleton: Any, max_length: int) -> None:
    if attention.looks_ahead(skeleton):
        raise UserError("model: its attention sees the tokens that are to be predicted; a causal one is needed")
    longest = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise UserError(f"recipe.max_length: is {max_length}, and the model takes {longest} tokens at most")


def _choose_layout(wanted: Literal["auto", "packed", "padded"], skeleton: nn.Module) -> Layout:
    possible = attention.can_pack(skeleton)
    if wanted == "packed" and not possible:
        kind = attention.of(skeleton)
        raise UserError(
            f"recipe.packing: this model's attention ({kind}) can't be told where conversations end; use auto or padded"
        )
    return "padded" if wanted == "padded" or not possible else "packed"
