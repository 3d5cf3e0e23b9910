"""The lines of all pods of a job, over cut connections and replaced pods: none lost, none repeated."""

from __future__ import annotations

import datetime
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

from trainway.errors import EnvironmentFault, UserError
from trainway.jobs.kubernetes.cluster import Cluster, ConnectionCut, NotFound, Object, Silence
from trainway.jobs.kubernetes.names import CONTAINER, ROLE, selector
from trainway.jobs.kubernetes.states import has_ended, pod_index, timestamp

POLL_S = 3.0
MOST_CUTS = 10
"""In a row, without a line between them."""
OVERLAP_S = 2
"""Lines of one moment may arrive in another order: so far back a new connection begins."""

Wait = Callable[[float], object]


class Seen:
    """Which lines of a pod were told already, as far as a new connection may bring them again."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, bytes]] = deque()
        self._again: Counter[bytes] = Counter()

    @property
    def since(self) -> str | None:
        """Where a new connection begins, as Kubernetes writes times; None before the first line."""
        if not self._recent:
            return None
        moment = datetime.datetime.fromtimestamp(self._recent[-1][0] - OVERLAP_S, datetime.UTC)
        return moment.strftime("%Y-%m-%dT%H:%M:%SZ")

    def connect(self) -> None:
        """What was told of the last moments will come again."""
        self._again = Counter(line for _, line in self._recent)

    def new(self, line: bytes) -> str | None:
        """The line without its time, or None when it was told before."""
        if self._again[line] > 0:
            self._again[line] -= 1
            return None
        time_text, _, text = line.partition(b" ")
        second = _second(time_text)
        if second is None:  # no time: an answer of the API's own
            return line.decode("utf-8", "replace")
        self._recent.append((max(second, self._recent[-1][0]) if self._recent else second, line))
        while self._recent[0][0] < self._recent[-1][0] - OVERLAP_S - 1:
            self._recent.popleft()
        return text.decode("utf-8", "replace")


def _second(text: bytes) -> int | None:
    try:
        # fractions of a second do not matter, and have more digits than Python reads
        head, _, tail = text.decode().partition(".")
        zone = tail.lstrip("0123456789") if tail else ""
        found = timestamp(head + zone)
    except ValueError:
        return None
    return None if found is None else int(found)


def pod_log(
    cluster: Cluster, pod: str, *, follow: bool, tail: int | None, uid: str = "", wait: Wait = time.sleep
) -> Iterator[str]:
    """What a pod prints, to its end when followed. Raises EnvironmentFault when the connection is cut again and again.

    uid: of this pod; another one of its name, as a StatefulSet makes it, is another pod.
    """
    seen = Seen()
    ended, cuts = not follow, 0
    while True:
        seen.connect()
        try:
            rest = tail if seen.since is None else None
            blocks = cluster.log(pod, CONTAINER, follow=not ended, since=seen.since, tail=rest)
            for line in _lines(blocks, whole=ended):
                text = seen.new(line)
                if text is not None:
                    cuts = 0
                    yield text
            if ended:
                return
        except NotFound:
            if ended:
                return
        except (ConnectionCut, Silence, EnvironmentFault) as error:
            if ended or not isinstance(error, Silence):  # a pod that runs may say nothing for hours
                cuts += 1
                if cuts > MOST_CUTS:
                    raise EnvironmentFault(
                        f"the log of {pod} breaks off again and again", str(error), "see to the network, then try again"
                    ) from error  # fmt: skip
                wait(min(2.0**cuts, 30.0))
                continue
        state = cluster.find("Pod", pod)
        # once more without following: the last line may have no end, and what was written after the cut is there
        if state is not None and uid and state["metadata"].get("uid") != uid:
            return  # another one of its name: what this one said went with it
        ended = state is None or has_ended(state)
        if not ended:
            wait(POLL_S)


def _lines(blocks: Iterator[bytes], *, whole: bool) -> Iterator[bytes]:
    """Lines without their ends; one that is not complete only where nothing can follow."""
    rest = b""
    for block in blocks:
        *done, rest = (rest + block).split(b"\n")
        yield from done
    if rest and whole:
        yield rest


def job_log(
    cluster: Cluster,
    token: str,
    *,
    nodes: int,
    follow: bool,
    tail: int | None,
    is_over: Callable[[], bool],
    wait: Wait = time.sleep,
) -> Iterator[str]:
    """The lines of all pods of the job, those of several nodes behind the node's number.

    Followed until `is_over` and no pod has anything left; pods that are made later are followed too.
    """
    if not follow:
        for pod in _pods(cluster, token):
            for line in pod_log(cluster, pod["metadata"]["name"], follow=False, tail=tail, wait=wait):
                yield _prefix(pod, nodes) + line
        return
    lines: queue.SimpleQueue[str | UserError | None] = queue.SimpleQueue()
    known: set[tuple[str, str]] = set()
    reading = 0
    while True:
        over = is_over()  # asked before the pods: what they said until then is read
        for pod in _pods(cluster, token):
            name, uid = pod["metadata"]["name"], pod["metadata"].get("uid", "")
            if (name, uid) not in known:
                known.add((name, uid))
                reading += 1
                work = (cluster, name, uid, _prefix(pod, nodes), tail, wait, lines)
                threading.Thread(target=_read, args=work, daemon=True).start()
        if over and not reading:
            return
        ends = time.monotonic() + POLL_S
        while (left := ends - time.monotonic()) > 0:
            try:
                found = lines.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(found, UserError):
                raise found
            if found is None:
                reading -= 1
                break
            yield found


def _read(
    cluster: Cluster,
    pod: str,
    uid: str,
    prefix: str,
    tail: int | None,
    wait: Wait,
    lines: queue.SimpleQueue[str | UserError | None],
) -> None:
    try:
        for line in pod_log(cluster, pod, follow=True, tail=tail, uid=uid, wait=wait):
            lines.put(prefix + line)
    except UserError as error:
        lines.put(error)
    lines.put(None)


def _pods(cluster: Cluster, token: str) -> list[Object]:
    pods = [
        pod for pod in cluster.list("Pod", selector(token)) if pod["metadata"]["labels"].get(ROLE) != "upload"
    ]
    return sorted(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp") or "", pod_index(pod)))


def _prefix(pod: Object, nodes: int) -> str:
    if pod["metadata"]["labels"].get(ROLE) == "prepare":
        return f"prepare {pod_index(pod)} | "
    return f"node {pod_index(pod)} | " if nodes > 1 else ""
