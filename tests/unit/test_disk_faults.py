"""A disk that is full is the machine's fault and no internal error, whichever language says so."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from trainway.errors import EnvironmentFault
from trainway.files import disk_faults


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),  # as tokenizers raises it
    ],
)
def test_a_full_disk_is_named(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(EnvironmentFault, match=f"cannot write {tmp_path}") as found, disk_faults(tmp_path):
        raise error
    assert "No space left on device" in found.value.why and found.value.fix


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "x"), Exception("os error"), Exception("(os error 2)")]
)
def test_another_error_stays_what_it_is(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as found, disk_faults(tmp_path):
        raise error
    assert found.value is error
