"""Where the adversarial stage begins: student and discriminator of a warm-up, found and checked."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from trainway.checkpoint.state import STATE_FILE, TrainState
from trainway.checkpoint.store import CheckpointStore
from trainway.checkpoint.weights import DISCRIMINATOR_DIR
from trainway.errors import ConfigError, DataError
from trainway.run_dir import RunDir


class Warmup(NamedTuple):
    """A checkpoint of a warm-up."""

    path: Path
    step: int


def find_warmup(warmup_run: str, *, base_hash: str, tokenizer_hash: str) -> Warmup:
    """The checkpoint that gad.warmup_run names, verified: a run's newest intact one, or the one whose directory it is.

    base_hash, tokenizer_hash: of the run that begins there; they must be the warm-up's.

    Raises:
        ConfigError: there is no such run or checkpoint, or it has no discriminator.
        DataError: it is damaged, or its student is of another base or tokenizer.
    """
    path = Path(warmup_run).expanduser()
    store, which = CheckpointStore(RunDir(path).checkpoints, keep_last=1), "latest"
    if path.name.startswith("step-"):
        store, which = CheckpointStore(path.parent, keep_last=1), path.name.removeprefix("step-")
    if not store.steps():
        raise ConfigError(
            f"gad.warmup_run is {warmup_run}",
            "there is no checkpoint",
            "give a run directory of recipe gad, or one of its checkpoints/step-N",
        )
    found = store.resolve(which)
    if not (found / DISCRIMINATOR_DIR).is_dir():
        raise ConfigError(
            f"gad.warmup_run: {found} has no discriminator",
            "it is no checkpoint of a warm-up",
            "give one of recipe gad with gad.stage=warmup or all",
        )
    state = TrainState.from_json((found / STATE_FILE).read_text(), str(found / STATE_FILE))
    changed = [
        name
        for name, own, other in (
            ("model.path", base_hash, state.base_hash),
            ("the tokenizer", tokenizer_hash, state.tokenizer_hash),
        )
        if own != other
    ]
    if changed:
        raise DataError(
            f"gad.warmup_run: {found} began with other files of {' and '.join(changed)}",
            "its student and discriminator do not fit this run",
            "set model.path and data.chat_template as the warm-up had them",
        )
    return Warmup(found, state.step)
