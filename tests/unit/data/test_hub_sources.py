"""Datasets of the Hub as sources: told from paths, fetched once, and read as a file from then on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.fakes_hub import FakeHub, serve

from trainway.data.hub_sources import HubSource, hub_source

ROWS = [{"prompt": f"What is {i}?", "completion": f"{i} is {i}."} for i in range(60)]
SCRIPT = """
import json, sys
from pathlib import Path
from trainway.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig, TokenizerConfig, TrainConfig
from trainway.data.prepare import prepare
from trainway.data.tokenizer import train_tokenizer
from trainway.errors import UserError

root, sources = Path(sys.argv[1]), sys.argv[2:]
bundle = root / "bundle"
if not bundle.exists():
    tokenizer = train_tokenizer(["What is it? It is that."] * 9, TokenizerConfig(vocab_size=300), bundle)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|eos|>{% endfor %}"
    tokenizer.save_pretrained(bundle)
for source in sources:
    quarantine, source = source.startswith("?"), source.removeprefix("?")
    data = DataConfig(train=(SourceConfig(path=source, epochs=1),), val_ratio=0.2,
                      on_bad_record="quarantine" if quarantine else "error")
    config = RunConfig(recipe="sft", model=ModelConfig(path=str(bundle)), data=data,
                       train=TrainConfig(seq_len=64, total_steps=1))
    try:
        done = prepare(config, root=root)
        splits = done.manifest.splits
        found = [done.cached, splits["train"]["documents"] + splits["val"]["documents"], done.mix.names[0]]
    except UserError as error:
        found = [type(error).__name__, error.what, error.why, error.fix]
    print("RESULT", json.dumps(found))
"""


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def prepared(root: Path, *sources: str, **environ: str) -> list[list[Any]]:
    """What preparing each source gives, one after the other in one process."""
    home = {"HF_HOME": str(root / "hf"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root), *sources],
        capture_output=True, text=True, timeout=300, env={**os.environ, **home, **environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://owner/name", HubSource("owner/name", None, "train")),
        ("hf://datasets/owner/name@v1.0", HubSource("owner/name", "v1.0", "train")),
        ("owner/name", HubSource("owner/name", None, "train")),
        ("owner/name[test]", HubSource("owner/name", None, "test")),
        ("HuggingFaceH4/Multilingual-Thinking[train[:1%]]", HubSource(
            "HuggingFaceH4/Multilingual-Thinking", None, "train[:1%]")),
        ("owner/name@abc123[train[:10]+test]", HubSource("owner/name", "abc123", "train[:10]+test")),
        # a misspelt file is no dataset
        ("owner/rows.jsonl", None),
        ("owner/rows.jsonl.gz", None),
        ("here/missing", None),
        ("here/there", None),
        ("there[12]/x", None),
        ("rows.jsonl", None),
        ("a/b/c", None),
        ("/owner/name", None),
        ("~/owner", None),
        ("*/name", None),
    ],
)  # fmt: skip
def test_what_is_a_dataset_of_the_hub(tmp_path: Path, path: str, expected: HubSource | None) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "there").mkdir()
    assert hub_source(path, tmp_path) == expected


def test_a_dataset_is_fetched_once_and_read_without_the_hub_after(tmp_path: Path) -> None:
    hub = FakeHub()
    bad = [*ROWS, {"prompt": "What?", "completion": ""}]
    hub.datasets["some/talk"] = {"c" * 40: {"train.jsonl": jsonl(ROWS), "test.jsonl": jsonl(ROWS[:20])}}
    hub.datasets["some/bad"] = {"d" * 40: {"train.jsonl": jsonl(bad)}}
    sources = [
        "some/talk",
        "hf://some/talk",
        "some/talk[test]",
        "some/talk[train[:30]]",
        "some/bad",
        "?some/bad",
    ]
    with serve(hub):
        found = prepared(tmp_path, *sources, HF_ENDPOINT=hub.url)
    assert found[0] == [False, 60, "some/talk"]
    assert found[1] == [True, 60, "hf://some/talk"]  # the same dataset, the same store
    assert found[2] == [False, 20, "some/talk[test]"]
    assert found[3] == [False, 30, "some/talk[train[:30]]"]
    assert found[4][:2] == ["DataError", "1 malformed row in the dataset some/bad[train]"]
    assert found[4][2] == "row 61: field 'completion': empty"
    assert found[5] == [False, 60, "?some/bad".removeprefix("?")]
    origins = {
        path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("cache/.hub/*/origin.json")
    }
    assert sorted((name.rsplit("-", 1)[0], facts["revision"][0], facts["rows"]) for name, facts in origins.items()) == [
        ("some--bad", "d", 60), ("some--talk", "c", 20), ("some--talk", "c", 30), ("some--talk", "c", 60),
    ]  # fmt: skip

    offline = prepared(tmp_path, "some/talk", "some/other", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline[0] == [True, 60, "some/talk"]
    assert offline[1][:2] == ["EnvironmentFault", "some/other cannot be reached"]
    assert "HF_HUB_OFFLINE" in offline[1][3]
