"""What RunPod's API v2 is sent and what is read of its answers; a field that it does not know is never sent."""

from __future__ import annotations

import json
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic.alias_generators import to_camel

PREFIX = "trainway-"
"""Every name that Trainway gives begins so."""
ORIGIN_VARIABLE = "TRAINWAY_ORIGIN"
MOST_VARIABLES = 50
LEAST_VOLUME_GB, MOST_VOLUME_GB = 10, 4096
LEAST_PODS, MOST_PODS = 2, 250

Cloud = Literal["SECURE", "COMMUNITY"]
PodStatus = Literal["PROVISIONING", "STARTING", "RUNNING", "EXITED", "ERROR", "TERMINATED"]
PodAction = Literal["start", "stop", "restart", "terminate"]
Stock = Literal["NONE", "LOW", "MEDIUM", "HIGH"]
Name = Annotated[str, StringConstraints(min_length=1)]
CudaVersion = Annotated[str, StringConstraints(pattern=r"^\d+\.\d+$")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^(ssh|ecdsa|sk)-[^\s]+ [^\s]+([ \t][^\n\r]*)?$")]


class Sent(BaseModel):
    """A body that we send."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True, allow_inf_nan=False
    )

    def body(self) -> dict[str, Any]:
        """As JSON-able data, without what is not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Got(BaseModel):
    """An answer: what we do not use is passed over, what we use has exactly its type."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", strict=True, alias_generator=to_camel, populate_by_name=True
    )


class NetworkMount(Sent):
    """A network volume at a path of the container."""

    volume_id: Name
    path: Name


class Mounts(Sent):
    """At most one network volume; none means: nothing outlives the container."""

    network: tuple[NetworkMount, ...] = Field(max_length=1)


class GpuRequest(Sent):
    """One type of GPU in one pod."""

    id: Name
    count: int = Field(ge=1)
    min_cuda_version: CudaVersion | None = None


class Container(Sent):
    """What pods and the pods of clusters have in common."""

    name: Name
    image: Name
    args: str
    disk: int = Field(ge=1)
    env: dict[str, str] = Field(max_length=MOST_VARIABLES)
    ports: tuple[str, ...]
    mounts: Mounts | None = None
    data_center_ids: tuple[str, ...] | None = None
    start_ssh: bool
    start_jupyter: bool = False


class CreatePod(Container):
    """Body of POST /pods."""

    gpu: GpuRequest
    cloud: Cloud
    registry: str | None = None


class Compute(Sent):
    """The one shape of all pods of a cluster."""

    gpu_type_id: Name
    gpu_count_per_pod: int = Field(ge=1)
    pod_count: int = Field(ge=LEAST_PODS, le=MOST_PODS)


class CreateCluster(Container):
    """Body of POST /clusters; it takes no registry login, no cloud and no version of CUDA."""

    type: Literal["TRAINING"] = "TRAINING"
    compute: Compute


class ActionRequest(Sent):
    """Body of POST /pods/ID/action."""

    action: PodAction


class CreateVolume(Sent):
    """Body of POST /network-volumes; it costs from then on until it is deleted."""

    name: Name
    size: int = Field(ge=LEAST_VOLUME_GB, le=MOST_VOLUME_GB)
    """Gigabytes."""
    data_center: Name


class SetKeys(Sent):
    """Body of PUT /account/ssh-keys: the whole set."""

    keys: tuple[PublicKey, ...]


class SshEndpoint(Got):
    """One way to a pod."""

    host: str
    port: int
    username: str


class PodSsh(Got):
    """`direct` is None until the pod runs and has a public port for 22/tcp."""

    proxy: SshEndpoint | None
    direct: SshEndpoint | None


class GpuUse(Got):
    util: int | None = None
    """Percent."""


class Runtime(Got):
    """Of a running pod."""

    uptime: int | None = None
    """Seconds since the container started."""
    gpus: list[GpuUse] = Field(default_factory=list)


class Membership(Got):
    """Of a pod in a cluster."""

    id: str
    rank: int | None


class PodGpu(Got):
    id: str
    count: int = 1


class Pod(Got):
    """A pod as it is now."""

    id: str
    name: str
    status: PodStatus
    gpu: PodGpu | None = None
    data_center_id: str | None
    ssh: PodSsh
    cluster: Membership | None = None
    env: dict[str, str] = Field(default_factory=dict)
    cost: float
    """Dollars per hour now; 0 when EXITED or TERMINATED."""
    runtime: Runtime | None
    created_at: datetime
    started_at: datetime | None


class PodList(Got):
    pods: list[Pod]


class ClusterShape(Got):
    gpu_type_id: str
    gpu_count_per_pod: int
    pod_count: int


class ClusterPods(Got):
    total: int
    by_status: dict[str, int]


class Cluster(Got):
    """A cluster as it is now; what its pods cost stands at the pods."""

    id: str
    name: str
    compute: ClusterShape
    data_center_id: str | None = None
    pods: ClusterPods
    created_at: datetime


class ClusterList(Got):
    clusters: list[Cluster]


class Volume(Got):
    """A network volume."""

    id: str
    name: str
    size: int
    data_center: str


class VolumeList(Got):
    network_volumes: list[Volume]


class Keys(Got):
    keys: list[str]


class PerCloud(Got):
    """Of prices, in dollars per hour of one GPU."""

    secure: float
    community: float


class PerCloudCount(Got):
    """Of the most GPUs in one pod."""

    secure: int
    community: int


class Availability(Got):
    """Of a GPU in one data centre."""

    id: str
    availability: Stock


class GpuType(Got):
    """An entry of the catalogue; the stock is there when it was asked for."""

    id: str
    name: str
    secure: bool
    community: bool
    price: PerCloud
    max_count: PerCloudCount
    availability: Stock | None = None
    data_centers: list[Availability] = Field(default_factory=list)


class GpuTypes(Got):
    gpus: list[GpuType]


class DataCenter(Got):
    id: str
    network_volume_types: list[str]
    """None means: no network volumes there."""


class DataCenters(Got):
    data_centers: list[DataCenter]


class BilledAmount(Got):
    total_amount: Decimal
    """Dollars, as they are written: sums of them are exact."""


class BillRecord(Got):
    """Of one bucket of time."""

    start_time: datetime
    end_time: datetime
    total_amount: Decimal


class BillTotals(Got):
    totals: BilledAmount


class Bill(Got):
    """Of one pod or one cluster."""

    records: list[BillRecord]
    metadata: BillTotals


class Problem(Got):
    """An error in the form of RFC 9457."""

    title: str = ""
    detail: str = ""
    errors: list[str] = Field(default_factory=list)

    def text(self) -> str:
        """The answer's own words."""
        words = [self.detail or self.title, *self.errors]
        return "; ".join(dict.fromkeys(word.strip() for word in words if word.strip()))


class LogLine(Got):
    """One event of a log."""

    line: str
    source: str = ""
    ts: str = ""


def ours_of(content: bytes, key: str) -> bytes:
    """The answer with those of its items alone that Trainway may have named, in its list `key`.

    What others have on the account is not looked at, so that no form of it keeps ours from being ended. One without a
    name may be ours: it stays, and is refused.
    """
    try:
        body = json.loads(content)
        body[key] = [item for item in body[key] if not _is_others(item)]
    except (ValueError, TypeError, LookupError):
        return content  # in another form altogether: the model says so
    return json.dumps(body).encode()


def _is_others(item: Any) -> bool:
    name = item.get("name") if isinstance(item, dict) else None
    return isinstance(name, str) and not name.startswith(PREFIX)
