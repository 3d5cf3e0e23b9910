"""The secrets that this machine gives a job: from its own variables, by name, and never empty."""

from __future__ import annotations

import os
from collections.abc import Mapping

from trainway.errors import EnvironmentFault
from trainway.jobs.spec import JobSpec

FROM_HERE = ("local", "ssh")
"""Targets that have no store of secrets."""


def secrets_of(spec: JobSpec, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The value of each secret under the name that the job knows it by; none where the target has a store of its own.

    Raises EnvironmentFault naming every variable that is not set here, or set to nothing.
    """
    if spec.target not in FROM_HERE:
        return {}
    missing = sorted({here for here in spec.secrets.values() if not environ.get(here)})
    if missing:
        raise EnvironmentFault(
            f"{', '.join(missing)}: not set here, or empty",
            f"on {spec.target}, the job's secrets are taken from variables of this machine",
            f"export {'it' if len(missing) == 1 else 'them'}, or take {'it' if len(missing) == 1 else 'them'} "
            "out of `secrets:`",
        )
    return {name: environ[here] for name, here in spec.secrets.items()}
