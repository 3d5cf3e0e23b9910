"""The environment knobs of a boot: defaults per mode, flags over environment, and what is refused."""

from __future__ import annotations

import pytest

from trainway.config.knobs import Knobs, read_knobs
from trainway.errors import ConfigError


def test_defaults_of_the_cloud_and_of_a_laptop() -> None:
    cloud = Knobs("cloud", "runpod-1b", "runpod_1b", "/workspace", None, 250_000)
    assert read_knobs("cloud", {}) == cloud
    assert read_knobs("cloud", {"RUN_EXPERIMENT": "", "RUN_SHARD": "", "SHARD_LINES": ""}) == cloud
    assert read_knobs("local", {}) == Knobs("local", "m3-medium", "m3_medium", ".", None, 250_000)


def test_flags_win_over_the_environment() -> None:
    environ = {
        "RUN_EXPERIMENT": "e", "RUN_CONFIG": "c.yaml", "TRAINWAY_ROOT": "/data", "RUN_SHARD": "1", "SHARD_LINES": "7",
    }  # fmt: skip
    assert read_knobs("cloud", environ) == Knobs("cloud", "e", "c.yaml", "/data", True, 7)
    flags = read_knobs("cloud", environ, experiment="f", config="runpod_2b", root="/mnt", shard_lines=9)
    assert flags == Knobs("cloud", "f", "runpod_2b", "/mnt", True, 9)
    assert read_knobs("cloud", {"RUN_SHARD": "0"}).run_shard is False


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"RUN_SHARD": "true"}, "RUN_SHARD is 'true'"),
        ({"SHARD_LINES": "0"}, "SHARD_LINES is '0'"),
        ({"SHARD_LINES": "1e5"}, "SHARD_LINES is '1e5'"),
        ({"RUN_EXPERIMENT": ".."}, "RUN_EXPERIMENT is '..'"),
        ({"RUN_EXPERIMENT": "a/b"}, "RUN_EXPERIMENT is 'a/b'"),
        ({"RUN_EXPERIMENT": "$(touch x)"}, "RUN_EXPERIMENT"),
        ({"RUN_EXPERIMENT": "x" * 129}, "RUN_EXPERIMENT"),
    ],
)
def test_values_that_are_none(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_knobs("cloud", environ)
    assert said in caught.value.what


def test_flags_are_named_too() -> None:
    with pytest.raises(ConfigError, match="--train-shard-lines is '0'"):
        read_knobs("cloud", {}, shard_lines=0)
    with pytest.raises(ConfigError, match="--mode is 'moon'"):
        read_knobs("moon", {})
