"""The volume of an experiment: its directories, the room it needs, and what the Hub's libraries keep there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trainway.config.schema import RunConfig
from trainway.errors import EnvironmentFault
from trainway.files import disk_faults
from trainway.planning.arithmetic import count_parameters, padded_vocab_size
from trainway.run_dir import RunDir

ERASED = ("/tmp", "/root", "/dev/shm", "/var/tmp")
"""Directories of a rented machine's own disk or memory: what lies there is gone when the machine is."""
HUB_DIR = "hf_cache"
TOKEN = "HF_TOKEN"
OTHER_TOKENS = ("HUGGINGFACEHUB_API_TOKEN", "HUGGINGFACE_HUB_TOKEN")

STORE_SHARE = 0.6
"""Bytes of a token store per byte of text: two per token of three to four."""
SHARD_SHARE = 1.1
"""Bytes of shards per byte of text: JSON's quoting."""
GZIP_FACTOR = 4
CHECKPOINT_BYTES = 12
"""Per parameter, in fp32: the weight and two moments of AdamW."""


@dataclass(frozen=True)
class Volume:
    """Where everything of one experiment is. Nothing else spells these names."""

    root: Path
    experiment: str

    @property
    def train_shards(self) -> Path:
        return self.root / "datasets" / "train" / self.experiment

    @property
    def val_shards(self) -> Path:
        return self.root / "datasets" / "val" / self.experiment

    @property
    def tokenizer(self) -> Path:
        return self.root / "artifacts" / "tokenizer" / self.experiment

    @property
    def run(self) -> RunDir:
        return RunDir(self.root / "runs" / self.experiment)

    @property
    def cache(self) -> Path:
        return self.root / "cache" / self.experiment

    @property
    def hub(self) -> Path:
        return self.root / HUB_DIR

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those that are made at once; the tokenizer's appears when it is complete."""
        parent = self.tokenizer.parent
        return (self.train_shards, self.val_shards, parent, self.run.path, self.cache, self.hub)

    @property
    def prepared(self) -> Path:
        """The note of which token store was made from what."""
        return self.cache / "prepared.json"

    @property
    def lock(self) -> Path:
        return self.cache / "orchestrate.lock"

    def config(self, suffix: str) -> Path:
        return self.run.path / f"training.{suffix}"


def make_folders(volume: Volume) -> int:
    """Make the directories that are missing, and see that all can be written; returns how many were made.

    Raises EnvironmentFault when the root is not there or a directory cannot be written.
    """
    if not volume.root.is_dir():
        raise EnvironmentFault(
            f"there is no directory {volume.root}",
            "the volume is not mounted there, or it is called otherwise",
            "mount it, or say where it is: --root DIR or TRAINWAY_ROOT",
        )
    made = 0
    for folder in volume.folders:
        with disk_faults(folder):
            try:
                made += not folder.is_dir()
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except (FileExistsError, NotADirectoryError) as error:
                why = f"{error.filename} is no directory"
                raise EnvironmentFault(f"cannot make {folder}", why, "move that file away") from None
    return made


def check_room(
    volume: Volume, config: RunConfig, text_bytes: int, *, shards: bool, checkpoints: bool = True
) -> int:
    """The bytes that the experiment still needs; raises EnvironmentFault when the volume has fewer.

    An estimate from the size of the text, of the model and the number of checkpoints kept; what the experiment holds
    already counts. shards, checkpoints: whether they are still to be written.
    """
    saved = _checkpoint_bytes(config) if checkpoints else 0
    needed = int(text_bytes * (STORE_SHARE + SHARD_SHARE * shards)) + saved
    held = sum(_held(folder) for folder in volume.folders if folder != volume.hub)
    free = shutil.disk_usage(volume.root).free
    missing = max(0, needed - held)
    if missing > free:
        raise EnvironmentFault(
            f"{volume.root} is too small: about {_gib(missing)} GiB are needed, {_gib(free)} GiB are free",
            f"{_gib(saved)} GiB of checkpoints (checkpoint.keep_last "
            f"{config.checkpoint.keep_last}), the rest data",
            "free some space, take a larger volume, or keep fewer checkpoints",
        )
    return missing


def text_size(path: Path, size: int) -> int:
    """About how many bytes of text a file of `size` bytes holds."""
    return size * GZIP_FACTOR if path.suffix in (".gz", ".parquet") else size


def hub_environment(volume: Volume, environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """(what to set, what to say) so that the Hub's libraries keep their files on the volume; the user's values win."""
    chosen = {"HF_HOME": str(volume.hub), "HF_DATASETS_CACHE": str(volume.hub / "datasets")}
    new = {name: value for name, value in chosen.items() if not environ.get(name)}
    said = [f"{name}={value}" for name, value in new.items()]
    return new, said + [f"{name}={environ[name]} is kept as you set it" for name in chosen if name not in new]


def token_environment(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The same for the token: HF_TOKEN from the names that other tools give it. Values are never said."""
    if environ.get(TOKEN):
        return {}, []
    for name in OTHER_TOKENS:
        if environ.get(name):
            return {TOKEN: environ[name]}, [f"{TOKEN} is taken from {name}"]
    return {}, []


def _checkpoint_bytes(config: RunConfig) -> int:
    vocabulary = config.model.vocab_size or padded_vocab_size(config.tokenizer.vocab_size)
    kept = config.checkpoint.keep_last + 1  # and the best one
    if config.train.total_steps is not None:
        kept = min(kept, -(-config.train.total_steps // config.checkpoint.save_every))
    # one more while it is written
    return (kept + 1) * count_parameters(config.model, vocabulary).total * CHECKPOINT_BYTES


def _held(folder: Path) -> int:
    total = 0
    for current, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # another process may have removed it
                total += os.lstat(os.path.join(current, name)).st_size
    return total


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"
