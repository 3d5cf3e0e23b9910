"""What a tracker is told of a run, without secrets, and what is remembered of it in the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import yaml

from trainway.config.schema import TrackingConfig
from trainway.errors import DataError
from trainway.files import atomic_write, read_json
from trainway.masking import MASK, mask_secrets, secret_values
from trainway.run_dir import RunDir

PROJECT = "trainway"
"""Of runs whose configuration and environment name none."""


@dataclass(frozen=True)
class Row:
    """Every number that a run recorded at one step."""

    step: int
    seconds: float
    """Of training up to this step, by the steps' own times: the same whenever it is read."""
    numbers: dict[str, float]


class Service(Protocol):
    """A tracker that keeps the run elsewhere. Every method may raise whatever its library raises."""

    where: str
    """An address or a directory, for people."""
    last_step: int
    """The newest step that it held when it was opened; -1 for none."""

    def has(self, name: str, step: int) -> bool:
        """Whether it held this number when it was opened."""
        ...

    def send(self, rows: list[Row]) -> None: ...

    def close(self, outcome: str) -> None:
        """Return when everything has arrived. outcome: done, stopped, failed, or running when another will go on."""
        ...


@dataclass(frozen=True)
class Orders:
    """What the process that feeds a tracker is to do."""

    once: bool = False
    """Bring the tracker up to date and end; else follow the run until its end."""
    outcome: str = "done"
    """once: how the run ended, or running."""
    first_step: int = 0
    """The step that the training goes on with."""
    settings: str = ""
    """Hash of the settings that decide what is learnt."""
    wait_s: float = 30.0
    """To finish in, once the run has ended."""

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


@dataclass(frozen=True)
class Target:
    """A run as one tracker sees it."""

    run: RunDir
    tracker: str
    tracking: TrackingConfig
    config: dict[str, Any]
    """The resolved configuration, nested, secrets masked."""
    environ: Mapping[str, str]
    finished_at: int | None = None
    """The last step of a run that is over; None while it goes on."""

    @classmethod
    def read(
        cls, run: RunDir, tracker: str, environ: Mapping[str, str], finished_at: int | None = None
    ) -> Target:
        """From the run's config.yaml. Raises DataError when it is missing or not one."""
        try:
            raw = yaml.safe_load(run.config.read_text(encoding="utf-8"))
            tracking = TrackingConfig.model_validate(raw.get("tracking") or {})
        except OSError as error:
            raise DataError(
                f"{run.path} is no run", f"{run.config}: {error.strerror}", "name a run directory"
            ) from None
        except (ValueError, AttributeError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            raise DataError(f"{run.config} is not a configuration of this version", why) from None
        return cls(run, tracker, tracking, masked(raw, environ), environ, finished_at)

    @property
    def name(self) -> str:
        """Of the run, where the tracker shows it."""
        return clean(self.tracking.run_name or self.run.path.resolve().name, self.environ)

    @property
    def group(self) -> str | None:
        return clean(self.tracking.group, self.environ) if self.tracking.group else None

    @property
    def tags(self) -> list[str]:
        return [clean(tag, self.environ) for tag in self.tracking.tags]

    def project(self, variable: str) -> str:
        """What is configured, else what the tracker's own environment variable says."""
        return clean(self.tracking.project or self.environ.get(variable) or PROJECT, self.environ)

    def recall(self) -> dict[str, Any]:
        """What `remember` wrote last; empty for a run that the tracker does not know yet."""
        place = self.run.tracker(self.tracker)
        found = read_json(place) if place.exists() else {}
        return found if isinstance(found, dict) else {}

    def remember(self, **values: Any) -> None:
        """Keep values for the next launch, beside those that are there."""
        record = {**self.recall(), **values}
        atomic_write(self.run.tracker(self.tracker), json.dumps(record, indent=2) + "\n")

    def forget(self) -> None:
        """Begin a run of its own at the tracker."""
        atomic_write(self.run.tracker(self.tracker), "{}\n")

    def flat_config(self) -> dict[str, str]:
        """The configuration by dotted key, values as text."""
        flat: dict[str, str] = {}

        def walk(value: Any, path: str) -> None:
            if isinstance(value, dict):
                for key, item in value.items():
                    walk(item, f"{path}.{key}" if path else str(key))
            else:
                flat[path] = value if isinstance(value, str) else json.dumps(value)

        walk(self.config, "")
        return flat


def clean(text: str, environ: Mapping[str, str]) -> str:
    """A text without the values of secrets in the environment, and without what looks like one."""
    return _masked_text(text, "", secret_values(environ))


def masked(value: Any, environ: Mapping[str, str], path: str = "") -> Any:
    """JSON values with every secret replaced by ***; `path`: the dotted key they stand under."""
    secrets = secret_values(environ)

    def walk(item: Any, path: str) -> Any:
        if isinstance(item, dict):
            return {key: walk(inner, f"{path}.{key}" if path else str(key)) for key, inner in item.items()}
        if isinstance(item, list):
            return [walk(inner, path) for inner in item]
        return _masked_text(item, path, secrets) if isinstance(item, str) else item

    return walk(value, path)


def _masked_text(text: str, path: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    # as a setting, so that one named like a secret is masked whatever it holds
    return mask_secrets([f"{path}={text}"])[0][len(path) + 1 :]
