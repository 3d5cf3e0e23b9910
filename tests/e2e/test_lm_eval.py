"""lm-evaluation-harness: scores on tasks of one's own, without a network, equal to our own arithmetic."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.sft_material import THINGS, base_model, tokenizer
from trainway.cli.app import main
from trainway.errors import ConfigError, EnvironmentFault
from trainway.recipes.evaluation import Asked, evaluate_models
from trainway.recipes.lm_eval import Tasks, _texts_begin_with_bos, load_tasks

Capture = pytest.CaptureFixture[str]

CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
LIKELIHOOD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
metric_list: [{{metric: perplexity}}]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A random Llama whose documents begin with a token of their own, which its tokenizer does not add."""
    directory = base_model(tmp_path / "model")
    made = tokenizer()
    made.bos_token = "<|endoftext|>"
    made.save_pretrained(directory)
    return directory


@pytest.fixture
def questions(tmp_path: Path) -> list[dict[str, Any]]:
    rng = random.Random(4)
    rows = [
        {
            "question": f"question {number}: what is {rng.choice(THINGS)}?",
            "choices": [" and ".join(rng.sample(THINGS, rng.randrange(1, 4))) for _ in range(4)],
            "answer": rng.randrange(4),
        }
        for number in range(30)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, form in (("own_choice", CHOICE), ("own_likelihood", LIKELIHOOD)):
        (folder / f"{name}.yaml").write_text(form.format(name=name, file=folder / "rows.jsonl"))
    return rows


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Nats of a continuation after bos and a context, by a plain forward pass."""
    encode = lambda text: [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]  # noqa: E731
    start, whole = len(encode(context)), encode(context + continuation)
    with torch.no_grad():
        log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(log_probs[place - 1, whole[place]].item() for place in range(start, len(whole)))


def test_scores_are_our_own_arithmetic(
    model: Path, questions: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    tasks = Tasks(("own_choice", "own_likelihood"), include_path=tmp_path / "tasks")
    (found,) = evaluate_models([model], Asked(tasks=tasks))
    plain, words = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    right, right_by_length, first = [], [], []
    for row in questions:
        scores = [log_likelihood(plain, words, row["question"], f" {choice}") for choice in row["choices"]]
        by_length = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right.append(scores.index(max(scores)) == row["answer"])
        right_by_length.append(by_length.index(max(by_length)) == row["answer"])
        first.append(log_likelihood(plain, words, row["question"], row["choices"][0]))  # without a space
    choice, likelihood = found.tasks["own_choice"], found.tasks["own_likelihood"]
    assert choice["acc"] == pytest.approx(sum(right) / 30)
    assert choice["acc_norm"] == pytest.approx(sum(right_by_length) / 30)
    share = sum(right) / 30
    assert choice["acc_stderr"] == pytest.approx(math.sqrt(share * (1 - share) / 29))
    assert likelihood["perplexity"] == pytest.approx(math.exp(-sum(first) / 30), rel=1e-4)
    assert choice["num_samples"] == 30
    assert found.figures == {}
    assert found.settings["lm_eval"]
    (fewer,) = evaluate_models([model], Asked(tasks=Tasks(("own_choice",), 5, 0, tmp_path / "tasks")))
    assert fewer.tasks["own_choice"]["num_samples"] == 5
    assert fewer.tasks["own_choice"]["acc"] == pytest.approx(sum(right[:5]) / 5)


def test_what_cannot_be_reached_and_what_is_unknown_is_named(
    questions: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    for name in ("far_one", "far_two"):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, file=folder / f"{name}.jsonl"))
    with pytest.raises(EnvironmentFault, match="the data of 2 tasks cannot be reached: far_one, far_two"):
        load_tasks(Tasks(("own_choice", "far_one", "far_two"), include_path=folder))
    with pytest.raises(ConfigError, match="there is no task own_choise") as caught:
        load_tasks(Tasks(("own_choise",), include_path=folder))
    assert "own_choice" in caught.value.fix
    with pytest.raises(ConfigError, match="is no directory"):
        load_tasks(Tasks(("own_choice",), include_path=tmp_path / "nowhere"))


def test_without_the_package_three_lines(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main(["eval", str(model), "--tasks", "arc_easy"]) == 4
    error, why, fix = capsys.readouterr().err.splitlines()
    assert error == "error: tasks need the package lm-eval"
    assert why in (
        "why: it is not installed",
        "why: it cannot be imported: import of lm_eval.tasks halted; None in sys.modules",
    )
    assert fix == "fix: pip install 'trainway[eval]'"


def test_texts_begin_as_documents_do() -> None:
    words = tokenizer()
    with _texts_begin_with_bos(words):
        assert words.encode("the sea")[0] != 0  # there is no bos token
    words.bos_token = "<|endoftext|>"
    plain = words.encode("the sea", add_special_tokens=False)
    with _texts_begin_with_bos(words):
        assert words.encode("the sea") == [0, *plain]
        assert words.encode("the sea", add_special_tokens=False) == plain
    assert words.encode("the sea") == plain
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    with _texts_begin_with_bos(words):
        assert words.encode("the sea") == [0, *plain]  # once
