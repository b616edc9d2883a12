"""Answers to held-out prompts: metrics against slow references, and a training that writes them."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from lm import tiny

from recipes.language.answers import bleu, compare, exact_match, find_metric, rouge_l, write
from trainer.cli import main
from trainer.errors import UserError

WORDS = st.lists(st.sampled_from(["ab", "c", "d"]), max_size=6)


def slow_common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, by looking at all of them."""
    inside = {tuple(part) for size in range(len(other) + 1) for part in combinations(other, size)}
    return max(len(part) for size in range(len(one) + 1) for part in combinations(one, size) if part in inside)


@given(WORDS, WORDS)
@settings(max_examples=60, deadline=None)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(one: list[str], other: list[str]) -> None:
    common = slow_common(one, other)
    precision, recall = common / len(one) if one else 0, common / len(other) if other else 0
    wanted = 2 * precision * recall / (precision + recall) if precision + recall else float(not one and not other)
    assert rouge_l([" ".join(one)], [" ".join(other)]) == pytest.approx(wanted)


def test_case_and_marks_do_not_count_for_rouge_and_white_space_not_for_exact_match() -> None:
    assert rouge_l(["The CAT, sat."], ["the cat sat"]) == 1
    assert exact_match([" 18\n", "The"], ["18", "the"]) == 0.5


def test_bleu_is_sacrebleus() -> None:
    answers, references = ["the cat sat on the mat", "no"], ["the cat sat on a mat", "yes"]
    assert bleu(answers, references) == sacrebleu.corpus_bleu(answers, [references]).score


@pytest.mark.parametrize("name", ["rouge", "nowhere.metric", "json.nothing", "json.__name__"])
def test_a_metric_that_is_none_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"recipe\.answer_metrics: ") as caught:
        find_metric(name)
    assert "\n" not in str(caught.value)


def config(folder: Path, **recipe: Any) -> Path:
    tiny.write(folder / "base")
    rows = [{"prompt": f"What is {n} + {n}?", "completion": str(2 * n)} for n in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "answers",
        "recipe": {"name": "language_modeling", "max_length": 64, "answers": 3, "answer_tokens": 4, **recipe},
        "init_from": str(folder / "base"),
        "adapter": {"name": "lora", "r": 2},
        "model": "causal_lm",
        "data": {"name": "instructions", "path": str(folder / "sums.jsonl"), "batch_size": 4},
        "optimizer": "adamw",
        "schedule": "constant",
        "train": {"max_steps": 2, "device": "cpu"},
        "evaluate": {"at_start": True},
        "tracking": {"enabled": False},
        "runs_dir": str(folder / "runs"),
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "config.json"


def test_a_training_writes_answers_before_and_after_and_measures_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own_metric.py").write_text("def length(answers, references):\n    return len(answers) + 0.5\n")
    monkeypatch.chdir(tmp_path)
    path = config(tmp_path, answer_metrics=["exact_match", "rouge_l", "bleu", "own_metric.length"])
    assert main(["fit", "--config", str(path), "--json"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"]["val/length"] == 3.5
    assert {"val/exact_match", "val/rouge_l", "val/bleu"} <= result["metrics"].keys()
    for place in ("before/val", "val"):
        folder = Path(result["run"]) / "artifacts" / place
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert len(rows) == 3 and {"place", "prompt", "reference", "answer"} == rows[0].keys()
        assert all(row["reference"] == str(2 * int(row["prompt"][-1]["content"].split()[2])) for row in rows)
        assert (folder / "samples.md").read_text().count("**reference**") == 3
    names = ["loss", "perplexity", "token_accuracy", "exact_match", "rouge_l", "bleu", "length"]
    assert [row["metric"] for row in result["compared"]["val"]] == names
    assert result["compared"]["val"][-1]["change"] == [0.0, 0.0, 0.0]


def test_answers_are_compared_prompt_by_prompt_with_intervals(tmp_path: Path) -> None:
    rows = [
        {"place": f"f:{n}", "prompt": [], "reference": str(n), "answer": str(n if n < 10 else -1)} for n in range(40)
    ]
    write(rows, tmp_path)
    better = [{**row, "answer": row["reference"] if n < 30 else "no"} for n, row in enumerate(rows)]
    (row,) = compare(tmp_path, better, {"exact_match": exact_match})
    assert (row.before[0], row.after[0], row.change[0]) == (0.25, 0.75, 0.5)
    assert 0.05 < row.before[1] < 0.25 < row.before[2] < 0.45
    assert 0.3 < row.change[1] < 0.5 < row.change[2] < 0.7
    assert compare(tmp_path / "nowhere", better, {"exact_match": exact_match}) == []
