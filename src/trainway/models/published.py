"""The names that the rest of the world gives to weights: a checkpoint has those of the model in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from trainway.checkpoint.adapter import is_adapter
from trainway.checkpoint.pieces import StoredTensors, open_tensors
from trainway.checkpoint.weights import INDEX_FILE, MAX_SHARD_SIZE, write_shards
from trainway.files import read_json
from trainway.models.base import meta_model
from trainway.models.base_files import CONFIG, weight_names
from trainway.models.base_import import owned_tensors, quiet_transformers
from trainway.models.blocks import blocks


def publish_names(directory: Path, *, max_shard_size: str = MAX_SHARD_SIZE) -> bool:
    """Rewrite the weights of a plain model directory as their family publishes them; False if they are so already.

    Some families are laid out otherwise in memory than in the files of the Hub: the experts of a mixture are one tensor
    there, and one each here. transformers loads both; servers and older versions only the published one. In memory at a
    time: one file's tensors and one block's. Meant for a directory that is not yet in its place.

    Raises:
        DataError: files are missing or damaged.
        OSError: of the disk.
    """
    model = _known_model(directory)
    if model is None:
        return False
    old = [directory / name for name in weight_names(directory)[0]]
    with open_tensors(old) as stored:
        groups, published = _layout(model, stored)
        if published.keys() == {name for names in groups.values() for name in names}:
            return False

        def read(names: Sequence[str]) -> dict[str, torch.Tensor]:
            keys = dict.fromkeys(published[name][1] for name in names)
            return _published(model, stored, [groups[key] for key in keys], set(names))

        new = directory / "published"
        sizes = {name: tensor for name, (tensor, _) in published.items()}
        write_shards(new, sizes, read, max_shard_size=max_shard_size)
    for path in [*old, directory / INDEX_FILE]:
        path.unlink(missing_ok=True)
    for path in new.iterdir():
        path.rename(directory / path.name)
    new.rmdir()
    return True


def is_published(directory: Path) -> bool:
    """Whether a plain model directory has its weights as their family publishes them. Raises as `publish_names`."""
    model = _known_model(directory)
    if model is None:
        return True
    with open_tensors([directory / name for name in weight_names(directory)[0]]) as stored:
        groups, published = _layout(model, stored)
        held = {name for names in groups.values() for name in names}
        # one that was published already holds none of the names in memory that differ
        return published.keys() == held


def _known_model(directory: Path) -> PreTrainedModel | None:
    """The model on the meta device; None for an adapter, and for a family of its own code, which has no other names."""
    if is_adapter(directory) or read_json(directory / CONFIG).get("model_type") not in CONFIG_MAPPING:
        return None
    with quiet_transformers():
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    return meta_model(config, torch.float32)


def _layout(
    model: PreTrainedModel, stored: StoredTensors
) -> tuple[dict[str, list[str]], dict[str, tuple[torch.Tensor, str]]]:
    """The stored names that are those in memory, by block; and by published name a tensor of its shape, and its block."""
    held = {name: tensor for name, tensor in owned_tensors(model) if name in stored.shapes}
    groups = _groups(model, held)
    published = {
        name: (tensor, key)
        for key, names in groups.items()
        for name, tensor in _revert(model, {one: _like(stored, one) for one in names}).items()
    }
    return groups, published


def _published(
    model: PreTrainedModel, stored: StoredTensors, groups: Iterable[list[str]], wanted: set[str]
) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = {}
    for names in groups:
        reverted = _revert(model, {name: stored.read(name) for name in names})
        # a slice would keep the memory of all experts
        result |= {name: tensor.clone() for name, tensor in reverted.items() if name in wanted}
    return result


def _groups(model: PreTrainedModel, names: Iterable[str]) -> dict[str, list[str]]:
    """The weights of each block, and those of none: what is put together otherwise lies within one of them."""
    layers = blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    found: dict[str, list[str]] = {}
    for name in names:
        block = re.match(rf"{re.escape(prefix)}\.\d+\.", name)
        found.setdefault(block[0] if block else "", []).append(name)
    return found


def _like(stored: StoredTensors, name: str) -> torch.Tensor:
    return torch.empty(stored.shapes[name], dtype=stored.dtype(name), device="meta")


def _revert(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))
