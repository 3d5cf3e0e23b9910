"""A run directory followed while it trains: each checkpoint is copied once, and counts there only when it is all there.

The order within a pass is what makes any instant of it safe to be killed at:
1) steps that the run has turned away from are noted 2) a checkpoint's files 3) metrics and logs, which reach at least
to its step 4) its manifest, which makes it complete 5) `latest` and `best` 6) what the run keeps no more goes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

from trainway.errors import ConfigError, DataError, EnvironmentFault, UserError
from trainway.files import atomic_write, read_json
from trainway.run_dir import RunDir
from trainway.storage.ledger import LEDGER, Ledger, read_ledger
from trainway.storage.retry import Backoff
from trainway.storage.run_files import (
    CHECKPOINTS,
    POINTERS,
    STATE,
    LocalCheckpoint,
    grows,
    kept_checkpoints,
    linked_step,
    local_checkpoints,
    marker_name,
    other_files,
    step_of,
)
from trainway.storage.store import BLOCK_BYTES, Content, Entry, Store, open_store

Say = Callable[[str], None]
FINAL_ATTEMPTS = 3
MAX_MARKER_BYTES = 64 << 20


class Syncer:
    """Copies one run directory to one address, again and again. Nothing it does touches the training."""

    def __init__(
        self, run_dir: Path, url: str, *, backoff: Backoff | None = None, say: Say = lambda line: None
    ) -> None:
        """Raises ConfigError for an address that is none, or has a login in it."""
        self.run, self.url, self._say = RunDir(run_dir), url.rstrip("/"), say
        self._store: Store = open_store(url, backoff)
        self._ledger: Ledger | None = None
        self._listed: dict[str, Entry] = {}
        self._copies = read_copies(run_dir)
        self._state = self._copies.setdefault(self.url, {})
        self._damaged: dict[int, str] = {}
        """Checkpoints here that are not what their manifest says, by step: the marker's hash."""
        self._unsafe: set[str] = set()
        """Files here that no object could be called as."""
        self._sent_bytes = 0

    def follow(self, every_s: float, stop: Event) -> bool:
        """Copy every `every_s` seconds until told to stop, then once more; whether that last pass went well.

        A failure is said and written to the status file, and the next pass tries again.
        """
        while not stop.is_set():
            self.try_pass()
            stop.wait(every_s)
        return any(self.try_pass(final=True) for _ in range(FINAL_ATTEMPTS))

    def try_pass(self, *, final: bool = False) -> bool:
        """`copy_now` without raising: False and a line in the status file when it failed."""
        try:
            self.copy_now()
        except Exception as error:  # whatever it is: the run goes on, and so does the next pass
            what = error if isinstance(error, UserError) else EnvironmentFault(_in_words(error))
            self._note("failed", error=str(what))
            self._say(f"sync: {what.what}")
            self._ledger = None  # what is there is looked at anew
            return False
        self._note("done" if final else "waiting")
        return True

    def copy_now(self) -> int | None:
        """One pass: afterwards the target holds what the run directory held at its beginning, or newer.

        Returns the newest complete step there. Raises ConfigError when the target holds another run, DataError for
        checkpoints that are damaged here, once all others are copied, EnvironmentFault when the store fails for longer
        than is waited for.
        """
        if not self.run.path.is_dir():
            return None
        self._note("copying")
        store = self._store
        self._listed = store.entries()
        ledger = self._open()
        self._unsafe.clear()
        local = local_checkpoints(self.run)
        self._note_abandoned(ledger, local)
        while (checkpoint := self._next(ledger)) is not None:
            self._send_checkpoint(ledger, checkpoint)
        self._send_others(ledger)
        self._point(ledger)
        self._retire(ledger)
        ledger.save(store)
        if self._unsafe:
            raise DataError(
                f"{len(self._unsafe)} files in {self.run.path} were not copied, e.g. {min(self._unsafe)!r:.80}",
                "an object's name is a plain path; all else is copied",
                "rename them",
            )
        if self._damaged:
            names = ", ".join(f"step-{step}" for step in sorted(self._damaged))
            raise DataError(
                f"{names} in {self.run.checkpoints} is damaged and was not copied",
                "a file is not what the checkpoint's manifest says",
                f"`trainway checkpoints {self.run.path} --verify` tells more",
            )
        return max(self._complete(ledger), default=None)

    def finish(self) -> None:
        """Write down that no further pass comes."""
        self._note("done")

    # ---- steps of a pass

    def _open(self) -> Ledger:
        """The ledger of this run's copy, made when there is none; read anew when somebody else has written it."""
        if self._ledger is not None and self._listed.get(LEDGER) == self._ledger.entry:
            return self._ledger
        found, own = read_ledger(self._store, self.url), self._state.get("id")
        if found is not None and found.id != own:
            raise ConfigError(
                f"{self.url} holds the copy of another run",
                f"{self.run.path} was not copied to there before",
                f"bring that run here first (`trainway sync {self.run.path} {self.url} --restore`), "
                "or choose another address",
            )
        if found is None:
            foreign = [name for name in self._store.entries(CHECKPOINTS) if step_of(name) is not None]
            if foreign and own is None:
                raise ConfigError(
                    f"{self.url} holds checkpoints that no list of copies tells of",
                    f"e.g. {foreign[0]}",
                    "choose an empty address",
                )
            found = Ledger.new() if own is None else Ledger(own)
            # here first: a kill in between must not make this run a stranger to its own copy
            self._keep(id=found.id)
            found.save(self._store)
        self._claim(found)
        self._ledger = found
        return found

    def _claim(self, found: Ledger) -> None:
        """Of the directories that one run has on several machines, the one that was brought back last writes the copy.

        Raises ConfigError for another: the machine that was thought dead lives, and would remove what is newer.
        """
        generation, writer = int(self._state.get("generation", 0)), str(self._state.get("writer", ""))
        if found.generation > generation or (found.generation == generation and found.writer != writer):
            raise ConfigError(
                f"{self.url} is the copy of this run as it goes on elsewhere",
                f"the run was brought back from there, and has copied since; {self.run.path} is an older branch of it",
                "end the training here; or choose another address for it",
            )
        found.change(generation=generation, writer=writer)
        found.save(self._store)
        if found.entry is not None:
            self._listed[LEDGER] = found.entry
        else:
            found.entry = self._listed.get(LEDGER)

    def _note_abandoned(self, ledger: Ledger, local: Mapping[int, LocalCheckpoint]) -> None:
        """Before anything is sent: a restore must not go on with a future that this run has turned away from."""
        held = set(self._state.get("held", []))
        newest = max(local, default=None)
        if newest is None:
            return
        self._adopt(ledger, local)
        ahead = {step for step in self._complete(ledger) if step in held and step > newest}
        replaced = {
            step
            for step in self._complete(ledger)
            if step in local and not self._is_there(ledger, local[step])
        }
        ledger.change(abandoned=sorted(ahead | replaced))
        ledger.save(self._store)

    def _adopt(self, ledger: Ledger, local: Mapping[int, LocalCheckpoint]) -> None:
        """Note the markers that a killed pass has put there without noting them: their checkpoints are complete."""
        for step in self._complete(ledger) & local.keys():
            name, checkpoint = marker_name(step), local[step]
            if name not in ledger.copies and self._store.read(name, MAX_MARKER_BYTES) == checkpoint.marker:
                ledger.note(name, self._listed[name], checkpoint.marker_xxh3)

    def _next(self, ledger: Ledger) -> LocalCheckpoint | None:
        """The newest checkpoint that is here and not there: if little time is left, that is the one to have."""
        local = local_checkpoints(self.run)
        missing = [
            step
            for step, checkpoint in local.items()
            if not self._is_there(ledger, checkpoint) and self._damaged.get(step) != checkpoint.marker_xxh3
        ]
        return local[max(missing)] if missing else None

    def _send_checkpoint(self, ledger: Ledger, checkpoint: LocalCheckpoint) -> None:
        folder, marker = f"{CHECKPOINTS}/step-{checkpoint.step}", marker_name(checkpoint.step)
        if marker in self._listed:
            self._remove(
                ledger, [marker]
            )  # of an older checkpoint of this step: it ends being complete first
        try:
            for entry in checkpoint.manifest["files"]:
                name = f"{folder}/{entry['path']}"
                if not ledger.holds(name, entry["size"], entry["xxh3_128"], self._listed):
                    content = Content.of_file(checkpoint.path / entry["path"], entry["size"])
                    self._put(ledger, name, content)
                    if content.xxh3 != entry["xxh3_128"]:
                        self._give_up(ledger, checkpoint, name)
                        return
        except FileNotFoundError:
            if checkpoint.path.is_dir():
                self._give_up(ledger, checkpoint, "")
            return  # else pruned here while it was copied: what arrived goes with `_retire`
        except DataError:
            self._give_up(ledger, checkpoint, "")
            return
        known = {f"{folder}/{entry['path']}" for entry in checkpoint.manifest["files"]}
        self._remove(
            ledger, [name for name in self._listed if name.startswith(f"{folder}/") and name not in known]
        )
        self._send_others(ledger)
        # at once: a killed copy must find the marker's note, or it would take its own checkpoint for a foreign one
        self._put(ledger, marker, Content.of_bytes(checkpoint.marker))
        ledger.change(abandoned=[step for step in ledger.abandoned if step != checkpoint.step])
        ledger.save(self._store)
        self._keep(held=sorted({*self._state.get("held", []), checkpoint.step}))
        self._say(f"sync: step {checkpoint.step} is at {self.url}")
        self._point(ledger)

    def _give_up(self, ledger: Ledger, checkpoint: LocalCheckpoint, name: str) -> None:
        self._damaged[checkpoint.step] = checkpoint.marker_xxh3
        self._remove(ledger, [name] if name else [])

    def _send_others(self, ledger: Ledger) -> None:
        for name, size in other_files(self.run, self._unsafe).items():
            path = self.run.path / name
            try:
                if not grows(name) and size <= BLOCK_BYTES:
                    content = Content.of_bytes(
                        path.read_bytes()
                    )  # of one version, whatever replaces it meanwhile
                    size = content.size
                else:
                    content = Content.of_file(path, size)
                for _ in content.blocks():
                    pass  # what is hashed is the beginning that is sent, however the file has grown since
                if not ledger.holds(name, size, content.xxh3, self._listed):
                    self._put(ledger, name, content)
            except FileNotFoundError:
                continue
            except DataError:
                continue  # rewritten shorter at this moment: the next pass takes it

    def _point(self, ledger: Ledger) -> None:
        there = self._complete(ledger)
        for link in POINTERS:
            step, name = linked_step(self.run, link), f"{CHECKPOINTS}/{link}"
            if step in there:
                content = Content.of_bytes(f"step-{step}\n".encode())
                for _ in content.blocks():
                    pass
                if not ledger.holds(name, content.size, content.xxh3, self._listed):
                    self._put(ledger, name, content)

    def _retire(self, ledger: Ledger) -> None:
        """Remove the checkpoints that the run no longer keeps, each only when a newer one is complete there."""
        here = set(local_checkpoints(self.run))
        complete = self._complete(ledger)
        newest_here = max(complete & here, default=None)
        if newest_here is None:
            return
        good = complete - set(ledger.abandoned)
        keep = {*here, *sorted(good)[-kept_checkpoints(self.run) :], linked_step(self.run, "best")}
        there = {step for step in map(step_of, self._listed) if step is not None}
        for step in sorted(there - keep - {None}):
            if step < newest_here or step in ledger.abandoned:
                names = [name for name in self._listed if step_of(name) == step]
                marker = [name for name in names if name == marker_name(step)]
                self._remove(ledger, [*marker, *(name for name in names if name not in marker)])
                self._store.drop_unfinished(f"{CHECKPOINTS}/step-{step}/")
        ledger.change(abandoned=[step for step in ledger.abandoned if marker_name(step) in self._listed])

    # ---- what is there

    def _complete(self, ledger: Ledger) -> set[int]:
        steps = {step for step in map(step_of, self._listed) if step is not None}
        return {step for step in steps if marker_name(step) in self._listed}

    def _is_there(self, ledger: Ledger, checkpoint: LocalCheckpoint) -> bool:
        return ledger.holds(
            marker_name(checkpoint.step), len(checkpoint.marker), checkpoint.marker_xxh3, self._listed
        )

    def _put(self, ledger: Ledger, name: str, content: Content) -> None:
        copy = ledger.put(self._store, name, content)
        self._listed[name] = Entry(copy.size, copy.etag)
        self._sent_bytes += copy.size
        self._note("copying")

    def _remove(self, ledger: Ledger, names: list[str]) -> None:
        self._store.delete(names)
        for name in names:
            self._listed.pop(name, None)
        ledger.forget(names)

    # ---- what is kept here

    def _keep(self, **values: Any) -> None:
        self._state.update(values)
        self._note("copying")

    def _note(self, state: str, error: str = "") -> None:
        complete = self._complete(self._ledger) if self._ledger else ()
        facts = {
            "url": self.url,
            "state": state,
            "time": time.time(),
            "step": max(complete, default=None),
            "bytes_sent": self._sent_bytes,
            "error": error,
        }
        try:
            if self.run.path.is_dir():
                write_copies(self.run.path, self._copies, **facts)
        except (UserError, OSError) as failure:
            self._say(f"sync: {failure}")


def copy_run(run_dir: Path, url: str, *, backoff: Backoff | None = None) -> int | None:
    """Copy a run directory once; the newest complete step there. Raises as `Syncer.copy_now`, DataError without a run."""
    if not run_dir.is_dir():
        raise DataError(
            f"{run_dir} is missing", "there is no such directory", "`trainway runs` lists the runs"
        )
    syncer = Syncer(run_dir, url, backoff=backoff)
    step = syncer.copy_now()
    syncer.finish()
    return step


def read_copies(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What this run knows of its copies, by address: `id`, the steps it has `held` there, its `generation` and `writer`."""
    path = run_dir / STATE
    if not path.is_file():
        return {}
    try:
        copies = read_json(path)["copies"]
        return {
            str(url): {
                "id": str(copy["id"]),
                "held": [*copy.get("held", ())],
                "generation": int(copy.get("generation", 0)),
                "writer": str(copy.get("writer", "")),
            }
            for url, copy in copies.items()
            if copy
        }
    except (DataError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def write_copies(run_dir: Path, copies: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    """Keep what this run knows of its copies, for whoever copies it next."""
    atomic_write(run_dir / STATE, json.dumps({**facts, "copies": copies}, indent=1) + "\n")


def _in_words(error: Exception) -> str:
    # not its text: a library's may repeat what it was given
    reason = getattr(error, "strerror", None)
    return f"{type(error).__name__}: {reason}" if reason else f"internal error: {type(error).__name__}"
