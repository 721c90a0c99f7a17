"""The server: a real one on a free port, answers as `llmrecipe chat` gives them, errors in the form of the OpenAI API."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmrecipe.cli import serve as serve_verb
from llmrecipe.cli.app import run_command
from llmrecipe.core.listening import LOOPBACK, LOOPBACK_NAMES, listen
from llmrecipe.engine.sampling import Sampling
from llmrecipe.evaluation.chat import Chat
from llmrecipe.evaluation.serving.served_model import Cancelled, Ended, Limits, ServedModel, check_wanted
from llmrecipe.evaluation.serving.text_stream import TextStream
from llmrecipe.interop.multi_adapter import open_adapters

httpx = pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("uvicorn", reason="needs uvicorn and starlette: pip install 'llmrecipe[serve]'")

ASK = "What is the hen like?"
TURNS = [{"role": "user", "content": ASK}]
GREEDY = {"model": "tiny", "messages": TURNS, "temperature": 0}


def until(happened: Callable[[], bool]) -> None:
    """Wait for something another thread does."""
    for _ in range(3000):
        if happened():
            return
        time.sleep(0.01)
    pytest.fail("it never happened")


@contextmanager
def serving(model: ServedModel, limits: Limits | None = None, key: str | None = None) -> Iterator[Any]:
    """A client of a server of this model."""
    from llmrecipe.evaluation.serving.app import Api
    from llmrecipe.evaluation.serving.server import ApiServer

    ready = threading.Event()
    with listen(LOOPBACK, 0) as opened:
        server = ApiServer(Api(model, limits or Limits(), key, LOOPBACK_NAMES), opened, ready.set)
        thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            with httpx.Client(
                base_url=f"http://{LOOPBACK}:{opened.getsockname()[1]}/v1/", timeout=60, trust_env=False
            ) as client:
                client.server = server
                yield client
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def tiny() -> ServedModel:
    return ServedModel(Chat.open(["tiny"], ["runtime.device=cpu"], Sampling()), "tiny")


@pytest.fixture(scope="module")
def client(tiny: ServedModel) -> Iterator[Any]:
    with serving(tiny, Limits(tokens=64)) as found:
        yield found


def events(client: Any, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream, which must end as one does."""
    reply = client.post(path, json={**body, "stream": True})
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(found: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for choice in (choice for event in found for choice in event["choices"]):
        piece = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return texts


def test_the_reply_is_that_of_chat(client: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["chat", "tiny", "--prompt", ASK, "--max-new-tokens", "64"]) == 0
    wanted = capsys.readouterr().out.strip()
    reply = client.post("chat/completions", json=GREEDY).json()
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted, "refusal": None} and len(wanted) > 5
    assert choice["finish_reason"] == "stop" and reply["object"] == "chat.completion" and reply["model"] == "tiny"
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > usage["prompt_tokens"] > 0


@pytest.mark.parametrize("more", [{}, {"temperature": 1.2, "seed": 7, "n": 2}, {"stop": ["r", "likes"]}, {"max_tokens": 2}])
def test_the_pieces_of_a_stream_are_the_whole(client: Any, more: dict[str, Any]) -> None:
    body = {**GREEDY, **more}
    whole = client.post("chat/completions", json=body).json()["choices"]
    found = events(client, "chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert joined(found) == {choice["index"]: choice["message"]["content"] for choice in whole}
    ends = {c["index"]: c["finish_reason"] for event in found for c in event["choices"] if c["finish_reason"]}
    assert ends == {choice["index"]: choice["finish_reason"] for choice in whole}
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] > 0
    assert len({event["id"] for event in found}) == 1 and len(found) > 2


def test_draws_follow_from_the_seed(client: Any) -> None:
    body = {"model": "tiny", "prompt": "The", "temperature": 2, "n": 3, "max_tokens": 8}
    first, again, other = (client.post("completions", json={**body, "seed": seed}).json() for seed in (1, 1, 2))
    texts = [[choice["text"] for choice in reply["choices"]] for reply in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1


def test_an_answer_ends_before_a_stop_text_and_at_the_limit(client: Any) -> None:
    whole = client.post("chat/completions", json=GREEDY).json()["choices"][0]["message"]["content"]
    word = whole.split()[2]
    (cut,) = client.post("chat/completions", json={**GREEDY, "stop": word}).json()["choices"]
    assert cut["message"]["content"] == whole[: whole.index(word)].strip() and cut["finish_reason"] == "stop"
    short = client.post("chat/completions", json={**GREEDY, "max_completion_tokens": 2}).json()
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 2


def test_texts_and_token_ids_are_continued(client: Any, tiny: ServedModel) -> None:
    body = {"model": "tiny", "temperature": 0, "max_tokens": 4, "seed": None, "logprobs": None, "user": "me"}
    ids = tiny.ids_of_prompt("The hen is")
    texts = client.post("completions", json={**body, "prompt": ["The hen is", "The duck"]}).json()["choices"]
    by_ids = client.post("completions", json={**body, "prompt": ids}).json()["choices"]
    assert [choice["index"] for choice in texts] == [0, 1] and texts[0]["text"] == by_ids[0]["text"]
    model, tokenizer = tiny.chat.loaded.model, tiny.tokenizer
    import torch

    out = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :]
    assert texts[0]["text"] == tokenizer.decode(out, skip_special_tokens=True)
    assert joined(events(client, "completions", {**body, "prompt": ids})) == {0: texts[0]["text"]}


def test_parts_and_newer_roles_are_read(client: Any) -> None:
    plain = [{"role": "system", "content": "Be brief."}, *TURNS]
    parts = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": ASK}]}]
    replies = [client.post("chat/completions", json={**GREEDY, "messages": turns}).json() for turns in (plain, parts)]
    assert replies[0]["choices"] == replies[1]["choices"] and replies[0]["usage"] == replies[1]["usage"]


def test_models_are_listed(client: Any) -> None:
    (listed,) = client.get("models").json()["data"]
    assert listed["id"] == "tiny" and client.get("models/tiny").json() == listed
    assert client.get("models/tyny").status_code == 404
    assert client.get(f"http://{LOOPBACK}:{client.base_url.port}/health").json() == {"status": "ok"}


WRONG: list[tuple[str, Any, int, str]] = [
    ("chat/completions", b"{", 400, "not JSON"),
    ("chat/completions", b"\xff", 400, "not JSON"),
    ("chat/completions", b"[" * 5000, 400, "not JSON"),
    ("chat/completions", b"[]", 400, "must be a JSON object, not list"),
    ("chat/completions", {"messages": TURNS}, 400, "model: Field required"),
    ("chat/completions", {**GREEDY, "model": "tinny"}, 404, "did you mean 'tiny'?"),
    ("chat/completions", {**GREEDY, "temprature": 1}, 400, "did you mean 'temperature'?"),
    ("chat/completions", {**GREEDY, "temperature": -1}, 400, "temperature: .*greater than or equal to 0; got -1"),
    ("chat/completions", {**GREEDY, "temperature": "hot"}, 400, "temperature: .*got 'hot'"),
    ("chat/completions", {**GREEDY, "n": 9}, 400, "n: .*less than or equal to 8"),
    ("chat/completions", {**GREEDY, "tools": [{}]}, 400, "tools: not supported"),
    ("chat/completions", {**GREEDY, "logprobs": True}, 400, "logprobs: not supported"),
    ("chat/completions", {**GREEDY, "messages": []}, 400, "messages: .*at least 1"),
    ("chat/completions", {**GREEDY, "messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role: .*got 'king'"),
    ("chat/completions", {**GREEDY, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "'image_url'"),
    ("chat/completions", {**GREEDY, "stop": list("abcde")}, 400, "stop: at most 4"),
    ("chat/completions", {**GREEDY, "stop": ""}, 400, "stop: "),
    ("chat/completions", {**GREEDY, "max_tokens": 65}, 400, "max_tokens: at most 64"),
    ("chat/completions", {**GREEDY, "messages": [{"role": "user", "content": "hen " * 600}]}, 400, "the model reads 512"),
    ("completions", {"model": "tiny", "prompt": []}, 400, "prompt: an empty list"),
    ("completions", {"model": "tiny", "prompt": [5, 100000]}, 400, "there is no token 100000"),
    ("completions", {"model": "tiny", "prompt": [[]]}, 400, "no token"),
    ("completions", {"model": "tiny", "prompt": "x", "echo": True}, 400, "echo: not supported"),
    ("embeddings", {}, 404, "there is /v1/models"),
    ("models", {}, 405, "there is /v1/models"),
]


@pytest.mark.parametrize(("path", "body", "status", "text"), WRONG, ids=[f"{w[0]}-{w[3]:.30}" for w in WRONG])
def test_what_is_wrong_is_named(client: Any, path: str, body: Any, status: int, text: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert re.search(text, error["message"]), error["message"]


def test_large_bodies_and_other_types_are_refused(client: Any) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (1 << 16)

    kind = {"Content-Type": "application/json"}
    for content in (b" " * (2 << 20), parts()):
        reply = client.post("chat/completions", content=content, headers=kind)
        assert reply.status_code == 413 and reply.json()["error"]["code"] == "request_too_large"
    form = client.post("chat/completions", content=json.dumps(GREEDY), headers={"Content-Type": "text/plain"})
    assert form.status_code == 415 and "application/json" in form.json()["error"]["message"]


def test_a_request_that_does_not_arrive_is_given_up(tiny: ServedModel) -> None:
    with serving(tiny, Limits(arrival=0.2)) as client, socket.create_connection((LOOPBACK, client.base_url.port)) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        slow.settimeout(30)
        assert b" 408 " in slow.recv(4096)


def test_the_key_and_the_host_are_checked(tiny: ServedModel) -> None:
    with serving(tiny, key="right") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"Authorization": "Bearer é"}):
            sent = {name: value.encode() for name, value in headers.items()}
            reply = client.get("models", headers=sent)
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer right"}
        assert client.get("models", headers=right).status_code == 200
        for host, status in {"evil.example": 421, "localhost": 200, "[::1]:80": 200}.items():
            assert client.get("models", headers={**right, "Host": host}).status_code == status


def test_two_at_once_are_both_answered(client: Any) -> None:
    asked = [ASK, "Where is the duck?"]
    bodies = [{**GREEDY, "messages": [{"role": "user", "content": text}]} for text in asked]
    alone = [client.post("chat/completions", json=body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda body: client.post("chat/completions", json=body).json()["choices"], bodies * 4))
    assert together == alone * 4 and alone[0] != alone[1]


class Endless(ServedModel):
    """Answers until nobody waits any more."""

    def answer(self, job: Any, prompt: Any, key: int, emit: Any) -> Ended:
        self.begun = getattr(self, "begun", 0) + 1
        while True:
            try:
                check_wanted(job)
            except Cancelled:
                self.left = getattr(self, "left", 0) + 1
                raise
            emit("x")
            time.sleep(0.01)


def test_too_many_are_sent_away_and_a_client_that_leaves_frees_its_place(tiny: ServedModel) -> None:
    model = Endless(tiny.chat, "tiny")
    with serving(model, Limits(requests=1)) as client:
        with client.stream("POST", "chat/completions", json={**GREEDY, "stream": True}) as reply:
            assert reply.status_code == 200
            lines = reply.iter_lines()  # kept, for a generator that is dropped closes the connection
            assert next(lines).startswith("data: ")
            second = client.post("chat/completions", json=GREEDY)
            assert second.status_code == 429 and second.headers["retry-after"] == "1"
            assert "--concurrency" in second.json()["error"]["message"]
        until(lambda: getattr(model, "left", 0) == 1)

        def is_taken() -> bool:
            with client.stream("POST", "chat/completions", json={**GREEDY, "stream": True}) as reply:
                return reply.status_code == 200

        until(is_taken)


def test_an_answer_that_takes_too_long_is_ended(tiny: ServedModel) -> None:
    with serving(Endless(tiny.chat, "tiny"), Limits(seconds=0.2)) as client:
        reply = client.post("chat/completions", json=GREEDY)
        assert reply.status_code == 504 and reply.json()["error"]["type"] == "server_error"
        streamed = client.post("chat/completions", json={**GREEDY, "stream": True})
        last = [line for line in streamed.text.split("\n\n") if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_stopping_ends_what_is_being_answered(tiny: ServedModel) -> None:
    model = Endless(tiny.chat, "tiny")
    with ThreadPoolExecutor(1) as pool, serving(model) as client:
        waiting = pool.submit(lambda: client.post("chat/completions", json=GREEDY))
        until(lambda: getattr(model, "begun", 0) == 1)
        client.server.handle_exit(signal.SIGINT, None)
        reply = waiting.result(30)
    assert reply.status_code == 503 and "being stopped" in reply.json()["error"]["message"]


def test_what_fails_is_an_error_of_the_server(
    tiny: ServedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ServedModel, "answer", lambda *_: 1 / 0)
    with serving(tiny) as client:
        reply = client.post("chat/completions", json=GREEDY)
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in capsys.readouterr().err and "division" not in reply.text


def test_a_run_without_a_name_of_its_own_is_served_under_the_name_of_its_recipe(tmp_path: Path) -> None:
    chat = Chat.open(["tiny"], ["runtime.device=cpu"], Sampling())
    for place, name in (("tea/20260131-093000-0a1b2c3d", "tea"), ("tea/mine", "mine")):
        (tmp_path / place).mkdir(parents=True)
        assert ServedModel(chat, str(tmp_path / place)).names == [name]


def test_each_request_names_its_adapter(tmp_path: Path) -> None:
    from llmrecipe.methods.reparameterized.lora import Lora
    from tests.interop.saved_runs import saved_run

    for name, seed in (("one", 3), ("two", 4)):
        saved_run(tmp_path / name, "tiny", Lora(name="lora"), seed=seed)
    adapters = open_adapters([str(tmp_path / "one"), str(tmp_path / "two")])
    chat = Chat(adapters.loaded, adapters, Sampling(8))
    chat.use([])
    wanted = {pair["adapter"]: pair["answer"] for pair in chat.answers([ASK])}
    with serving(ServedModel(chat, "one"), Limits(tokens=8)) as client:
        assert [model["id"] for model in client.get("models").json()["data"]] == ["one", "two"]
        replies = {name: client.post("chat/completions", json={**GREEDY, "model": name}).json() for name in wanted}
    assert {name: r["choices"][0]["message"]["content"] for name, r in replies.items()} == wanted
    assert wanted["one"] != wanted["two"]


def test_the_official_client_reads_it(client: Any) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    reader = openai.OpenAI(
        base_url=str(client.base_url), api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
    )
    assert [model.id for model in reader.models.list()] == ["tiny"]
    whole = reader.chat.completions.create(**GREEDY).choices[0].message.content
    parts = reader.chat.completions.create(**GREEDY, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
    assert reader.completions.create(model="tiny", prompt="The hen is", max_tokens=3, temperature=0).choices[0].text
    with pytest.raises(openai.NotFoundError, match="there is no 'other'"):
        reader.chat.completions.create(**{**GREEDY, "model": "other"})


def pieces(decode: dict[int, str], tokens: list[int], **more: Any) -> tuple[list[str], TextStream]:
    """The pieces of a stream whose tokens are texts, or bytes of one."""
    raw = {token: text.encode() if isinstance(text, str) else text for token, text in decode.items()}
    stream = TextStream(lambda ids: b"".join(raw[i] for i in ids).decode("utf-8", "replace"), **more)
    found = [stream.feed(token) for token in tokens]
    return [*found, stream.close()], stream


def test_half_a_character_and_the_start_of_a_stop_text_are_held_back() -> None:
    accent: dict[int, Any] = {0: "caf", 1: "é".encode()[:1], 2: "é".encode()[1:], 3: "!"}
    assert pieces(accent, [0, 1, 2, 3])[0] == ["caf", "", "é", "!", ""]
    words = {0: "one ", 1: "EN", 2: "D", 3: " two"}
    found, stream = pieces(words, [0, 1, 2, 3], stops=["END"])
    assert "".join(found) == "one " and stream.stopped and stream.tokens == [0, 1, 2]
    found, stream = pieces(words, [0, 1, 3], stops=["END", "never"])
    assert "".join(found) == "one EN two" and not stream.stopped
    cleaned = TextStream(lambda ids: "".join(["do", " n", "'t", " go"][i] for i in ids).replace(" n't", "n't"), cleans=True)
    assert "".join([cleaned.feed(i) for i in range(4)] + [cleaned.close()]) == "don't go"


def test_a_port_in_use_and_an_open_address_without_a_key_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with listen(LOOPBACK, 0) as taken:
        port = taken.getsockname()[1]
        assert run_command(["serve", "tiny", "--port", str(port)]) == 2
        assert f"cannot serve at 127.0.0.1:{port}" in capsys.readouterr().err
    assert run_command(["serve", "tiny", "--host", "0.0.0.0"]) == 2
    assert "--key-env NAME" in capsys.readouterr().err
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert run_command(["serve", "tiny", "--key-env", "NO_SUCH_KEY"]) == 2
    assert "NO_SUCH_KEY is not set" in capsys.readouterr().err
    assert run_command(["serve", "no/such/run", "--port", "0"]) == 2
    assert run_command(["serve", "tiny", "--host", "no.such.host.invalid", "--key-env", "PATH"]) == 2
    monkeypatch.setattr(serve_verb, "NEEDS", ("no_such_library",))
    assert run_command(["serve", "tiny"]) == 2
    assert "pip install 'llmrecipe[serve]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_in_order(number: int) -> None:
    command = [sys.executable, "-m", "llmrecipe", "serve", "tiny", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stdout is not None and process.stderr is not None
        text = ""
        while not text.rstrip().endswith("}"):
            text += process.stdout.readline()
        facts = json.loads(text)
        reply = httpx.post(f"{facts['url']}/chat/completions", json=GREEDY, timeout=60, trust_env=False)
        assert reply.status_code == 200 and facts["models"] == ["tiny"]
        process.send_signal(number)
        assert process.wait(60) == 0 and process.stderr.read() == ""
