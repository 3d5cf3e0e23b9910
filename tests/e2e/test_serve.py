"""Real servers on loopback: OpenAI's own client gets the text that `generate` gives, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import run_cli
from tests.release_material import finished_run
from trainway.release.generate import Decoding, load_speaker

openai = pytest.importorskip("openai")

QUESTION = "What is the capital of France?"
PROMPT = "def area(width"
KEY = "canary-7f3a91"


class Served:
    """`trainway serve` in a process of its own."""

    def __init__(self, model: Path, *options: str, **environ: str) -> None:
        command = [sys.executable, "-m", "trainway", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environ},
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.split(" at ")[-1].split()[0] if " at " in self.line else ""
        assert self.url, self.process.communicate()

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("chat"), "llama")[0]


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    server = Served(run, "--name", "tiny/<script>")
    yield server
    assert server.end() == 0


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=served.url, api_key="none needed", max_retries=0)


NAME = "tiny/<script>"


def said(run: Path, prompt: str, *options: str) -> dict[str, Any]:
    """What the command says."""
    done = run_cli("generate", run, prompt, "--max-new-tokens", 24, "--json", *options)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def ask(client: Any, **how: Any) -> Any:
    return client.chat.completions.create(
        **{
            "model": NAME,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 24,
            "temperature": 0,
        }
        | how
    )


def complete(client: Any, **how: Any) -> Any:
    return client.completions.create(
        **{"model": NAME, "prompt": PROMPT, "max_tokens": 24, "temperature": 0} | how
    )


def test_it_says_what_generate_says(run: Path, client: Any) -> None:
    chat, text = said(run, QUESTION, "--chat"), said(run, PROMPT)
    assert len(chat["text"]) > 10 and chat["text"] != text["text"]
    answer = ask(client)
    assert answer.choices[0].message.content == chat["text"]
    assert answer.choices[0].finish_reason == chat["finish"] == "length"
    assert answer.usage.prompt_tokens == chat["prompt_tokens"]
    assert answer.usage.completion_tokens == chat["completion_tokens"] == 24
    assert answer.model == NAME
    assert complete(client).choices[0].text == text["text"]
    both = complete(client, prompt=[PROMPT, "the quick"])
    speaker = load_speaker(run)
    other = speaker.answer(speaker.raw("the quick"), Decoding(max_new_tokens=24)).text
    assert [choice.text for choice in both.choices] == [text["text"], other]
    ids = speaker.raw(PROMPT)
    assert complete(client, prompt=ids).choices[0].text == text["text"]


def test_a_stream_is_the_same_text_in_pieces(client: Any) -> None:
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == ask(client).choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 24
    texts = [chunk.choices[0].text for chunk in complete(client, stream=True)]
    assert "".join(texts) == complete(client).choices[0].text


def test_temperature_seed_stop_and_limits_count(client: Any) -> None:
    drawn = [complete(client, temperature=2.0, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    only = complete(client, temperature=2.0, seed=1, extra_body={"top_k": 1}).choices[0].text
    whole = complete(client).choices[0].text
    assert only == whole
    cut = complete(client, stop=[whole[5:8]])
    assert cut.choices[0].text == whole[: whole.index(whole[5:8])]
    assert cut.choices[0].finish_reason == "stop"
    assert complete(client, max_tokens=3).usage.completion_tokens == 3
    assert complete(client, max_tokens=None).usage.completion_tokens == 16


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [NAME]


@pytest.mark.parametrize(
    ("how", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"n": 2}, 400, "n"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"extra_body": {"min_p": 0.1}}, 400, "min_p"),
        ({"temperature": 3}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"stop": [""]}, 400, "stop"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, 400, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
            400,
            "messages[0]",
        ),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, 400, "messages"),
    ],
)
def test_what_would_be_ignored_is_refused(client: Any, how: dict[str, Any], status: int, param: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **how)
    assert (caught.value.status_code, caught.value.param) == (status, param)


def post(url: str, body: bytes, **headers: str) -> int:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
    try:
        return urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def test_what_a_page_in_a_browser_could_send_is_refused(served: Served) -> None:
    url, body = f"{served.url}/completions", json.dumps({"model": NAME, "prompt": "a"}).encode()
    assert post(url, body) == 200
    assert post(url, body, Host="evil.example") == 403
    assert post(url, body, **{"Content-Type": "text/plain"}) == 415
    assert post(url, b"[" * 100_000) == 400
    assert post(url, b"{}", **{"Content-Length": str(1 << 40)}) == 413


@pytest.mark.slow
def test_a_client_that_leaves_ends_its_answer(served: Served, client: Any) -> None:
    stream = ask(client, stream=True, max_tokens=None, temperature=0)
    next(iter(stream))
    stream.close()
    assert complete(client).choices[0].text  # whoever comes next is answered


@pytest.mark.slow
def test_a_key_is_asked_for_and_never_shown(run: Path) -> None:
    server = Served(run, "--host", "127.0.0.1", TRAINWAY_API_KEY=KEY)
    try:
        right = openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        assert [model.id for model in right.models.list()] == ["run"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url, api_key=KEY + "x", max_retries=0).models.list()
        assert KEY not in " ".join(psutil.Process(server.process.pid).cmdline())
    finally:
        server.process.send_signal(signal.SIGINT)
        output = server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    assert KEY not in server.line + "".join(output)
    done = run_cli("serve", run, "--host", "0.0.0.0", "--dry-run", check=2, TRAINWAY_API_KEY="")
    assert "error: --host 0.0.0.0 is open to other machines, and there is no key" in done.stderr


@pytest.mark.slow
def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_cli("serve", run, "--port", port, "--backend", "transformers", check=4)
    assert done.stderr.splitlines()[0] == f"error: cannot listen at 127.0.0.1:{port}"


@pytest.mark.slow
def test_chat_remembers_until_it_is_told_to_forget(run: Path) -> None:
    lines = f"{QUESTION}\n\nthe fox\n/reset\n{QUESTION}\n/quit\nnever\n"
    command = [sys.executable, "-m", "trainway", "chat", str(run), "--max-new-tokens", "12"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    speaker, decoding = load_speaker(run), Decoding(max_new_tokens=12)
    said: list[dict[str, str]] = []
    for text in (QUESTION, "the fox"):
        said.append({"role": "user", "content": text})
        said.append({"role": "assistant", "content": speaker.answer(speaker.chat(said), decoding).text})
    first, second = said[1]["content"], said[3]["content"]
    assert done.stdout == f"{first}\n{second}\n{first}\n"
    assert first != second


@pytest.mark.slow
def test_a_model_without_a_template_is_not_talked_to(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path, "llama", recipe="pretrain")
    done = run_cli("chat", run, check=2)
    assert done.stderr.splitlines() == [
        f"error: {run} has no chat template",
        "why: it was trained to continue text, not to answer",
        f"fix: use `trainway generate {run} PROMPT`",
    ]
