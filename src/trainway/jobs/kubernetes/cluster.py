"""The cluster's API through the official client: objects as plain data, faults as errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, unquote

from trainway.errors import ConfigError, EnvironmentFault

Object = dict[str, Any]

KINDS = {
    "ConfigMap": ("api/v1", "configmaps"),
    "Event": ("api/v1", "events"),
    "PersistentVolumeClaim": ("api/v1", "persistentvolumeclaims"),
    "Pod": ("api/v1", "pods"),
    "Service": ("api/v1", "services"),
    "Job": ("apis/batch/v1", "jobs"),
    "StatefulSet": ("apis/apps/v1", "statefulsets"),
    "JobSet": ("apis/jobset.x-k8s.io/v1alpha2", "jobsets"),
}
"""Where each kind is in the API."""
READ_TRIES = 3
"""Of a question, when the connection breaks."""
TIMEOUT_S = (10, 60)
"""For a connection, and for an answer."""
SILENCE_S = 120
"""A followed log that says nothing for so long is asked for anew: a connection may die without a word."""
MERGE_PATCH = "application/merge-patch+json"


class NotFound(Exception):
    """There is no such object, or no such kind."""


class Exists(Exception):
    """An object of that name is there already."""


class ConnectionCut(Exception):
    """The answer ended before its end."""


class Silence(Exception):
    """Nothing has come for so long that the connection may be dead."""


class Cluster:
    """One namespace of one cluster.

    Its methods raise NotFound and Exists where a caller is to decide, else EnvironmentFault or ConfigError.
    """

    def __init__(self, api: Any, namespace: str) -> None:
        self.api = api
        """kubernetes.client.ApiClient"""
        self.namespace = namespace

    def create(self, manifest: Object) -> Object:
        return self._json("POST", self._path(manifest["kind"]), body=manifest)

    def read(self, kind: str, name: str) -> Object:
        return self._json("GET", self._path(kind, name))

    def find(self, kind: str, name: str) -> Object | None:
        """The object, or None."""
        try:
            return self.read(kind, name)
        except NotFound:
            return None

    def list(
        self, kind: str, labels: str = "", fields: str = "", *, everywhere: bool = False
    ) -> list[Object]:
        """Objects with these labels, in this namespace or in all; none where the cluster does not know the kind."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        path = self._path(kind, namespace=None if everywhere else self.namespace)
        found: list[Object] = []
        while True:
            try:
                page = self._json("GET", path, query={name: value for name, value in query.items() if value})
            except NotFound:
                return found
            found += [item for item in page.get("items", []) if _has_labels(item, labels)]
            proceed = page.get("metadata", {}).get("continue")
            if not proceed:
                return found
            query["continue"] = proceed

    def patch(self, kind: str, name: str, change: Object) -> Object:
        """Merge `change` into the object."""
        return self._json("PATCH", self._path(kind, name), body=change, content_type=MERGE_PATCH)

    def delete(self, kind: str, name: str) -> bool:
        """Ask for the end of an object and of what it owns, the owned first; False when it is not there."""
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground"}
        try:
            self._json("DELETE", self._path(kind, name), body=options)
        except NotFound:
            return False
        return True

    def log(
        self, pod: str, container: str, *, follow: bool, since: str | None, tail: int | None
    ) -> Iterator[bytes]:
        """What the container prints, each line behind its time; as it comes.

        Raises ConnectionCut when the connection breaks, Silence when nothing has come for SILENCE_S, NotFound when there
        is nothing to read yet or any more.
        """
        query: dict[str, str] = {"container": container, "timestamps": "true"}
        query |= {"follow": "true"} if follow else {}
        query |= {"sinceTime": since} if since else {}
        query |= {"tailLines": str(tail)} if tail is not None else {}
        path = f"{self._path('Pod', pod)}/log"
        import urllib3

        try:
            response = self._send("GET", path, query=query, timeout=(TIMEOUT_S[0], SILENCE_S))
        except ConfigError as error:  # 400: the container has not begun
            raise NotFound(error.why) from error
        raw = response.response
        try:
            yield from raw.stream(1 << 16, decode_content=True)
        except urllib3.exceptions.ReadTimeoutError as error:
            raise Silence from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ConnectionCut(str(error)) from error
        finally:
            raw.close()

    def _path(self, kind: str, name: str = "", *, namespace: str | None = "") -> str:
        group, plural = KINDS[kind]
        namespace = self.namespace if namespace == "" else namespace
        parts = [group, *(["namespaces", quote(namespace, safe="")] if namespace else []), plural]
        return "/" + "/".join([*parts, *([quote(name, safe="")] if name else [])])

    def _json(self, method: str, path: str, **options: Any) -> Object:
        response = self._send(method, path, **options)
        return json.loads(response.read() or b"{}")

    def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
        timeout: Any = TIMEOUT_S,
    ) -> Any:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        with faults(self.api.configuration.host):
            words = self.api.param_serialize(
                method,
                path,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
            )
            response = self._answer(method, words, timeout)
            if response.status >= 400:
                raise refusal(method, path, response.status, response.read())
            return response

    def _answer(self, method: str, words: Any, timeout: Any) -> Any:
        """What only asks is asked again when the connection breaks before an answer: an idle one may have been dropped."""
        import urllib3

        for left in reversed(range(READ_TRIES if method == "GET" else 1)):
            try:
                return self.api.call_api(*words, _request_timeout=timeout)
            except urllib3.exceptions.ProtocolError:
                if not left:
                    raise
        raise AssertionError("the last attempt returns or raises")


def connect(context: str | None, namespace: str) -> Cluster:
    """The cluster of the kubeconfig ($KUBECONFIG, ~/.kube/config), or that of the pod this runs in.

    Raises EnvironmentFault when there is none, or no such context.
    """
    try:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException
    except ImportError:
        raise EnvironmentFault(
            "the target kubernetes needs its client", "the package kubernetes is not installed",
            "run: pip install 'trainway[kubernetes]'",
        ) from None  # fmt: skip
    settings = client.Configuration()
    try:
        try:
            config.load_kube_config(context=context, client_configuration=settings)
        except ConfigException:
            if context is not None:
                raise
            config.load_incluster_config(client_configuration=settings)
    except (ConfigException, OSError) as error:
        raise EnvironmentFault(
            f"no cluster is known{f' as the context {context}' if context else ''}",
            str(error).strip().partition("\n")[0],
            "set KUBECONFIG to the cluster's file, and kubernetes.context to one of its contexts",
        ) from error
    settings.retries = False  # what is tried again is decided here
    return Cluster(client.ApiClient(settings), namespace)


@contextmanager
def faults(host: str) -> Iterator[None]:
    """Turn the transport's exceptions in the block into an EnvironmentFault."""
    import urllib3
    from kubernetes.client.exceptions import ApiException

    try:
        yield
    except urllib3.exceptions.HTTPError as error:
        raise EnvironmentFault(
            f"the cluster at {host} does not answer",
            f"{type(error).__name__}: {error}".partition("\n")[0],
            "see to the network and the VPN; the same command goes on from here",
        ) from error
    except ApiException as error:
        raise EnvironmentFault(
            f"the cluster at {host} refused a connection", f"{error.reason}", "see `trainway status`, then try again"
        ) from error  # fmt: skip


def refusal(method: str, path: str, status: int, body: bytes) -> Exception:
    """The exception for an answer of the API that is no success."""
    try:
        said = json.loads(body)
        message, reason = str(said.get("message", "")), str(said.get("reason", ""))
    except (ValueError, AttributeError):
        message, reason = body.decode("utf-8", "replace")[:200], ""
    if status == 404:
        return NotFound(message)
    if status == 409 and method == "POST" and reason != "Conflict":
        return Exists(message)
    what = f"the cluster refused {method} {path}"
    if status in (400, 422):
        return ConfigError(
            what, message, "correct the job file; `trainway up --dry-run` shows what would be sent"
        )
    if status == 401:
        return EnvironmentFault(what, message or f"status {status}", "log in again")
    if status == 403:
        return EnvironmentFault(
            what, message or f"status {status}", f"ask for the right to {right(method, path)} (docs/kubernetes.md)"
        )  # fmt: skip
    return EnvironmentFault(
        what, f"status {status}: {message}", "try again; the same command goes on from here"
    )


def right(method: str, path: str) -> str:
    """What a role has to allow for this request, as `kubectl auth can-i` is asked: `create jobs.batch in training`."""
    group, _, rest = path.removeprefix("/apis/").removeprefix("/api/").partition("/")
    parts = rest.split("/")
    if path.startswith("/apis/"):
        parts = parts[1:]  # its version
    where = "all namespaces"
    if parts[:1] == ["namespaces"] and len(parts) > 2:
        where, parts = unquote(parts[1]), parts[2:]
    resource = parts[0] + (f".{group}" if path.startswith("/apis/") else "")
    if len(parts) > 2:
        resource += f"/{parts[2]}"
    verbs = {
        "GET": "get" if len(parts) > 1 else "list",
        "POST": "create",
        "PATCH": "patch",
        "DELETE": "delete",
    }
    return f"{verbs.get(method, method.lower())} {resource} in {where}"


def _has_labels(item: Object, labels: str) -> bool:
    held = item.get("metadata", {}).get("labels") or {}
    pairs = [pair.split("=", 1) for pair in labels.split(",") if pair]
    return all(held.get(name) == value for name, value in pairs)
