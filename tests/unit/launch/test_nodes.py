"""How many nodes, which one, and where they meet: from torchrun's words and from three kinds of environments."""

from __future__ import annotations

import pytest

from trainway.config.schema import EngineConfig
from trainway.errors import ConfigError
from trainway.launch.nodes import ALONE, Meeting, plan_meeting

INSTANT_CLUSTER = {
    "MASTER_ADDR": "127.0.0.1", "PRIMARY_ADDR": "127.0.0.1", "MASTER_PORT": "29400", "PRIMARY_PORT": "29400",
    "NODE_ADDR": "127.0.0.1", "NODE_RANK": "1", "NUM_NODES": "2", "NUM_TRAINERS": "8", "WORLD_SIZE": "16",
    "HOST_NODE_ADDR": "127.0.0.1:29400",
}  # fmt: skip


def meet(words: str = "", nproc: int = 1, engine: dict[str, object] | None = None, **environ: str) -> Meeting:
    return plan_meeting(words.split(), nproc, EngineConfig(**(engine or {})), environ)


def options(meeting: Meeting) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in meeting.arguments)


def refused(words: str = "", nproc: int = 1, engine: dict[str, object] | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        meet(words, nproc, engine, **environ)
    return str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"NUM_NODES": "1", "MASTER_ADDR": "h", "NODE_RANK": "0"},
        {"MASTER_ADDR": "h"},
        {"JOB_COMPLETION_INDEX": "3"},  # an Indexed Job of separate runs
        {"WORLD_SIZE": "2"},  # nobody says where: left over from something else
        {"MASTER_ADDR": "h", "WORLD_SIZE": "2"},
    ],
)
def test_one_node(environ: dict[str, str]) -> None:
    assert meet(nproc=2, **environ) == ALONE


def test_an_instant_cluster() -> None:
    meeting = meet(nproc=8, **INSTANT_CLUSTER)
    assert (meeting.nodes, meeting.master) == (2, "127.0.0.1")
    assert options(meeting) == {
        "nnodes": "2",
        "node-rank": "1",
        "rdzv-backend": "static",
        "rdzv-endpoint": "127.0.0.1:29400",
        "rdzv-conf": "timeout=600",
    }


def test_an_indexed_job_of_kubernetes() -> None:
    meeting = meet(NUM_NODES="4", MASTER_ADDR="job-0.svc", JOB_COMPLETION_INDEX="3", engine={"timeout_s": 60})
    found = options(meeting)
    assert (found["nnodes"], found["node-rank"], found["rdzv-endpoint"]) == ("4", "3", "job-0.svc:29500")
    assert found["rdzv-conf"] == "timeout=60"


def test_only_the_number_of_processes_and_this_nodes_rank() -> None:
    found = options(meet(nproc=2, WORLD_SIZE="6", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234", NODE_RANK="0"))
    assert (found["nnodes"], found["node-rank"], found["rdzv-endpoint"]) == ("3", "0", "10.0.0.1:1234")


def test_nodes_without_ranks_meet_by_c10d() -> None:
    found = options(meet(NUM_NODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="77"))
    assert found == {
        "nnodes": "2",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": "127.0.0.1:77",
        "rdzv-conf": "join_timeout=600,read_timeout=600",
        "local-addr": "127.0.0.1",
    }
    assert options(meet(NUM_NODES="2", HOST_NODE_ADDR="[::1]:8"))["rdzv-endpoint"] == "[::1]:8"


def test_torchruns_own_words_are_completed_and_never_said_twice() -> None:
    assert options(meet("--nnodes 2 --node-rank 1 --rdzv-endpoint 127.0.0.1:9")) == {
        "rdzv-backend": "static",
        "rdzv-conf": "timeout=600",
    }
    assert options(meet("--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:9 --node_rank=0")) == {
        "rdzv-conf": "join_timeout=600,read_timeout=600,is_host=1",
        "local-addr": "127.0.0.1",
    }
    assert options(meet("--nnodes 2 --rdzv-endpoint 127.0.0.1:9"))["rdzv-backend"] == "c10d"
    found = options(meet("--nnodes=2 --node-rank=0 --master-addr=h --master-port=9 --rdzv-conf=timeout=5"))
    assert found == {"rdzv-backend": "static"}
    # they win over the environment
    found = options(meet("--nnodes 2 --node-rank 1", NUM_NODES="4", NODE_RANK="3", MASTER_ADDR="h"))
    assert found == {"rdzv-backend": "static", "rdzv-endpoint": "h:29500", "rdzv-conf": "timeout=600"}
    assert meet("--standalone", NUM_NODES="4").arguments == ()
    assert meet("--max-restarts 2") == ALONE


@pytest.mark.parametrize(
    ("words", "environ", "said"),
    [
        ("", {"NUM_NODES": "2", "NODE_RANK": "0"}, "no place to meet"),
        ("--nnodes 2 --node-rank 0", {}, "no place to meet"),
        ("", {"NUM_NODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "2"}, "NODE_RANK is 2"),
        ("", {"NUM_NODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "-1"}, "NODE_RANK is '-1'"),
        (
            "",
            {"NUM_NODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "0", "JOB_COMPLETION_INDEX": "1"},
            "NODE_RANK=0, JOB_COMPLETION_INDEX=1",
        ),
        ("", {"NUM_NODES": "two", "MASTER_ADDR": "h"}, "NUM_NODES is 'two'"),
        ("", {"NUM_NODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "0", "WORLD_SIZE": "3"}, "WORLD_SIZE is 3"),
        (
            "",
            {"NUM_NODES": "2", "MASTER_ADDR": "h", "NODE_RANK": "0", "NUM_TRAINERS": "8"},
            "NUM_TRAINERS is 8",
        ),
        ("", {"MASTER_ADDR": "h", "WORLD_SIZE": "3", "NODE_RANK": "0"}, "no whole number of nodes"),
        ("", {"NUM_NODES": "2", "MASTER_ADDR": "h", "MASTER_PORT": "70000", "NODE_RANK": "0"}, "70000"),
    ],
)
def test_contradictions_are_refused(words: str, environ: dict[str, str], said: str) -> None:
    nproc = 2 if said == "no whole number of nodes" else 1
    assert said in refused(words, nproc, **environ)


def test_the_single_engine_has_one_node() -> None:
    assert "engine.name is single" in refused(
        engine={"name": "single"}, NUM_NODES="2", MASTER_ADDR="h", NODE_RANK="0"
    )
