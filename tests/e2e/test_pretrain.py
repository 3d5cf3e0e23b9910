"""From documents to a model that plain transformers loads, through the command line, as a user would go."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import metrics, run_cli, tiny, write_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path, store_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("e2e")
    config = tiny(corpus, store_dir, root / "run", total_steps=30)
    config["eval"] = {"every": 10, "max_new_tokens": 8, "prompts": ["document 7: the "]}
    write_config(root / "config.yaml", config)
    run_cli("train", root / "config.yaml")
    return root / "run"


def test_loss_falls_and_metrics_are_whole(finished: Path) -> None:
    losses = metrics(finished)
    assert [r["step"] for r in losses] == list(range(1, 31))
    assert losses[-1]["train/loss"] < 0.8 * losses[0]["train/loss"]
    assert losses[0]["train/loss"] == pytest.approx(
        math.log(384), rel=0.02
    )  # an untrained model knows nothing
    assert [r["step"] for r in metrics(finished, "val/loss")] == [0, 10, 20, 30]
    for record in losses:
        assert record["perf/tokens_per_s"] > 0
        assert 0 < record["perf/mfu"] < 1
        assert record["perf/memory_gib"] > 0


def test_validation_metrics_agree_with_each_other(finished: Path) -> None:
    last = metrics(finished, "val/loss")[-1]
    assert last["val/ppl"] == pytest.approx(math.exp(last["val/loss"]))
    assert 0 < last["val/bpb"] < last["val/loss"] / math.log(2)  # a token is longer than a byte


def test_tensorboard_reads_what_was_logged(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(finished / "tensorboard"))
    reader.Reload()
    for key in ("train/loss", "val/loss", "optim/grad_norm", "optim/lr", "perf/tokens_per_s"):
        read = [(event.step, event.value) for event in reader.Scalars(key)]
        assert read == [(r["step"], pytest.approx(r[key], rel=1e-6)) for r in metrics(finished, key)]


def test_run_directory_holds_what_the_contract_says(finished: Path) -> None:
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "log.txt",
        "samples.jsonl",
        "report.json",
        "provenance.json",
        "tensorboard",
    ):
        assert (finished / name).exists(), name
    report = json.loads((finished / "report.json").read_text())
    assert report["world_size"] == 1 and report["steps"] == 30
    assert report["tokens"] == metrics(finished)[-1]["train/tokens"]
    assert report["tokens_per_s"] == pytest.approx(report["tokens"] / report["seconds"])
    assert yaml.safe_load((finished / "config.yaml").read_text())["train"]["total_steps"] == 30
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [0, 10, 20, 30]
    assert all(s["prompt"] == "document 7: the " for s in samples)
    log = (finished / "log.txt").read_text()
    assert all(
        tag in log
        for tag in ("[DATA]", "[MODEL]", "[STEP]", "[TRAIN]", "[EVAL]", "[SAVE]", "[RESULT]", "[DONE]")
    )


def test_export_loads_in_transformers_with_the_trained_logits(finished: Path, tmp_path: Path) -> None:
    from trainway.config.load import load_config
    from trainway.models.causal_lm import CausalLMLoss
    from trainway.models.load import build_model

    run_cli("export", finished, "--out", tmp_path / "model", "--which", "latest")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("document 7: the name of class", return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]

    config = load_config(finished / "config.yaml").config
    trained = build_model(config.model, loaded.config.vocab_size, seed=1)
    weights = load_file(finished / "checkpoints/latest/model/model.safetensors")
    trained.load_state_dict(weights, strict=False)
    module = CausalLMLoss(trained).eval()
    with torch.no_grad():
        hidden = module.hidden(ids, None, (0, ids.shape[1]))  # through the attention that training used
        torch.testing.assert_close(hidden @ module.head.T, loaded(ids).logits, rtol=0, atol=1e-5)


def test_eval_of_the_export_gives_the_runs_validation_loss(finished: Path) -> None:
    result = json.loads(run_cli("eval", finished, "--json").stdout)["models"][0]["figures"]
    best = min(r["val/loss"] for r in metrics(finished, "val/loss") if r["step"] in (10, 20, 30))
    assert result["val/loss"] == pytest.approx(best, rel=1e-6)


def test_eval_on_a_file_and_generate(finished: Path, corpus: Path) -> None:
    (found,) = json.loads(run_cli("eval", finished, "--data", corpus, "--json").stdout)["models"]
    result = found["figures"]
    assert 0 < result["val/loss"] < math.log(384)
    once, again = (
        run_cli("generate", finished, "document 7:", "--max-new-tokens", 12).stdout for _ in range(2)
    )
    assert once == again and once.startswith("document 7:") and len(once) > len("document 7:\n")


def test_finished_run_does_not_start_again(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    done = run_cli("train", finished.parent / "config.yaml")
    assert "finished before" in done.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_runs_and_checkpoints_list_it(finished: Path) -> None:
    (listed,) = json.loads(run_cli("runs", finished.parent, "--json").stdout)
    assert (listed["state"], listed["step"]) == ("done", 30)
    found = json.loads(run_cli("checkpoints", finished, "--verify", "--json").stdout)
    assert [c["step"] for c in found] == [10, 20, 30]
    assert [c["latest"] for c in found] == [False, False, True]
    assert all(c["problems"] == [] for c in found)


def test_default_name_tells_model_method_and_settings_and_is_found_again(
    tmp_path: Path, corpus: Path, store_dir: Path
) -> None:
    config = tiny(corpus, store_dir, tmp_path, total_steps=6)
    del config["run_dir"]
    config |= {
        "runs_dir": str(tmp_path / "runs"),
        "checkpoint": {"save_every": 3},
        "schedule": {"warmup_steps": 2},
    }
    path = write_config(tmp_path / "c.yaml", config)
    run_cli("train", path)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("llama-") and "pretrain-adamw-lr0.003-len64" in run.name
    run_cli("train", path)  # done: a new one
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("architecture", ["qwen3"])
def test_other_architecture_by_one_word(
    tmp_path: Path, corpus: Path, store_dir: Path, architecture: str
) -> None:
    config = tiny(
        corpus, store_dir, tmp_path / "run", total_steps=10, activation_checkpointing="full", precision="bf16"
    )
    run_cli("train", write_config(tmp_path / "c.yaml", config), f"model.architecture={architecture}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoints/latest/model")
    assert model.config.model_type == architecture
    assert metrics(tmp_path / "run")[-1]["train/loss"] < metrics(tmp_path / "run")[0]["train/loss"]


def bad_inputs() -> dict[str, tuple[bytes | None, str]]:
    good = b'{"text": "a good line"}\n'
    return {
        "missing": (None, "data.jsonl"),
        "empty": (b"", "empty"),
        "bad json": (good + b'{"text": "x"\n', ":2"),
        "invalid utf-8": (good + b'{"text": "\xff"}\n', ":2"),
        "nul": (good + b'{"text": "a\\u0000b"}\n', ":2"),
        "wrong type": (good + b'{"text": 5}\n', "text"),
        "no field": (good + b'{"txt": "x"}\n', "txt"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_data_is_named_and_nothing_is_trained(tmp_path: Path, store_dir: Path, case: str) -> None:
    content, named = bad_inputs()[case]
    data = tmp_path / "data.jsonl"
    if content is not None:
        data.write_bytes(content)
    done = run_cli(
        "train", write_config(tmp_path / "c.yaml", tiny(data, store_dir, tmp_path / "run")), check=3
    )
    assert named in done.stderr and "data.jsonl" in done.stderr
    assert len(done.stderr.splitlines()) <= 10 and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_bom_crlf_and_gzip_are_read(tmp_path: Path, store_dir: Path, corpus: Path) -> None:
    text = corpus.read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text))
    plain = json.loads(
        run_cli(
            "prepare", write_config(tmp_path / "a.yaml", tiny(corpus, store_dir, tmp_path / "a")), "--json"
        ).stdout
    )
    zipped = write_config(tmp_path / "b.yaml", tiny(tmp_path / "data.jsonl.gz", store_dir, tmp_path / "b"))
    other = json.loads(run_cli("prepare", zipped, "--json").stdout)
    bins = [sorted(Path(p["store_dir"]).glob("*.bin")) for p in (plain, other)]
    assert [b.name for b in bins[0]] == [b.name for b in bins[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*bins, strict=True))


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("train.global_batch_size=9", 2, "not divisible"),
        ("train.seq_len=128", 2, "max_seq_len"),
        ("model.vocab_size=256", 2, "vocab"),
        ("optim.learning_rat=1", 2, "lr"),
        ("engine.name=singel", 2, "single"),
    ],
)
def test_impossible_settings_are_refused_before_training(
    tmp_path: Path, corpus: Path, store_dir: Path, override: str, code: int, words: str
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny(corpus, store_dir, tmp_path / "run"))
    done = run_cli("train", config, override, check=code)
    assert words in done.stderr and "Traceback" not in done.stderr


def test_directory_in_place_of_a_file(tmp_path: Path, store_dir: Path) -> None:
    (tmp_path / "data.jsonl").mkdir()
    done = run_cli(
        "train",
        write_config(tmp_path / "c.yaml", tiny(tmp_path / "data.jsonl", store_dir, tmp_path / "run")),
        check=3,
    )
    assert "data.jsonl" in done.stderr


def test_nan_steps_are_left_out_and_bounded(tmp_path: Path, corpus: Path, store_dir: Path) -> None:
    config = tiny(
        corpus, store_dir, tmp_path / "run", precision="fp16", max_skipped_steps=3, max_grad_norm=0.0
    )
    config["optim"] = {"lr": 1e30}
    done = run_cli("train", write_config(tmp_path / "c.yaml", config), check=2)
    assert "left out" in done.stderr and "optim.lr" in done.stderr
