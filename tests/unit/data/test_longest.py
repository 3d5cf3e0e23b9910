"""The longest batch: what takes most memory, whenever a run meets it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.gad_material import teacher, tiny_gad
from tests.sft_material import base_model, conversations, tiny_sft

from trainway.config.schema import RunConfig
from trainway.data.loader import Loader
from trainway.data.prepare import prepare
from trainway.data.store import TokenStore
from trainway.data.teacher_rows import TeacherLoader

GLOBAL, MICRO = 8, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("longest")
    base_model(root / "base")
    conversations(root / "chats.jsonl")
    teacher(root / "teacher.jsonl")
    return root


def store(root: Path, config: dict[str, object]) -> TokenStore:
    made = RunConfig.model_validate(json.loads(json.dumps(config)))
    return TokenStore.open(prepare(made, tokenizer_dir=root / "base").store_dir)


def chats(root: Path) -> TokenStore:
    return store(root, tiny_sft(root / "base", root / "chats.jsonl", root / "stores", root / "run"))


def loader(found: TokenStore, packing: str, rank: int = 0, world_size: int = 1) -> Loader:
    return Loader(
        found.streams(), seq_len=96, global_batch_size=GLOBAL, micro_batch_size=MICRO, seed=1, packing=packing,
        shuffle=True, rank=rank, world_size=world_size,
    )  # fmt: skip


def test_padded_conversations(root: Path) -> None:
    found = chats(root)
    split = found.streams()[0]
    starts = split.document_starts(0, split.num_tokens)
    longest = np.sort(np.diff(starts, append=split.num_tokens))[::-1][:GLOBAL]
    batch = loader(found, "none").longest(1)
    assert (batch.step, batch.num_tokens) == (1, longest.sum())
    assert [micro.num_tokens for micro in batch.micro_batches] == longest.reshape(-1, MICRO).sum(1).tolist()
    widths = [micro.input_ids.shape[1] for micro in batch.micro_batches]
    epoch = [loader(found, "none").step(step) for step in range(1, 14)]
    assert widths[0] == max(micro.input_ids.shape[1] for step in epoch for micro in step.micro_batches)
    assert batch.num_tokens > max(step.num_tokens for step in epoch)


def test_packed_conversations(root: Path) -> None:
    found = chats(root)
    epoch = [loader(found, "documents").step(step) for step in range(1, 40)]
    assert loader(found, "documents").longest(1).num_tokens >= max(step.num_tokens for step in epoch)


def test_ranks_share_the_longest_rows(root: Path) -> None:
    found = chats(root)
    whole = loader(found, "none").longest(1)
    shares = [loader(found, "none", rank, 2).longest(1) for rank in (0, 1)]
    assert [micro.num_tokens for share in shares for micro in share.micro_batches] == [
        whole.micro_batches[index].num_tokens for index in (0, 2, 1, 3)
    ]


def test_prompts_and_answers_of_a_teacher(root: Path) -> None:
    found = store(root, tiny_gad(root / "base", root / "teacher.jsonl", root / "stores", root / "run"))
    rows = TeacherLoader(found.streams(), prompts_per_step=4, seed=1, shuffle=True, end_token=2)
    every = [row for step in range(1, rows.steps_per_epoch + 1) for row in rows.step(step).rows]
    sizes = sorted((len(row.prompt) + len(row.response) for row in every), reverse=True)
    longest = [len(row.prompt) + len(row.response) for row in rows.longest(1).rows]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] >= sizes[0] and sum(longest) >= sum(sizes[:4])


def test_fewer_rows_than_a_step_come_again(root: Path) -> None:
    found = store(root, tiny_gad(root / "base", root / "teacher.jsonl", root / "stores", root / "run"))
    count = found.streams()[0].num_documents
    rows = TeacherLoader(found.streams(), prompts_per_step=count + 2, seed=1, shuffle=True, end_token=2)
    ids = [row.id for row in rows.longest(1).rows]
    assert len(ids) == count + 2 and ids[-2:] == ids[:2]
