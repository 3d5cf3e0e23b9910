"""A release holds what is listed; all else stays, and is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainway.release.allowed import Left, allowed_files, is_allowed

ALLOWED = """
model.safetensors; model-00001-of-00002.safetensors; model.safetensors.index.json; adapter_model.safetensors
adapter_config.json; config.json; generation_config.json; tokenizer.json; tokenizer_config.json; merges.txt; vocab.json
special_tokens_map.json; added_tokens.json; tokenizer.model; chat_template.jinja; additional_chat_templates/tool.jinja
README.md; SHA256SUMS; loss.png; training/config.yaml; training/metrics.jsonl; training/report.json
training/report.html; training/provenance.json
"""
REFUSED = """
model.bin; pytorch_model.bin; optimizer.safetensors; model.safetensors.tmp; log.txt; training/log.txt; .env; secrets.env
modeling_x.py; state.json; training/../log.txt; additional_chat_templates/../../x.jinja; config.json.bak; .git/config
sub/model.safetensors; README.md/x; training/config.yaml.orig; model-1-of-2.safetensors; id_rsa
"""


@pytest.mark.parametrize("name", ALLOWED.strip().replace("\n", "; ").split("; "))
def test_a_file_of_a_model_may_leave(name: str) -> None:
    assert is_allowed(name)


@pytest.mark.parametrize(
    "name", [*REFUSED.strip().replace("\n", "; ").split("; "), "config.json\n", "\nREADME.md"]
)
def test_any_other_stays(name: str) -> None:
    assert not is_allowed(name)


def test_what_stays_is_named_with_a_reason_and_links_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    root = tmp_path / "model"
    (root / "training").mkdir(parents=True)
    for name in ("config.json", "training/metrics.jsonl", "notes.txt", "modeling_x.py"):
        (root / name).write_text("{}")
    (root / "README.md").symlink_to(secret)
    (root / "elsewhere").symlink_to(tmp_path)
    assert allowed_files(root) == (
        ["config.json", "training/metrics.jsonl"],
        [
            Left("README.md", "a link"),
            Left("elsewhere", "a link"),
            Left("modeling_x.py", "Python code"),
            Left("notes.txt", "not one of a model's files"),
        ],
    )
