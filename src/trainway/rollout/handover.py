"""The directory where the student's weights lie on their way to a server: in memory where there is room."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch

from trainway.checkpoint.pieces import StoredTensors, open_tensors
from trainway.engines.world import World
from trainway.errors import EnvironmentFault
from trainway.files import disk_faults, read_json
from trainway.rollout.keeper import Kept

WEIGHTS_DIR = "TRAINWAY_VLLM_WEIGHTS"
"""Names the directory to use, where servers on other machines are to see it too."""
SHARED_MEMORY = Path("/dev/shm")

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@contextmanager
def handover(world: World, model_dir: Path, name: str, url: str | None) -> Iterator[Path]:
    """An empty directory that every rank and every server sees, gone at the end or when rank 0 is killed.

    Args:
        model_dir: a model as large as the student.
        name: of this run, so that no other has the same directory.
        url: of a server that somebody else has started.

    Raises:
        EnvironmentFault: there is no room, or no directory that all of them see.
    """
    made = world.together(lambda: str(_make(world, model_dir, name, url)) if world.is_main else "")
    directory = Path(world.from_main(made))
    if not world.is_main:
        yield directory
        return
    keeper = Kept([], remove=[directory])
    try:
        yield directory
    finally:
        keeper.close()


def check_complete(directory: Path, model_dir: Path) -> None:
    """See that the weights in `directory` have every tensor of the model that the server has been started with.

    vLLM would leave what it had in the place of one that is missing. One that is the same as another is tied to it,
    and not missed.

    Raises:
        EnvironmentFault: one is missing, or of another shape.
    """
    model_files, files = (sorted(place.glob("*.safetensors")) for place in (model_dir, directory))
    with open_tensors(model_files) as model, open_tensors(files) as given:
        other = [name for name, shape in model.shapes.items() if given.shapes.get(name) != shape]
        wrong = [name for name in other if name in given.shapes or not _tied(model, name, given.shapes)]
    if wrong:
        raise EnvironmentFault(
            f"{wrong[0]} is not among the weights for vLLM, or has another shape there",
            f"{len(wrong)} tensors of {model_dir} are missing so",
            "this family's weights have other names while it is trained: use rollout.engine=transformers",
        )


def head_is_tied(model_dir: Path) -> bool:
    """Whether a model's output head is its input embedding: it has no weights for one, or says so."""
    with open_tensors(sorted(model_dir.glob("*.safetensors"))) as model:
        own = any(name.rpartition("lm_head.")[1] for name in model.shapes)
    return not own or bool(read_json(model_dir / "config.json").get("tie_word_embeddings"))


def _tied(model: StoredTensors, name: str, given: Iterable[str]) -> bool:
    shape, value = model.shapes[name], model.read(name)
    twins = (other for other in given if model.shapes.get(other) == shape)
    return any(torch.equal(model.read(twin), value) for twin in twins)


def _make(world: World, model_dir: Path, name: str, url: str | None) -> Path:
    told = os.environ.get(WEIGHTS_DIR)
    far = url is not None and urlsplit(url).hostname not in _LOOPBACK
    if (far or world.local_world_size < world.world_size) and not told:
        raise EnvironmentFault(
            "training and vLLM servers are on several machines, and weights reach a server through a directory",
            f"{WEIGHTS_DIR} names none that all of them see",
            f"set {WEIGHTS_DIR} to a directory on a shared file system",
        )
    places = [Path(told)] if told else [SHARED_MEMORY, Path(tempfile.gettempdir())]
    # twice: the student of a model in bf16 may be handed over in fp32
    needed = 2 * sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    for place in places:
        if place.is_dir() and os.access(place, os.W_OK) and shutil.disk_usage(place).free > needed:
            directory = place / f"trainway-weights-{name}"
            with disk_faults(directory):
                # a server of somebody else's may run as another user
                directory.mkdir(mode=0o700 if url is None else 0o755)
            return directory
    raise EnvironmentFault(
        f"no room for {needed / 2**30:.2f} GiB of weights in {' nor in '.join(map(str, places))}",
        "vLLM takes the student's weights from a directory at every step",
        f"free some, or name another directory in {WEIGHTS_DIR}",
    )
