"""What the objects of a job are called, how they are labelled, and where things are inside its pods."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from trainway.jobs.origin import UNKNOWN, known_origin
from trainway.jobs.record import Record

Role = Literal["train", "prepare", "upload"]
"""What a pod is for."""

MANAGED_BY = "app.kubernetes.io/managed-by"
JOB = "trainway/job"
TOKEN = "trainway/token"
ORIGIN = "trainway/origin"
"""Whose job it is: others' in the same cluster are left alone."""
ROLE = "trainway/role"
PRICE = "trainway/dollars-per-hour"
"""An annotation: what all machines of the job cost together."""
INDEX = "batch.kubernetes.io/job-completion-index"
"""A label of a pod: its number in an Indexed Job."""
POD_INDEX = "apps.kubernetes.io/pod-index"
"""The same in a StatefulSet."""

CONTAINER = "trainway"
SETTINGS_DIR = "/etc/trainway"
ORDERS_FILE = "orders.json"
CONFIG_FILE = "config.yaml"
HOME_DIR = "/home/trainway"
REPLICATED = "nodes"
"""Of a JobSet: its only kind of Job."""

LONGEST = 45
"""A label of DNS has 63 characters, and the longest pod of a JobSet hangs -nodes-0-999-abcde on to the name."""


@dataclass(frozen=True)
class Names:
    """The names of a job's objects. The token makes them this job's alone; the claim outlives it, so it has none."""

    job: str
    token: str

    @classmethod
    def of(cls, record: Record) -> Names:
        return cls(record.name, record.token)

    @property
    def base(self) -> str:
        """The Job, JobSet or StatefulSet, and the Service."""
        room = LONGEST - len("trainway--") - len(self.token)
        return f"trainway-{self.job[:room].rstrip('-')}-{self.token}"

    @property
    def settings(self) -> str:
        """The ConfigMap."""
        return f"{self.base}-orders"

    @property
    def prepare(self) -> str:
        """The Job that tokenises."""
        return f"{self.base}-prepare"

    @property
    def upload(self) -> str:
        """The Pod that takes files."""
        return f"{self.base}-upload"

    @property
    def claim(self) -> str:
        """The PersistentVolumeClaim of jobs of this name."""
        return f"trainway-{self.job}"

    def labels(self, role: Role | None = None) -> dict[str, str]:
        found = {MANAGED_BY: "trainway", JOB: self.job, TOKEN: self.token}
        return {**found, ROLE: role} if role else found

    def own_labels(self, role: Role | None = None) -> dict[str, str]:
        """Of an object that is nobody's part, with the mark of whoever makes it; nothing is selected by that."""
        return {**self.labels(role), ORIGIN: known_origin() or UNKNOWN}


def selector(token: str, role: Role | None = None) -> str:
    """The label selector of a job's objects."""
    return f"{TOKEN}={token}" + (f",{ROLE}={role}" if role else "")


def literal(value: str) -> str:
    """A value that Kubernetes hands over as it is: it would put variables in for `$(NAME)`."""
    return value.replace("$", "$$")


def secret_reference(text: str) -> tuple[str, str] | None:
    """(Secret, key) of `secret/key`, or None when it is not one."""
    name = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
    found = re.fullmatch(rf"({name})/([-._A-Za-z0-9]{{1,253}})", text)
    return (found[1], found[3]) if found else None
