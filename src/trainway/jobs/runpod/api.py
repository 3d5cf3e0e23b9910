"""RunPod's REST API v2: one function for each call, each answer checked, what may be repeated repeated with patience."""

from __future__ import annotations

import functools
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from trainway.errors import ConfigError, EnvironmentFault, ExitCode
from trainway.jobs.runpod import models
from trainway.jobs.runpod.clock import Clock
from trainway.planning.prices import API, API_VARIABLE, KEY_VARIABLE

ATTEMPTS = 5
"""Of one call, in all."""
MOST_RETRY_AFTER_S = 300.0
"""A wait that the provider asks for and that is longer ends the call."""
TIMEOUT_S = 60.0
_Answer = TypeVar("_Answer", bound=BaseModel)


class Refused(EnvironmentFault):
    """RunPod has answered, and the answer is no. Nothing was made."""

    def __init__(self, doing: str, status: int, words: str) -> None:
        super().__init__(f"RunPod does not {doing}", f"{status}: {words or 'without a word'}", _cure(status))
        self.status = status
        self.words = words
        if status == 422:  # the body is wrong, and stays so
            self.code = ExitCode.CONFIG


class Lost(EnvironmentFault):
    """No answer has come, or none that says what was done: it may have been done all the same."""


def _cure(status: int) -> str:
    cures = {
        401: f"set {KEY_VARIABLE} to a valid key: console.runpod.io, Settings, API keys",
        402: "add credit to the account: console.runpod.io, Billing",
        403: "use a key that may do this, or another kind of machine",
        404: "look at what is there: `trainway reap`",
        422: "correct the setting that it names",
        429: "wait, then start the same command again",
    }
    return cures.get(status, "see console.runpod.io, then start the same command again")


class Api:
    """A session with the API. `base` and `key` come from TRAINWAY_RUNPOD_API and RUNPOD_API_KEY where not given."""

    def __init__(
        self,
        base: str | None = None,
        key: str | None = None,
        *,
        clock: Clock | None = None,
        environ: Mapping[str, str] = os.environ,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.base = (base or environ.get(API_VARIABLE) or API).rstrip("/")
        self.clock = clock or Clock()
        self._key = (key or environ.get(KEY_VARIABLE, "")).strip()
        self._timeout_s = timeout_s
        _check_base(self.base)
        if not self._key or not self._key.isascii() or not self._key.isprintable():
            raise EnvironmentFault(
                f"{KEY_VARIABLE} is not set" if not self._key else f"{KEY_VARIABLE} is not a key",
                "RunPod is asked with it",
                "make a key at console.runpod.io, Settings, API keys, then `export RUNPOD_API_KEY=...`",
            )
        headers = {"Authorization": f"Bearer {self._key}", "User-Agent": "trainway"}
        self._client = httpx.Client(headers=headers, timeout=timeout_s, verify=_tls())

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    # pods

    def create_pod(self, body: models.CreatePod) -> models.Pod:
        """Raises Lost when nobody knows whether there is a pod now."""
        return self._ask("make a pod", "POST", "/pods", models.Pod, body, repeat=False)

    def list_pods(self) -> list[models.Pod]:
        """Those of Trainway's names, without those of clusters."""
        doing = "list the pods"
        answer = self._answer(doing, "GET", "/pods")
        return self._read(doing, models.ours_of(answer.content, "pods"), models.PodList).pods

    def find_pod(self, pod_id: str) -> models.Pod | None:
        """None when there is none of that id, not any more or never."""
        return self._find("show the pod", f"/pods/{_part(pod_id)}", models.Pod)

    def act(self, pod_id: str, action: models.PodAction) -> models.Pod | None:
        """The pod afterwards; None after `terminate`."""
        sent = models.ActionRequest(action=action)
        answer = self._answer(f"{action} the pod", "POST", f"/pods/{_part(pod_id)}/action", sent)
        if answer.status_code == 204:
            return None
        return self._read(f"{action} the pod", answer.content, models.Pod)

    def delete_pod(self, pod_id: str) -> None:
        self._answer("terminate the pod", "DELETE", f"/pods/{_part(pod_id)}")

    # clusters

    def create_cluster(self, body: models.CreateCluster) -> models.Cluster:
        """Raises Lost when nobody knows whether there is a cluster now."""
        return self._ask("make a cluster", "POST", "/clusters", models.Cluster, body, repeat=False)

    def list_clusters(self) -> list[models.Cluster]:
        """Those of Trainway's names."""
        doing = "list the clusters"
        answer = self._answer(doing, "GET", "/clusters")
        return self._read(doing, models.ours_of(answer.content, "clusters"), models.ClusterList).clusters

    def find_cluster(self, cluster_id: str) -> models.Cluster | None:
        return self._find("show the cluster", f"/clusters/{_part(cluster_id)}", models.Cluster)

    def cluster_pods(self, cluster_id: str) -> list[models.Pod]:
        """By their rank; those without one yet at the end."""
        path = f"/clusters/{_part(cluster_id)}/pods"
        pods = self._ask("list the cluster's pods", "GET", path, models.PodList).pods
        return sorted(pods, key=lambda pod: _rank(pod))

    def delete_cluster(self, cluster_id: str) -> None:
        self._answer("delete the cluster", "DELETE", f"/clusters/{_part(cluster_id)}")

    # what a pod needs

    def gpu_types(self, *, count: int, cloud: str, product: str = "POD") -> list[models.GpuType]:
        """The catalogue with today's prices and the stock of machines with `count` GPUs."""
        asked = {"include": "AVAILABILITY", "product": product, "count": str(count), "cloud": cloud}
        return self._ask("show its GPUs", "GET", "/catalog/gpus", models.GpuTypes, params=asked).gpus

    def data_centers(self) -> list[models.DataCenter]:
        path = "/catalog/datacenters"
        return self._ask("show its data centres", "GET", path, models.DataCenters).data_centers

    def list_volumes(self) -> list[models.Volume]:
        path = "/network-volumes"
        return self._ask("list the network volumes", "GET", path, models.VolumeList).network_volumes

    def find_volume(self, volume_id: str) -> models.Volume | None:
        return self._find("show the network volume", f"/network-volumes/{_part(volume_id)}", models.Volume)

    def create_volume(self, body: models.CreateVolume) -> models.Volume:
        """Raises Lost when nobody knows whether there is a volume now."""
        doing, path = "make a network volume", "/network-volumes"
        return self._ask(doing, "POST", path, models.Volume, body, repeat=False)

    def delete_volume(self, volume_id: str) -> None:
        self._answer("delete the network volume", "DELETE", f"/network-volumes/{_part(volume_id)}")

    def ssh_keys(self) -> list[str]:
        return self._ask("show the account's SSH keys", "GET", "/account/ssh-keys", models.Keys).keys

    def set_ssh_keys(self, body: models.SetKeys) -> list[str]:
        """In place of all that were there; what is there now."""
        doing = "register an SSH key"
        return self._ask(doing, "PUT", "/account/ssh-keys", models.Keys, body).keys

    # what it has cost

    def pod_bill(self, pod_id: str, since: datetime) -> models.Bill:
        return self._bill("/billing/pods", {"podId": pod_id}, since)

    def cluster_bill(self, cluster_id: str, since: datetime) -> models.Bill:
        return self._bill("/billing/clusters", {"clusterId": cluster_id}, since)

    # logs

    @contextmanager
    def log_stream(
        self, pod_id: str, asked: Mapping[str, str], last_id: str | None, read_timeout_s: float
    ) -> Iterator[Iterator[bytes]]:
        """One connection to a pod's log: its bytes as they come. Raises Refused, Lost, and httpx's errors while reading."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        timeout = httpx.Timeout(self._timeout_s, read=read_timeout_s)
        url = f"{self.base}/pods/{_part(pod_id)}/logs"
        with self._client.stream("GET", url, params=dict(asked), headers=headers, timeout=timeout) as answer:
            if not answer.is_success:
                answer.read()
                raise self._refusal("show the pod's log", answer)
            yield answer.iter_bytes()

    # how it is asked

    def _bill(self, path: str, asked: dict[str, str], since: datetime) -> models.Bill:
        start = since.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        params = {**asked, "bucketSize": "hour", "startTime": start.strftime("%Y-%m-%dT%H:%M:%SZ")}
        return self._ask("show the bill", "GET", path, models.Bill, params=params)

    def _find(self, doing: str, path: str, model: type[_Answer]) -> _Answer | None:
        try:
            return self._ask(doing, "GET", path, model)
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    def _ask(
        self,
        doing: str,
        method: str,
        path: str,
        model: type[_Answer],
        body: models.Sent | None = None,
        *,
        params: Mapping[str, str] | None = None,
        repeat: bool = True,
    ) -> _Answer:
        answer = self._answer(doing, method, path, body, params=params, repeat=repeat)
        return self._read(doing, answer.content, model)

    def _read(self, doing: str, content: bytes, model: type[_Answer]) -> _Answer:
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise Lost(
                f"RunPod was asked to {doing}, and its answer has another form than its documents say",
                f"{place or 'the body'}: {first['msg']}",
                "see console.runpod.io for what is there, and report this",
            ) from None

    def _answer(
        self,
        doing: str,
        method: str,
        path: str,
        body: models.Sent | None = None,
        *,
        params: Mapping[str, str] | None = None,
        repeat: bool = True,
    ) -> httpx.Response:
        """The answer that says it is done. With `repeat` off, what may have been done is not asked for again."""
        for attempt in range(1, ATTEMPTS + 1):
            fault: Refused | Lost
            wait = self.clock.backoff(attempt)
            try:
                content = None if body is None else body.body()
                answer = self._client.request(method, self.base + path, json=content, params=params)
            except httpx.RequestError as error:
                fault = self._lost(doing, type(error).__name__)
                # nothing was sent where no connection came about
                is_safe = repeat or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            else:
                if answer.is_success:
                    return answer
                fault = self._refusal(doing, answer)
                is_safe = repeat or answer.status_code == 429
                if answer.status_code == 429:
                    wait = self._retry_after(answer, wait)
            if isinstance(fault, Refused) and fault.status != 429:
                raise fault
            if not is_safe or attempt == ATTEMPTS or wait > MOST_RETRY_AFTER_S:
                raise fault
            self.clock.sleep(wait)
        raise AssertionError("the last attempt raises")

    def _refusal(self, doing: str, answer: httpx.Response) -> Refused | Lost:
        words = self._words(answer)
        if answer.status_code >= 500:
            return self._lost(doing, f"{answer.status_code}: {words or 'without a word'}")
        if answer.status_code == 429 and (told := answer.headers.get("Retry-After")):
            words = f"{words or 'too many requests'} (Retry-After: {self._without_key(told)[:60]})"
        return Refused(doing, answer.status_code, words)

    def _words(self, answer: httpx.Response) -> str:
        try:
            words = models.Problem.model_validate_json(answer.content).text()
        except ValidationError:
            return self._without_key(answer.text)[:200]
        return self._without_key(words)[:600]

    def _without_key(self, words: str) -> str:
        """Fit for a message: whatever repeats the request repeats no key, and no part of one that is cut off later."""
        printable = "".join(letter if letter.isprintable() else " " for letter in words)
        return printable.replace(self._key, "***").strip()

    def _lost(self, doing: str, why: str) -> Lost:
        return Lost(
            f"RunPod was asked to {doing}, and no answer says whether it has",
            f"{why}, at {urlsplit(self.base).hostname}",
            "check the network, then start the same command again: it looks at what is there first",
        )

    def _retry_after(self, answer: httpx.Response, otherwise: float) -> float:
        """Seconds that the answer asks to wait for: it gives them, or a date."""
        told = answer.headers.get("Retry-After", "").strip()
        if told.isascii() and told.isdigit():
            return float(told)
        try:
            then = parsedate_to_datetime(told)
        except (TypeError, ValueError):
            return otherwise
        then = then if then.tzinfo else then.replace(tzinfo=UTC)
        return max(0.0, then.timestamp() - self.clock.now())


@functools.cache
def _tls() -> ssl.SSLContext:
    """Of the whole process: reading the machine's certificates takes longer than a request."""
    return httpx.create_ssl_context()


def _check_base(base: str) -> None:
    parts = urlsplit(base)
    is_here = parts.hostname in ("127.0.0.1", "::1", "localhost")
    if (parts.scheme != "https" and not (parts.scheme == "http" and is_here)) or not parts.hostname:
        raise ConfigError(
            f"{API_VARIABLE} is {base!r}",
            "the key is sent there, and only https keeps it from others",
            f"unset it, or use an https address such as {API}",
        )


def _part(name: str) -> str:
    """One part of a path, whatever is in it."""
    return quote(name, safe="")


def _rank(pod: models.Pod) -> tuple[int, str]:
    rank = pod.cluster.rank if pod.cluster is not None else None
    return (rank if rank is not None else models.MOST_PODS, pod.id)
