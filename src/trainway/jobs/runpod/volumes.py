"""The network volume of a job: the one that it names, the one made for it, and none left over."""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainway.errors import ConfigError, EnvironmentFault, UserError
from trainway.jobs.record import Record
from trainway.jobs.runpod import place
from trainway.jobs.runpod.api import ATTEMPTS, Api, Lost
from trainway.jobs.runpod.models import CreateVolume, Volume
from trainway.jobs.runpod.request import volume_body
from trainway.jobs.target import Job, Say


class JobVolume:
    """Where a job's volume is, or is to be. A volume and its pod are in one data centre.

    A new one has to be there before its pod; one in whose data centre no pod is to be had is deleted again, which is
    done only to a volume that no machine of the job has had.
    """

    def __init__(self, api: Api, job: Job, record: Record, say: Say) -> None:
        self._api = api
        self._job = job
        self._say = say
        self.is_wanted = job.spec.volume.id is not None or job.spec.volume.size_gb is not None
        self._is_new = job.spec.volume.id is None and job.spec.volume.size_gb is not None
        self._found = self._existing(record)
        self._is_used = bool(record.place.get("volume_used"))
        self._open_centers: set[str] | None = None

    def centers(self, in_stock: Sequence[str], allowed: Sequence[str]) -> list[tuple[str, ...]]:
        """Data centres to ask for a machine in, each group at once; an empty group leaves it to RunPod."""
        if not self.is_wanted:
            return [tuple(allowed)] if not allowed or in_stock else []
        if self._found is not None and (self._is_used or not self._is_new):
            return [(self._found.data_center,)] if self._found.data_center in in_stock else []
        if self._open_centers is None:
            self._open_centers = {
                center.id for center in self._api.data_centers() if center.network_volume_types
            }
        return [(center,) for center in in_stock if center in self._open_centers]

    def at(self, record: Record, centers: tuple[str, ...]) -> tuple[Record, str | None, tuple[str, ...]]:
        """The volume in that data centre, made if it is not there; the record, its id, and where it is."""
        if not self.is_wanted:
            return record, None, centers
        if self._found is not None and self._found.data_center not in centers:
            record = self.drop_unused(record)
        if self._found is None:
            body = volume_body(self._job, record, centers[0])
            assert body is not None, "a job without a new volume has the one that it names"
            self._say(f"making a network volume of {body.size} GB in {body.data_center}")
            self._found = self._make(body)
        record = place.noted(record, volume=self._found.id, data_center=self._found.data_center)
        return record, self._found.id, (self._found.data_center,)

    def used(self, record: Record) -> Record:
        """A machine runs with it: from now on it may hold work."""
        self._is_used = True
        return place.noted(record, volume_used=True) if self.is_wanted else record

    def drop_unused(self, record: Record) -> Record:
        """Delete a volume that was made for a machine which then was not to be had."""
        found = self._found
        if found is None or not self._is_new or self._is_used or found.name != record.remote_name:
            return record
        try:
            self._api.delete_volume(found.id)
        except UserError as error:
            self._say(
                f"volume {found.id} is empty and could not be deleted ({error.why}); it costs until it is"
            )
            return record
        self._say(f"the empty volume in {found.data_center} is deleted again")
        self._found = None
        return place.noted(record, volume=None, data_center=None)

    def _existing(self, record: Record) -> Volume | None:
        volume_id = self._job.spec.volume.id
        if volume_id is not None:
            found = self._api.find_volume(volume_id)
            if found is None:
                known = ", ".join(f"{volume.id} ({volume.name})" for volume in self._api.list_volumes())
                raise ConfigError(
                    f"there is no network volume {volume_id!r}",
                    f"there are {known or 'none'}",
                    "correct volume.id, or write `volume: {size_gb: 100}` for a new one",
                )
            allowed = self._job.spec.runpod.data_centers
            if allowed and found.data_center not in allowed:
                raise ConfigError(
                    f"volume {volume_id} is in {found.data_center}",
                    f"runpod.data_centers allows {', '.join(allowed)}",
                    "correct one of the two: a pod is where its volume is",
                )
            return found
        return self._by_name(record) if self._is_new else None

    def _by_name(self, record: Record) -> Volume | None:
        """The volume made for this job before; those of earlier jobs of its name are pointed out."""
        found: Volume | None = None
        for volume in self._api.list_volumes():
            if volume.name == record.remote_name:
                found = volume
            elif re.fullmatch(rf"trainway-{re.escape(record.name)}-[0-9a-f]{{8}}", volume.name):
                self._say(
                    f"volume {volume.id} in {volume.data_center} is of an earlier job of this name: "
                    f"`volume: {{id: {volume.id}}}` would go on with it"
                )
        return found

    def _make(self, body: CreateVolume) -> Volume:
        """Make it once; after a lost answer its name says whether it was made."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._api.create_volume(body)
            except Lost as lost:
                fault: EnvironmentFault = lost
            self._api.clock.sleep(self._api.clock.backoff(attempt))
            for volume in self._api.list_volumes():
                if volume.name == body.name and volume.data_center == body.data_center:
                    return volume
        raise fault
