"""Manifests are what the cluster's own schemas, the client's models and our rules of safety ask for."""

from __future__ import annotations

import functools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.unit.jobs.kubernetes.material import HOSTILE, JOBS, ODD, make_job, make_record
from trainway.config.schema import RunConfig
from trainway.errors import ConfigError
from trainway.jobs.kubernetes.export import export_manifests, yaml_text
from trainway.jobs.kubernetes.manifests import build, quantity
from trainway.jobs.kubernetes.names import Names, literal, secret_reference
from trainway.jobs.kubernetes.target import KubernetesTarget
from trainway.jobs.orders import Orders
from trainway.jobs.record import Record

kubernetes_validate = pytest.importorskip("kubernetes_validate")
pytest.importorskip("kubernetes")

VERSIONS = ("1.31", pytest.param("1.34", marks=pytest.mark.slow), "1.37")
SCHEMAS = functools.cache(kubernetes_validate.utils.schema_contents)
MODELS = {
    "ConfigMap": "V1ConfigMap",
    "Job": "V1Job",
    "PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "Pod": "V1Pod",
    "Service": "V1Service",
    "StatefulSet": "V1StatefulSet",
}
CANARY = "hf_canary0123456789abcdefghij"


@pytest.fixture(autouse=True)
def schemas_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kubernetes_validate.utils.schema_contents", SCHEMAS)


@pytest.fixture(params=JOBS)
def manifests(request: pytest.FixtureRequest, tmp_path: Path) -> list[dict[str, Any]]:
    job = make_job(tmp_path, request.param)
    found = KubernetesTarget().request(job, make_record(job))
    assert json.loads(json.dumps(found)) == found  # plain data
    return found


def pod_specs(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Pod":
            found.append(spec)
        elif manifest["kind"] == "JobSet":
            found += [item["template"]["spec"]["template"]["spec"] for item in spec["replicatedJobs"]]
        elif "template" in spec:
            found.append(spec["template"]["spec"])
    return found


def job_specs(manifests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain = [manifest["spec"] for manifest in manifests if manifest["kind"] == "Job"]
    sets = [manifest["spec"] for manifest in manifests if manifest["kind"] == "JobSet"]
    return plain + [item["template"]["spec"] for spec in sets for item in spec["replicatedJobs"]]


def only(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_the_clusters_own_schemas_hold(manifests: list[dict[str, Any]], version: str) -> None:
    core = [manifest for manifest in manifests if manifest["kind"] != "JobSet"]
    # a JobSet's Job is one like any other
    core += [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
        for spec in job_specs(manifests)
    ]
    for manifest in core:
        # another version means that there was no schema of this one: a warning, and a failure
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_a_schema_notices_what_is_wrong(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    broken = build(job, make_record(job)).workload
    broken["spec"]["completionMod"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


def test_the_clients_models_lose_nothing(manifests: list[dict[str, Any]]) -> None:
    from kubernetes import client

    api = client.ApiClient(client.Configuration(host="http://127.0.0.1:1"))
    for manifest in manifests:
        if manifest["kind"] != "JobSet":
            found = api.deserialize(json.dumps(manifest), MODELS[manifest["kind"]], "application/json")
            assert api.sanitize_for_serialization(found) == manifest


@pytest.mark.parametrize("name", [name for name in JOBS if name.startswith("jobset")])
def test_a_jobset_is_one_by_its_own_schema(tmp_path: Path, name: str) -> None:
    folder = os.environ.get("TRAINWAY_SPECS")
    if not folder:
        pytest.skip("TRAINWAY_SPECS names no directory with jobset-crd.yaml")
    document = yaml.safe_load((Path(folder) / "jobset-crd.yaml").read_text())
    (version,) = [item for item in document["spec"]["versions"] if item["name"] == "v1alpha2"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    job = make_job(tmp_path, name)
    jobset = build(job, make_record(job)).workload
    jsonschema.validate(jobset, schema)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, schema)


def closed(schema: Any) -> Any:
    """The schema with unknown fields forbidden, which the API server would drop."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["type"] = ["integer", "string"]
    if isinstance(found.get("properties"), dict) and "additionalProperties" not in found:
        found["additionalProperties"] = False
    if found.get("type") == "object" and "metadata" in found.get("properties", {}):
        found["properties"]["metadata"] = {"type": "object"}
    return found


def test_pods_are_safe(manifests: list[dict[str, Any]]) -> None:
    for spec in pod_specs(manifests):
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers", "initContainers"} & set(spec)
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 1000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        inner = container["securityContext"]
        assert inner["allowPrivilegeEscalation"] is False
        assert inner["readOnlyRootFilesystem"] is True
        assert inner["capabilities"]["drop"] == ["ALL"]
        assert inner["capabilities"].get("add", ["IPC_LOCK"]) == ["IPC_LOCK"]
        assert "privileged" not in inner
        assert "ports" not in container  # nothing is reachable from outside
        assert {"hostPath", "nfs"} & {kind for volume in spec["volumes"] for kind in volume} == set()
        assert container["command"][0] == "python"  # no shell between it and its signals
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_what_is_written_has_a_place(manifests: list[dict[str, Any]]) -> None:
    for spec in pod_specs(manifests):
        (container,) = spec["containers"]
        names = {volume["name"] for volume in spec["volumes"]}
        places = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in places.values()} <= names
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        for name in ("HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            assert any(
                str(values[name]).startswith(place)
                for place, mount in places.items()
                if not mount.get("readOnly")
            )
        assert container["workingDir"] == "/workspace"


def test_services_open_nothing(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        assert manifest["kind"] not in ("Ingress", "Gateway", "HTTPRoute")
        if manifest["kind"] == "Service":
            assert manifest["spec"]["clusterIP"] == "None"
            assert manifest["spec"]["publishNotReadyAddresses"] is True
            assert not {"ports", "type", "externalIPs"} & set(manifest["spec"])


def test_everything_is_ours_and_in_one_namespace(manifests: list[dict[str, Any]]) -> None:
    for manifest in manifests:
        labels = manifest["metadata"]["labels"]
        assert labels["app.kubernetes.io/managed-by"] == "trainway"
        assert (labels["trainway/job"], labels["trainway/token"]) == ("tune-7b", "0badcafe")
        assert manifest["metadata"]["namespace"] == "default"


def test_runs_end_and_stay_ended(manifests: list[dict[str, Any]]) -> None:
    for spec in job_specs(manifests):
        assert spec["completionMode"] == "Indexed"
        assert spec["completions"] == spec["parallelism"]
        assert spec["podReplacementPolicy"] == "Failed"
        assert spec["activeDeadlineSeconds"] >= 4 * 3600 + 900
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        fail = spec["podFailurePolicy"]["rules"][-1]
        assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [2, 3, 4])
        assert 75 not in fail["onExitCodes"]["values"]  # saved and left: it goes on elsewhere
    for manifest in manifests:
        if manifest["kind"] in ("Job", "JobSet"):
            assert manifest["spec"]["ttlSecondsAfterFinished"] == 7 * 24 * 3600
    for spec in pod_specs(manifests):
        (container,) = spec["containers"]
        if "trainway.pod" in container["command"]:
            assert container["command"] == ["python", "-m", "trainway.pod", "/etc/trainway/orders.json"]
            assert spec["terminationGracePeriodSeconds"] == 900


def test_machines_are_asked_for_as_strings_and_alike(manifests: list[dict[str, Any]]) -> None:
    for spec in pod_specs(manifests):
        held = spec["containers"][0]["resources"]
        assert all(isinstance(value, str) for part in held.values() for value in part.values())
        for name, value in held["limits"].items():
            assert held["requests"][name] == value
        assert "memory" in held["limits"]


def test_a_disrupted_pod_is_no_fault_but_in_a_gang(tmp_path: Path) -> None:
    job = make_job(tmp_path, "nodes")
    rules = build(job, make_record(job)).workload["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    gang = build(make_job(tmp_path, "jobset_nodes"), make_record(job)).workload["spec"]
    (inner,) = gang["replicatedJobs"]
    assert [rule["action"] for rule in inner["template"]["spec"]["podFailurePolicy"]["rules"]] == ["FailJob"]
    assert inner["template"]["spec"]["backoffLimit"] == 0
    assert gang["failurePolicy"]["maxRestarts"] == 3
    assert gang["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def test_several_nodes_meet_at_the_first(tmp_path: Path) -> None:
    job = make_job(tmp_path, "nodes")
    manifests = KubernetesTarget().request(job, make_record(job))
    workload, service = only(manifests, "Job"), only(manifests, "Service")
    template = workload["spec"]["template"]
    assert (workload["spec"]["completions"], workload["spec"]["backoffLimit"]) == (4, 12)
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert template["spec"]["subdomain"] == service["metadata"]["name"]
    values = {entry["name"]: entry["value"] for entry in template["spec"]["containers"][0]["env"]}
    assert values["MASTER_ADDR"] == f"{workload['metadata']['name']}-0.{service['metadata']['name']}"
    assert (values["MASTER_PORT"], values["NUM_NODES"]) == ("29500", "4")
    assert not [name for name in values if name.startswith(("NCCL_", "GLOO_")) or name == "NODE_RANK"]
    limits = template["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"memory": "64Gi", "nvidia.com/gpu": "8"}
    term = template["spec"]["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert term[0]["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
    assert template["spec"]["topologySpreadConstraints"][0]["topologyKey"] == "kubernetes.io/hostname"


def test_a_jobset_meets_at_its_own_names(tmp_path: Path) -> None:
    job = make_job(tmp_path, "jobset_nodes")
    manifests = KubernetesTarget().request(job, make_record(job))
    assert "Service" not in {manifest["kind"] for manifest in manifests}
    spec = only(manifests, "JobSet")["spec"]
    container = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    base = Names("tune-7b", "0badcafe").base
    assert values["MASTER_ADDR"] == f"{base}-nodes-0-0.{base}"
    assert spec["network"]["subdomain"] == base
    assert spec["suspend"] is True
    assert only(manifests, "JobSet")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"


def test_a_statefulset_sleeps_at_the_end(tmp_path: Path) -> None:
    job = make_job(tmp_path, "statefulset_nodes")
    found = build(job, make_record(job))
    assert any("holds its GPUs until `trainway down`" in note for note in found.notes)
    spec = found.workload["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"][2] == "trainway.jobs.kubernetes.forever"
    assert (spec["replicas"], spec["podManagementPolicy"]) == (3, "Parallel")
    rank = spec["template"]["spec"]["containers"][0]["env"][-1]
    assert rank["name"] == "NODE_RANK"
    assert rank["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['apps.kubernetes.io/pod-index']"


def test_infiniband_is_asked_for_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path, "infiniband")
    found = build(job, make_record(job))
    (container,) = found.workload["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["rdma/hca"] == "1"
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert any("LimitMEMLOCK" in note for note in found.notes)
    plain = build(make_job(tmp_path, "nodes"), make_record(job)).workload
    assert "rdma" not in json.dumps(plain) and "IPC_LOCK" not in json.dumps(plain)


def test_shared_memory_is_memory(tmp_path: Path) -> None:
    job = make_job(tmp_path, "one_gpu")
    volumes = build(job, make_record(job)).workload["spec"]["template"]["spec"]["volumes"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in volumes
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "data"}} in volumes


@pytest.mark.parametrize(
    ("name", "mode", "class_name"),
    [("cpu", "ReadWriteOnce", None), ("infiniband", "ReadWriteMany", "fast"), ("prepare", "ReadWriteMany", None)],
)  # fmt: skip
def test_a_new_claim_is_as_wide_as_its_readers(
    tmp_path: Path, name: str, mode: str, class_name: str | None
) -> None:
    job = make_job(tmp_path, name)
    claim = build(job, make_record(job)).claim
    assert claim is not None
    assert claim["spec"]["accessModes"] == [mode]
    assert claim["spec"].get("storageClassName") == class_name
    # it outlives the job, and the next one of this name finds it
    assert claim["metadata"]["name"] == "trainway-tune-7b"


def test_the_preparation_is_split_by_the_pods_numbers(tmp_path: Path) -> None:
    job = make_job(tmp_path, "prepare")
    found = build(job, make_record(job))
    assert found.prepare is not None
    spec = found.prepare["spec"]
    assert (spec["completions"], spec["completionMode"]) == (4, "Indexed")
    (container,) = spec["template"]["spec"]["containers"]
    words = " ".join(container["command"])
    assert (
        words
        == "python -m trainway prepare /etc/trainway/config.yaml --num-workers 4 --worker-index auto --merge"
    )
    assert "nvidia.com/gpu" not in json.dumps(container["resources"])
    # not a node of the training: the Service must not lead to it
    assert spec["template"]["metadata"]["labels"]["trainway/role"] == "prepare"


def test_the_settings_are_those_of_the_job(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    data = build(job, make_record(job)).settings["data"]
    assert Orders.model_validate_json(data["orders.json"]) == job.orders
    assert yaml.safe_load(data["config.yaml"]) == job.orders.config


def test_settings_larger_than_a_configmap_are_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    large = {"data": {"train": [f"data/{number:0200d}.jsonl" for number in range(3000)]}}
    job = replace(job, orders=job.orders.model_copy(update={"config": large}))
    with pytest.raises(ConfigError, match="a ConfigMap holds at most"):
        build(job, make_record(job))


def test_secrets_are_references(tmp_path: Path) -> None:
    job = make_job(tmp_path, "one_gpu")
    container = build(job, make_record(job)).workload["spec"]["template"]["spec"]["containers"][0]
    by_name = {entry["name"]: entry for entry in container["env"]}
    assert by_name["HF_TOKEN"] == {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}},
    }
    assert by_name["WANDB_API_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "wandb", "key": "api.key"}
    secret = re.compile(r"(?i)token|secret|password|api_?key|credential")
    assert [name for name, entry in by_name.items() if secret.search(name) and "value" in entry] == []


def test_no_secret_of_this_machine_is_in_anything_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    job = make_job(tmp_path, "one_gpu")
    record = make_record(job)
    written = json.dumps(KubernetesTarget().request(job, record))
    paths = export_manifests(job, record, tmp_path / "out")
    assert CANARY not in written
    assert all(CANARY not in path.read_text() for path in paths)


def test_values_arrive_as_they_are(tmp_path: Path) -> None:
    job = make_job(tmp_path, "odd")
    manifests = KubernetesTarget().request(job, make_record(job))
    read = list(yaml.safe_load_all("---\n".join(map(yaml_text, manifests))))
    assert read == manifests
    spec = only(manifests, "Job")["spec"]["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"]}
    assert {name: expanded(env[name], env) for name in ODD} == ODD
    assert spec["nodeSelector"] == {"pool": HOSTILE[0]}
    assert "amd.com/gpu" not in json.dumps(spec)  # no GPU was asked for


def expanded(text: str, env: dict[str, str]) -> str:
    """What Kubernetes makes of a value: `$$` is a dollar, `$(NAME)` the variable if there is one."""

    def found(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", found, text)


def test_expansion_would_happen_without_care() -> None:
    assert expanded("$(A)", {"A": "secret"}) == "secret"
    assert expanded(literal("$(A)"), {"A": "secret"}) == "$(A)"


@pytest.mark.parametrize("text", ["hub", "Hub/token", "hub/", "/token", "hub/to ken", "a/b/c", "hub/token\n"])
def test_what_is_no_reference_to_a_secret_is_refused(tmp_path: Path, text: str) -> None:
    assert secret_reference(text) is None
    job = make_job(tmp_path, secrets={"HF_TOKEN": text})
    with pytest.raises(ConfigError, match="names a Secret of the namespace and a key"):
        build(job, make_record(job))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404"}, "Trainway must be in the image"),
        ({"volume": {}, "nodes": 2}, "nodes is 2, and the job has no volume"),
        ({"volume": {}, "kubernetes": {"prepare_workers": 2}}, "prepare_workers is 2, and the job has no volume"),
        ({"volume": {}, "upload": ["x"]}, "gone with the pod"),
        ({"boot": True, "kubernetes": {"prepare_workers": 2}}, "the boot stages make the shards first"),
        ({"kubernetes": {"kind": "statefulset", "queue": "a"}}, "no work for a queue"),
        ({"kubernetes": {"shm": "65Gi"}}, "/dev/shm is part of the pod's memory"),
        ({"kubernetes": {"memory": "64 Gi"}}, "it is a quantity of Kubernetes"),
        ({"limits": {"hours": 1, "save_minutes": 20}}, "kill the pod while it saves"),
        ({"kubernetes": {"cpu": "8", "cpu_limit": "7500m"}}, "cannot ask for more than it may use"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    job = make_job(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        build(job, make_record(job))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"), [("8", 8), ("500m", "0.5"), ("64Gi", 64 * 2**30), ("1.5G", 1_500_000_000)]
)
def test_quantities(text: str, number: Any) -> None:
    assert quantity(text, "x") == quantity(str(number), "x")


@pytest.mark.parametrize("name", ["a", "a" * 45, "ab-" * 14 + "cde"])
def test_the_longest_names_that_come_of_a_name_are_labels(name: str) -> None:
    names = Names.of(Record(name=name, target="kubernetes", token="0badcafe", created=0.0))
    label = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
    longest = (
        f"{names.prepare}-999",
        f"{names.base}-nodes-0-999-abcde",
        names.settings,
        names.claim,
        names.upload,
    )
    for found in longest:
        assert label.fullmatch(found), found
    assert names.base.endswith("-0badcafe")


@pytest.mark.parametrize(
    ("changes", "offline"),
    [
        ({}, True),
        ({"recipe": "sft", "model": {"path": "Qwen/Qwen3-0.6B"}}, False),
        ({"recipe": "sft", "model": {"path": "./model"}}, True),
        ({"recipe": "sft", "model": {"path": "/models/m"}, "data": {"train": ["owner/set"]}}, False),
        ({"recipe": "gad", "model": {"path": "/models/m"}}, False),
    ],
)
def test_a_run_that_needs_no_hub_is_told_so(tmp_path: Path, changes: dict[str, Any], offline: bool) -> None:
    job = make_job(tmp_path)
    base = job.config.model_dump()
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) else value
    changed = type(job)(job.spec, RunConfig.model_construct(**vars(_config(base))), job.orders, job.folder)
    container = build(changed, make_record(job)).workload["spec"]["template"]["spec"]["containers"][0]
    assert ({"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]) is offline


def _config(values: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(values)


def test_the_users_variables_win(tmp_path: Path) -> None:
    job = make_job(tmp_path, env={"HF_HUB_OFFLINE": "0"})
    env = build(job, make_record(job)).workload["spec"]["template"]["spec"]["containers"][0]["env"]
    assert [entry["value"] for entry in env if entry["name"] == "HF_HUB_OFFLINE"] == ["0"]


@pytest.mark.parametrize("name", [name for name in JOBS if name not in ("prepare", "upload")])
def test_exported_files_are_the_request(tmp_path: Path, name: str) -> None:
    job = make_job(tmp_path, name)
    record = make_record(job)
    *paths, kustomization = export_manifests(job, record, tmp_path / "out")
    assert [yaml.safe_load(path.read_text()) for path in paths] == KubernetesTarget().request(job, record)
    assert yaml.safe_load(kustomization.read_text())["resources"] == [path.name for path in paths]
    assert export_manifests(job, record, tmp_path / "out") == [*paths, kustomization]


@pytest.mark.parametrize("name", ["prepare", "upload"])
def test_what_files_alone_cannot_do_is_not_exported(tmp_path: Path, name: str) -> None:
    job = make_job(tmp_path, name)
    with pytest.raises(ConfigError, match="manifests"):
        export_manifests(job, make_record(job), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_trainjob_runs_the_same_pods(tmp_path: Path) -> None:
    job = make_job(tmp_path, "jobset_nodes")
    record = make_record(job)
    paths = export_manifests(job, record, tmp_path / "out", trainjob=True)
    found = {item["kind"]: item for path in paths if (item := yaml.safe_load(path.read_text()))}
    runtime, train = found["TrainingRuntime"], found["TrainJob"]
    assert "JobSet" not in found
    jobset = build(job, record).workload["spec"]
    inner = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    assert inner["spec"] == jobset["replicatedJobs"][0]["template"]["spec"]
    assert inner["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    assert runtime["spec"]["mlPolicy"] == {"numNodes": 3}
    assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    with pytest.raises(ConfigError, match="Kubeflow Trainer makes JobSets"):
        export_manifests(make_job(tmp_path), record, tmp_path / "other", trainjob=True)


def test_the_pod_that_makes_a_volume_is_where_the_training_can_be(tmp_path: Path) -> None:
    """A volume is often made in the zone of its first pod, and mounted nowhere else."""
    zone = {"kubernetes": {"node_selector": {"gpu": "h100"}}}
    new = KubernetesTarget().request(*asked(tmp_path, "upload", **zone))
    assert only(new, "Pod")["spec"]["nodeSelector"] == {"gpu": "h100"}
    there = KubernetesTarget().request(*asked(tmp_path, "upload", volume={"id": "data"}, **zone))
    assert "nodeSelector" not in only(there, "Pod")["spec"]


def test_cores_have_a_limit_where_the_quota_asks_for_one(tmp_path: Path) -> None:
    found = KubernetesTarget().request(*asked(tmp_path, "upload", kubernetes={"cpu_limit": "16"}))
    limits = [spec["containers"][0]["resources"]["limits"]["cpu"] for spec in pod_specs(found)]
    assert limits == ["250m", "16"]
    for spec in pod_specs(KubernetesTarget().request(*asked(tmp_path, "upload"))):
        assert "cpu" not in spec["containers"][0]["resources"]["limits"]


def test_a_secret_in_the_place_of_a_variable_of_ours_is_there_once(tmp_path: Path) -> None:
    found = KubernetesTarget().request(*asked(tmp_path, secrets={"HF_HOME": "hub/home"}))
    env = only(found, "Job")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert [one for one in env if one["name"] == "HF_HOME"] == [
        {"name": "HF_HOME", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "home"}}}
    ]


def test_a_source_is_not_passed_over(tmp_path: Path) -> None:
    """Nothing is installed in a pod: what the job file names would not be what runs."""
    for source in (".", "trainway==1.0"):
        with pytest.raises(ConfigError, match="source is") as caught:
            make_job(tmp_path, source=source)
        assert "build the image" in caught.value.fix
    job = make_job(tmp_path)
    with pytest.raises(ConfigError, match=r"source is \.\./trainway"):
        build(replace(job, spec=job.spec.model_copy(update={"source": "../trainway"})), make_record(job))


def asked(folder: Path, name: str = "cpu", **changes: Any) -> tuple[Any, Record]:
    job = make_job(folder, name, **changes)
    return job, make_record(job)
