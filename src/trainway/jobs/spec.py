"""The job file: every setting of a job, its type, its bounds and its default. The only home of a job's defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, StringConstraints, model_validator

from trainway.config.schema import LicenceName, ModelName, NonNegativeInt, Section, TagName

TargetName = Literal["local", "ssh", "runpod", "kubernetes"]
Port = Annotated[int, Field(ge=1, le=65535)]
JobName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,43}[a-z0-9])?$")]
"""A label of DNS, short enough for what Kubernetes hangs on to it: the name of a pod, a directory and a host."""
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]

IMAGE = "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404"
"""An image of RunPod's with CUDA, Python and sshd; Trainway comes on to it by `trainway bootstrap`."""


class GpuChoice(Section):
    """One kind of GPU that would do; the candidates are tried in the order of the file. A bare string is its name."""

    name: str
    """A name of Trainway's catalogue, such as H100 SXM or A100 80GB; `trainway plan` lists those that fit."""
    count: PositiveInt = 1
    """GPUs in each node."""
    max_price: PositiveFloat | None = None
    """runpod: highest price of one GPU in dollars per hour; empty means whatever the limit in dollars allows."""
    price: PositiveFloat | None = None
    """What one GPU costs in dollars per hour where no catalogue says it: ssh, kubernetes; empty means nothing."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Upload(Section):
    """A file or directory of this machine that the job needs. A bare string goes to the volume's root by its name."""

    path: str
    """A file or directory here, seen from the job file."""
    to: str = ""
    """Where it goes, seen from the volume's root; empty means by its own name."""

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Limits(Section):
    """When a job is ended whatever it does. The clock goes on over restarts."""

    hours: PositiveFloat | None = None
    """Longest time from the first start, in hours; empty means the plan's forecast, by half again and an hour."""
    dollars: PositiveFloat | None = None
    """Most that the job may cost; `up` refuses a plan above it, and the machine ends itself when it is spent."""
    stall_minutes: PositiveFloat = 30
    """Training that makes no step for so long is ended."""
    save_minutes: PositiveFloat = 12
    """How long a training that is asked to end may take to save; then it is killed."""
    start_minutes: PositiveFloat = 30
    """How long `up` waits for a machine that does not come; what it has rented is ended then, and pods of Kubernetes are left."""
    upload_minutes: PositiveFloat = 120
    """How long the machine waits for the files it was promised."""
    restarts: NonNegativeInt = 3
    """How often a crashed training is started again without having saved a step in between."""


class Release(Section):
    """Where the chosen checkpoint goes when the training is done."""

    to: str | None = None
    """A directory or an s3:// or gs:// address for the exported model, or hf://OWNER/NAME for a repository of the Hub;
    empty means none."""
    which: Literal["best", "latest"] | NonNegativeInt = "best"
    """The checkpoint to release: best, latest, or a step."""
    merge: bool = False
    """Merge an adapter into its base model."""
    tag: TagName = "v0.1"
    """hf: tag of the release; it is set when everything else is there."""
    private: bool = True
    """hf: make a private repository; off: everyone may read it."""
    licence: LicenceName | None = None
    """hf: the model's licence, as the Hub names it; empty means the card names none."""
    base: ModelName | None = None
    """hf: id of the base model for the card, where model.path is a directory."""


class AtEnd(Section):
    """What happens after the last step."""

    release: Release = Release()
    """Export of the model."""
    machine: Literal["terminate", "stop", "keep"] = "terminate"
    """The rented machine: terminate ends every cost but the volume's; stop keeps its disk, which costs; keep goes on costing."""


class Volume(Section):
    """What outlives the machine."""

    id: str | None = None
    """RunPod: an existing network volume. Kubernetes: an existing PersistentVolumeClaim."""
    size_gb: PositiveInt | None = None
    """Size of a new one; empty with an empty id means: no volume beside the machine's own disk."""
    storage_class: str | None = None
    """Kubernetes: the class of a new claim; empty means the cluster's default."""


class SshSettings(Section):
    """A machine that is reached by SSH."""

    host: str | None = None
    """Its name or address, or a Host of ~/.ssh/config."""
    user: str | None = None
    """The login; empty means what ssh would use."""
    port: Port | None = None
    """Empty means what ssh would use."""
    key: str | None = None
    """File of the private key; empty means what ssh would use."""
    host_key: str | None = None
    """The machine's public key as `ssh-keyscan` prints it, e.g. `ssh-ed25519 AAAA...`; empty means: asked for once and pinned."""
    end_command: tuple[str, ...] = ()
    """Command that ends the machine there, e.g. [sudo, poweroff]; empty means it is left running."""


class RunPodSettings(Section):
    """What RunPod alone asks for."""

    cloud: Literal["SECURE", "COMMUNITY"] = "SECURE"
    """Whose machines."""
    data_centers: tuple[str, ...] = ()
    """Ids of data centres that will do, e.g. [EU-RO-1]; empty means all."""
    min_cuda: str | None = None
    """Lowest CUDA version of the driver, e.g. 12.8."""
    registry: str | None = None
    """Id of the registry login for a private image."""
    erased_outputs: bool = False
    """Let outputs lie where they are erased with the pod: on no volume, on /tmp or on /root."""


class KubernetesSettings(Section):
    """What Kubernetes alone asks for."""

    kind: Literal["job", "jobset", "statefulset"] = "job"
    """job: an Indexed Job with a headless Service; jobset: restarts all nodes together; statefulset: for those who ask for it."""
    namespace: str = "default"
    """Namespace of all objects."""
    context: str | None = None
    """Context of the kubeconfig; empty means the current one."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name of the resource that stands for one GPU."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that the nodes must have."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints that the pods put up with, as Kubernetes writes them."""
    cpu: str = "8"
    """Cores requested by each pod."""
    cpu_limit: str | None = None
    """Cores that a pod may use at most, where the namespace's quota asks for a limit; empty means no limit."""
    memory: str = "64Gi"
    """Memory of each pod: request and limit."""
    shm: str = "16Gi"
    """Size of /dev/shm, part of the memory."""
    infiniband: bool = False
    """Ask for rdma/hca and the right to lock memory."""
    user_id: PositiveInt = 1000
    """User and group that the container runs as."""
    grace_s: PositiveInt = 900
    """Time that a pod has to save when it is asked to end; must be longer than a checkpoint takes."""
    queue: str | None = None
    """Kueue's local queue."""
    prepare_workers: PositiveInt = 1
    """Pods that tokenise the data before the training starts; 1 leaves it to the training's first node."""


class JobSpec(Section):
    """One job: what to train, where, on what, with which limits, and what to do at the end."""

    name: JobName
    """Names the job everywhere: small letters, digits and dashes, at most 45."""
    config: str
    """A preset, or a configuration file as seen from the job file."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings over the configuration, e.g. {train.total_steps: 1000}."""
    target: TargetName
    """Where it runs."""
    boot: bool = False
    """Go through the boot stages first (shards, tokenizer, token store); else the configuration's data is used as it is."""
    inputs: tuple[str, ...] = ()
    """With boot: text to shard, as seen from the volume's root."""
    gpus: tuple[GpuChoice, ...] = ()
    """Candidates in the order of preference; empty means no GPU."""
    nodes: PositiveInt = 1
    """Machines."""
    processes: PositiveInt | None = None
    """Processes on each node; empty means one for each GPU, or one."""
    image: str = IMAGE
    """Container image, with a tag that is never `latest`, or a digest."""
    root: str | None = None
    """Where data, models and runs are on the machine; empty means the target's: /workspace on rented ones."""
    volume: Volume = Volume()
    """What outlives the machine."""
    disk_gb: PositiveInt = 50
    """The machine's own disk, which is erased with it."""
    upload: tuple[Upload, ...] = ()
    """What this machine brings to the job before it starts."""
    env: dict[VariableName, str] = Field(default_factory=dict)
    """Variables of the container. No secrets: those are named in `secrets`."""
    secrets: dict[VariableName, str] = Field(default_factory=dict)
    """Variables whose values are secret, by name alone. local and ssh: the variable of this machine to take it from;
    runpod: RunPod's secret; kubernetes: `secret/key`."""
    sync: str | None = None
    """An s3:// or gs:// address or a directory that the run is copied to while it goes on."""
    limits: Limits = Limits()
    """When it is ended whatever it does."""
    at_end: AtEnd = AtEnd()
    """What happens after the last step."""
    ports: tuple[Port, ...] = (6006,)
    """What `tunnel` makes reachable on 127.0.0.1; nothing but SSH is ever opened to the world."""
    source: str = "."
    """Where Trainway itself comes from when the image lacks it: a source tree here, a wheel, or a requirement for pip."""
    ssh: SshSettings = SshSettings()
    """For the target ssh."""
    runpod: RunPodSettings = RunPodSettings()
    """For the target runpod."""
    kubernetes: KubernetesSettings = KubernetesSettings()
    """For the target kubernetes."""
