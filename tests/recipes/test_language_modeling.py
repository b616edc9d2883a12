"""The recipe as a whole: one step against plain transformers and PEFT, evaluation, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm import tiny
from lora_reference import fill, step, targets
from outcome import only_run
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.assembly import build_data, build_task
from trainer.cli import main
from trainer.errors import UserError
from trainer.load import load

WORDS = "sea salt moon tide shell drift"
TALKS = [
    [{"role": "user", "content": WORDS[:length]}, {"role": "assistant", "content": WORDS[length:]}]
    for length in (1, 4, 9, 13, 20, 25, 28)
]
TALKS.append([{"role": "system", "content": "Be brief."}, *TALKS[0], *TALKS[3]])
LORA = {"name": "lora", "r": 4, "alpha": 8.0}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    tiny.write(tmp_path / "base")
    for name, talks in (("train", TALKS), ("val", TALKS[1:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return tmp_path


def config(folder: Path, **sections: Any) -> Path:
    values: dict[str, Any] = {
        "name": "talk",
        "recipe": {"name": "language_modeling", "max_length": 96},
        "model": {"name": "causal_lm"},
        "init_from": str(folder / "base"),
        "adapter": LORA,
        "data": {
            "name": "instructions",
            "path": str(folder / "train.jsonl"),
            "val_path": str(folder / "val.jsonl"),
            "batch_size": 1,
        },
        "optimizer": {"name": "adamw", "lr": 0.01},
        "train": {"max_steps": 2, "max_epochs": None, "log_every": 1, "device": "cpu"},
        "evaluate": {"at_start": True, "every_epochs": None, "test": False},
        "tracking": {"enabled": False},
        "runs_dir": str(folder / "runs"),
    }
    for name, changes in sections.items():
        values[name] = {**values[name], **changes} if isinstance(changes, dict) else changes
    path = folder / "config.yaml"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


def task(folder: Path, **sections: Any) -> Any:
    loaded = load(str(config(folder, **sections)), [])
    return build_task(loaded, build_data(loaded))


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("talks", [TALKS, TALKS[:1]], ids=["many", "one"])
def test_a_step_is_that_of_transformers_and_peft(packing: str, talks: list[Any], folder: Path) -> None:
    (folder / "train.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    ours = task(folder, recipe={"packing": packing})
    fill(ours.model.lm)
    data = ours.data.split("train")
    assert data.layout == packing and (len(data) > 1) == (len(talks) > 1)
    if packing == "packed":
        parts = [data.batch(range(len(data)), 0)]
    else:
        parts = [data.batch([index], 0) for index in range(len(data))]
    count = sum(len(batch["chosen"]) for batch in parts)
    total = 0.0
    for batch in parts:
        loss, part_count = ours.loss(ours.model, batch)
        assert part_count == len(batch["chosen"])
        (loss / count).backward()
        total += loss.item() / count
    gradients = {n.removeprefix("lm."): p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
    for dtype in (torch.float32, torch.float64):
        wanted, reference = step(
            folder / "base", talks, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}, dtype=dtype
        )
        assert total == pytest.approx(wanted, rel=1e-5)
        assert gradients.keys() == reference.keys() and len(gradients) == 2 * 7 * 2
        for name, gradient in reference.items():
            difference = (gradients[name].double() - gradient.double()).abs().max() / gradient.abs().max()
            assert gradient.any() and difference < 1e-5, f"{name}: {difference:.1e}"


def test_a_batch_without_targets_is_zero_with_zero_gradients_everywhere(folder: Path) -> None:
    ours = task(folder)
    fill(ours.model.lm)
    batch = ours.data.split("train").batch([0], 0)
    empty = torch.empty(0, dtype=torch.int64)
    batch |= {"targets": torch.full_like(batch["targets"], -100), "chosen": empty, "chosen_document": empty}
    loss, count = ours.loss(ours.model, batch)
    loss.backward()
    assert loss.item() == 0 and count == 0
    # All of them: a rank that gave none would be waited for by the others
    assert all(p.grad is not None and not p.grad.any() for p in ours.model.parameters() if p.requires_grad)


def test_the_template_of_the_config_is_trained_and_kept(folder: Path) -> None:
    template = tiny.TEMPLATE.replace("</s>", "!</s>")
    (folder / "own.jinja").write_text(template)
    ours = task(folder, recipe={"chat_template": str(folder / "own.jinja")})
    assert ours.tokenizer.chat_template == template
    ids = ours.data.split("train").tokens.document(0)[0]
    talk = ours.tokenizer.apply_chat_template(TALKS[0], tokenize=False)
    assert ours.tokenizer.decode(ids.tolist()) == talk and talk.endswith("!</s>")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"recipe": {"max_length": 513}}, "recipe.max_length: is 513, and the model takes 512 tokens at most"),
        ({"recipe": {"packing": "packed"}, "model": {"name": "causal_lm", "attention": "eager"}}, "recipe.packing: "),
        ({"recipe": {"chat_template": "nowhere.jinja"}}, "recipe.chat_template: nowhere.jinja can't be read (No such"),
        (
            {
                "init_from": None,
                "adapter": None,
                "recipe": {"tokenizer": "base"},
                "model": {"name": "causal_lm", "architecture": {"model_type": "bert"}},
            },
            "model: its attention sees the tokens",
        ),
        ({"init_from": None, "adapter": None}, "recipe.tokenizer: is needed to begin from scratch"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(
    sections: dict[str, Any], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as caught:
        task(folder, **sections)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_eager_attention_is_padded_where_the_choice_is_free(folder: Path) -> None:
    ours = task(folder, model={"name": "causal_lm", "attention": "eager"})
    assert ours.data.split("train").layout == "padded"
    assert task(folder).data.split("train").layout == "packed"


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["adapter"], "adapter: is needed"),
        (["init_from", "adapter"], "init_from: is needed"),
        (["init_from"], "adapter: trains a few weights beside pretrained ones: set init_from"),
    ],
)
def test_the_verb_requires_a_base_and_an_adapter(
    missing: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(folder, **dict.fromkeys(missing))
    capsys.readouterr()
    assert main(["finetune-lora", "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and not (folder / "runs").exists()


def test_the_start_is_evaluated_once_and_compared_with_the_end(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(folder, recipe={"packing": "auto"})
    assert main(["finetune-lora", "--json", "--config", str(path)]) == 0
    first = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    run = only_run(folder, "talk")
    with (run / "artifacts" / "before" / "val" / "documents.csv").open(newline="") as file:
        rows = {int(row["document"]): row for row in csv.DictReader(file)}
    total, count = _assert_direct(folder, rows)

    compared = {row["metric"]: row for row in first["compared"]["val"]}
    assert compared["loss"]["before"][0] == pytest.approx(total / count, rel=1e-5)
    assert compared["loss"]["after"][0] == pytest.approx(first["metrics"]["val/loss"], rel=1e-9)
    assert first["tokens_per_second"] > 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [entry["tokens"] for entry in logged if "tokens" in entry]
    assert len(trained) == 2 and 0 < trained[0] < trained[1]
    assert all(entry["tokens_per_second"] > 0 for entry in logged if "tokens" in entry)

    assert main(["fit", "--json", "--resume", str(run), "train.max_steps=6"]) == 0
    second = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    again = {row["metric"]: row for row in second["compared"]["val"]}
    assert again["loss"]["before"] == compared["loss"]["before"]
    assert again["loss"]["after"] != compared["loss"]["after"]
    value, before, after = again["loss"]["change"][0], again["loss"]["before"][0], again["loss"]["after"][0]
    assert value == pytest.approx(after - before) and value < 0

    for split in ("train", "val"):  # the former has more documents
        assert main(["evaluate", str(run), "--split", split, "--json"]) == 0
    with (run / "artifacts" / "train" / "documents.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(TALKS)


def _assert_direct(folder: Path, rows: dict[int, dict[str, str]]) -> tuple[float, int]:
    """Hold each document's sums against one forward of the base; returns the sum over all, and its targets."""
    base, tokenizer = (kind.from_pretrained(folder / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    total, count = 0.0, 0
    assert len(rows) == 5
    for index, talk in enumerate(TALKS[1:6]):
        ids, labels = targets(tokenizer, talk, after_end=False)
        with torch.no_grad():
            logits = base(input_ids=ids[None]).logits[0, :-1]
        wanted = labels[1:] >= 0
        losses = F.cross_entropy(logits[wanted], labels[1:][wanted], reduction="none")
        assert float(rows[index]["loss"]) == pytest.approx(float(losses.sum()), rel=1e-5)
        assert int(rows[index]["correct"]) == int((logits[wanted].argmax(-1) == labels[1:][wanted]).sum())
        assert int(rows[index]["tokens"]) == int(wanted.sum())
        total, count = total + float(losses.double().sum()), count + int(wanted.sum())
    return total, count


def test_a_fold_of_conversations_is_trained_on(folder: Path) -> None:
    path = config(folder, evaluate={"at_start": False}, recipe={"answers": 2})
    assert main(["fit", "--config", str(path), "holdout.method=k_fold", "holdout.folds=3", "holdout.fold=1"]) == 0
    (run,) = (folder / "runs" / "talk").glob("2*")
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/loss" in entry for entry in entries)
    cut = build_data(load(str(run / "config.yaml"), []))
    found = {name: part for name in ("train", "val") if (part := cut.split(name)) is not None}
    said = {name: {part[index].digest() for index in range(len(part))} for name, part in found.items()}  # type: ignore[attr-defined]
    assert said["train"] and said["val"] and not said["train"] & said["val"], "what val repeats is on one side now"
    assert sum(map(len, found.values())) == len(TALKS) + 5
