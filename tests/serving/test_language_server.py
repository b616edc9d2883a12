"""A real server of a language model with adapters: the official client, streams, bad input, a killed engine."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import language_bundles
import language_servers
import openapi_fuzz
import pytest
import soak
from language_servers import Server
from lm import tiny

openai = pytest.importorskip("openai")

TOKENIZER = tiny.tokenizer()
HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_bundles.write(tmp_path_factory.mktemp("served") / "tiny", adapters=["red"]).path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with language_servers.serve(folder, "--max-rows", "4", "--kv-tokens", "3000") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str | None, Any]:
    return {name: language_bundles.reference(folder, name) for name in (None, "red")}


def _text(model: Any, prompt: str, count: int, **options: Any) -> str:
    """What plain `generate` says after a text."""
    ids = TOKENIZER(prompt).input_ids
    said: str = TOKENIZER.decode(language_bundles.greedy(model, ids, count, **options), skip_special_tokens=True)
    return said


def _conversation(content: str) -> str:
    text: str = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def test_the_official_client(client: Any, references: dict[str | None, Any]) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:red"]
    assert client.models.retrieve("tiny").owned_by == "trainer"
    wanted = _text(references[None], _conversation("Hello there"), 12)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == wanted and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    prompt_tokens = len(TOKENIZER(_conversation("Hello there")).input_ids)
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.total_tokens == prompt_tokens + answer.usage.completion_tokens


def test_the_official_client_streams(client: Any, references: dict[str | None, Any]) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_completion_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *said, last = chunks
    assert said[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in said)
    assert text == _text(references[None], _conversation("Hello there"), 12)
    assert [chunk.choices[0].finish_reason for chunk in said][-1] in ("stop", "length")
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("name", ["tiny:red", "red"])
def test_an_adapter_by_its_name(name: str, client: Any, references: dict[str | None, Any]) -> None:
    answer = client.completions.create(model=name, prompt="abc", max_tokens=10, temperature=0)
    assert answer.model == name
    assert answer.choices[0].text == _text(references["red"], "abc", 10) != _text(references[None], "abc", 10)


def test_ragged_concurrent_requests_get_the_tokens_of_plain_generate(
    client: Any, references: dict[str | None, Any]
) -> None:
    prompts = ["x" * length for length in (1, 3, 150, 40, 7, 90, 2, 60)]
    adapters = [None, "red"] * 4
    wanted = [_text(references[a], p, 16) for p, a in zip(prompts, adapters, strict=True)]

    def ask(prompt: str, adapter: str | None) -> str:
        model = "tiny" if adapter is None else f"tiny:{adapter}"
        stream = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(ask, prompts, adapters)) == wanted


def test_stop_strings_choices_and_log_probabilities(client: Any, references: dict[str | None, Any]) -> None:
    whole = _text(references[None], "abc", 16, eos_token_id=None)
    stop = next(whole[i : i + 2] for i in range(3, len(whole)) if "\ufffd" not in whole[i : i + 2])
    options = {"model": "tiny", "prompt": "abc", "max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
    (choice,) = client.completions.create(**options, stop=[stop, "never"]).choices
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    stream = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole[: whole.index(stop)]

    drawn = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "seed": 5, "temperature": 1.2}
    first, again = (client.chat.completions.create(**drawn, n=2) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and texts[0] != texts[1]
    one = client.chat.completions.create(**drawn, logprobs=True, top_logprobs=2)
    entries = one.choices[0].logprobs.content
    assert len(entries) == one.usage.completion_tokens
    assert all(len(e.top_logprobs) == 2 and e.top_logprobs[0].logprob >= e.logprob for e in entries)
    told = client.completions.create(model="tiny", prompt=["a", [5, 6]], max_tokens=2, logprobs=1)
    assert [choice.index for choice in told.choices] == [0, 1] and len(told.choices[1].logprobs.tokens) >= 1


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("chat/completions", b"{", 400, "not JSON"),
        ("chat/completions", {"model": "tiny"}, 400, "messages"),
        ("chat/completions", {"model": "other", "messages": HELLO}, 404, "there is no model 'other'"),
        ("chat/completions", {"model": "tiny", "messages": HELLO, "temperature": -1}, 400, "temperature: expected"),
        ("chat/completions", {"model": "tiny", "messages": HELLO, "max_tokens": 600}, 400, "takes 512 in all"),
        ("completions", {"model": "tiny", "prompt": "x" * 600}, 400, "has 600 tokens"),
        ("completions", {"model": "tiny", "prompt": "x" * 100_000}, 400, "more than 512 tokens"),
        ("completions", {"model": "tiny", "prompt": ""}, 400, "has no tokens"),
        ("completions", {"model": "tiny", "prompt": [5, 100_000]}, 400, "a token that this model does not have"),
        ("completions", {"model": "tiny", "prompt": "a", "logit_bias": {"9999": 1}}, 400, "logit_bias: token 9999"),
    ],
)
def test_bad_input_is_one_line_in_openai_s_form(
    path: str, body: Any, status: int, message: str, server: Server
) -> None:
    found, _, content = server.ask(f"/v1/{path}", body)
    error = json.loads(content)["error"]
    assert found == status and message in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


@pytest.mark.soak
@pytest.mark.timeout(soak.choose(300, 3600))
def test_schemathesis_finds_nothing(server: Server, tmp_path: Path) -> None:
    # 400 as well: what a context, a vocabulary and the fields together allow can't be said by a schema.
    accepted = (*openapi_fuzz.ACCEPTED, "400")
    openapi_fuzz.finds_nothing(server.url, tmp_path, "--include-path-regex", "^/v1", accepted=accepted)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.soak
def test_odd_values_are_refused_and_leave_the_server_healthy(server: Server, client: Any) -> None:
    draw = soak.draw()
    seen: dict[int, int] = {}
    with ThreadPoolExecutor(4) as pool:
        requests = [_odd(draw) for _ in range(soak.choose(300, 5000))]
        for status, _, content in pool.map(lambda odd: server.ask(*odd), requests):
            seen[status] = seen.get(status, 0) + 1
            assert status in (200, 400, 404), content
    assert seen[400] > 0.5 * sum(seen.values()) and seen[200], seen
    assert client.completions.create(model="tiny", prompt="abc", max_tokens=2).choices
    assert server.metric("serving_requests_in_flight") == 0 and "Traceback" not in server.log.read_text()


def _odd(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A path, and a request of which a field or two are odd."""
    fields = ("model", "temperature", "top_p", "top_k", "seed", "logit_bias", "stop", "n", "logprobs", "stream_options")
    path, own = draw.choice((("chat/completions", "messages"), ("completions", "prompt")))
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 3, own: HELLO if own == "messages" else "abc"}
    for field in draw.sample((own, "max_tokens", "stream", *fields), draw.randrange(1, 3)):
        body[field] = openapi_fuzz.anything(draw, 3)
    return f"/v1/{path}", body


def test_other_methods_and_headers(server: Server) -> None:
    status, headers, _ = server.ask("/v1/chat/completions")
    assert (status, headers["allow"]) == (405, "POST")
    status, headers, _ = server.ask("/v1/models", {})
    assert (status, headers["allow"]) == (405, "GET, HEAD")
    assert server.ask("/v1/models/none")[0] == 404
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 400, "ignore_eos": True}
    assert server.ask("/v1/chat/completions", body, {"X-Deadline-Ms": "soon"})[0] == 400
    status, _, content = server.ask("/v1/chat/completions", body, {"X-Deadline-Ms": "50"})
    assert status == 504 and json.loads(content)["error"]["code"] == "deadline_exceeded"


def test_a_client_that_goes_frees_its_place(server: Server) -> None:
    body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 480, "ignore_eos": True, "stream": True})
    host, port = server.url.removeprefix("http://").split(":")
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )
    before = server.metric('serving_tokens_total{kind="completion"')
    connections = [socket.create_connection((host, int(port))) for _ in range(4)]
    for connection in connections:
        connection.sendall(request.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    for connection in connections:
        connection.close()
    language_servers.wait(
        lambda: server.metric("serving_requests_in_flight") == 0, server.process, server.log, seconds=30
    )
    # Far from the 1,920 that were asked for.
    assert server.metric('serving_tokens_total{kind="completion"') - before < 1_500


def test_metrics_tell_of_tokens(client: Any, server: Server) -> None:
    names = ("serving_tokens_total", "serving_time_to_first_token_seconds_count", "serving_inter_token_seconds_count")
    before = [server.metric(name) for name in names]
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=5, extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 8
    assert [server.metric(name) - value for name, value in zip(names, before, strict=True)] == [8, 1, 4]


def test_a_killed_engine_costs_what_it_held_and_comes_again(client: Any, server: Server) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 480, "ignore_eos": True}
    answers: list[Any] = []

    def hold() -> None:
        answers.append(server.ask("/v1/chat/completions", body))

    def stream() -> None:
        answers.append(server.ask("/v1/chat/completions", {**body, "stream": True}))

    threads = [threading.Thread(target=target) for target in (hold, hold, stream)]
    before = server.metric('serving_tokens_total{kind="completion"')
    for thread in threads:
        thread.start()
    language_servers.wait(
        lambda: server.metric('serving_tokens_total{kind="completion"') > before + 6, server.process, server.log, 30
    )
    (engine,) = server.engines()
    os.kill(engine, signal.SIGKILL)
    for thread in threads:
        thread.join(30)
    whole = [answer for answer in answers if answer[1]["content-type"].startswith("application/json")]
    (streamed,) = [answer for answer in answers if answer not in whole]
    assert [status for status, *_ in whole] == [503, 503]
    assert all(int(headers["retry-after"]) >= 1 for _, headers, _ in whole)
    assert json.loads(whole[0][2])["error"]["type"] == "server_error"
    assert b'"error"' in streamed[2].split(b"\n\n")[-2] and b"[DONE]" not in streamed[2]
    # While it is gone: not ready, 503; then the same as before.
    status, _, content = server.ask("/ready")
    assert status == 503 and "engine is not up" in json.loads(content)["reason"]
    assert server.ask("/v1/chat/completions", body)[0] == 503
    language_servers.wait(lambda: server.ask("/ready")[0] == 200, server.process, server.log)
    assert server.metric("serving_worker_restarts_total") == 1
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2).usage.completion_tokens > 0


def test_a_drain_answers_what_was_accepted(folder: Path) -> None:
    with language_servers.serve(folder, "--drain-seconds", "20") as server:
        answers: list[Any] = []
        body = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "ignore_eos": True}
        thread = threading.Thread(target=lambda: answers.append(server.ask("/v1/chat/completions", body)))
        thread.start()
        language_servers.wait(
            lambda: server.metric("serving_requests_in_flight") > 0 or answers, server.process, server.log, 30
        )
        server.process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert server.process.wait(30) == 0
        assert answers[0][0] == 200 and json.loads(answers[0][2])["usage"]["completion_tokens"] == 200
