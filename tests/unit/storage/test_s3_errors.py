"""What an answer of S3 means, and answers that no store should give; without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs")

from trainway.errors import EnvironmentFault
from trainway.storage.address import parse_address
from trainway.storage.retry import Backoff, Passing
from trainway.storage.s3 import S3Store
from trainway.storage.s3_errors import Missing, told
from trainway.storage.store import Changed, Entry

SECRET = "AKIACANARY0000000000"


def answer(code: str, status: int) -> Exception:
    from botocore.exceptions import ClientError

    about = {"HTTPStatusCode": status, "HTTPHeaders": {}}
    return ClientError({"Error": {"Code": code, "Message": SECRET}, "ResponseMetadata": about}, "PutObject")


@pytest.mark.parametrize(
    ("code", "status", "fix"),
    [
        ("RequestTimeTooSkewed", 403, "set this machine's clock"),
        ("ExpiredToken", 400, "log in anew"),
        ("SignatureDoesNotMatch", 403, "AWS_SECRET_ACCESS_KEY"),
        ("AuthorizationHeaderMalformed", 400, "AWS_DEFAULT_REGION"),
        ("PermanentRedirect", 301, "AWS_DEFAULT_REGION"),
        ("AccessDenied", 403, "may list, read, write and remove"),
    ],
)
def test_a_refusal_says_what_cures_it(code: str, status: int, fix: str) -> None:
    found = told(answer(code, status), "s3://bucket/run")
    assert isinstance(found, EnvironmentFault) and fix in found.fix and SECRET not in str(found)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("InvalidPart", 400, Passing),  # two that write one object share its upload
        ("SlowDown", 503, Passing),
        ("NoSuchUpload", 404, Missing),
        ("PreconditionFailed", 412, Changed),
    ],
)
def test_what_is_tried_again_and_what_is_not(code: str, status: int, kind: type[Exception]) -> None:
    assert isinstance(told(answer(code, status), "s3://bucket/run"), kind)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> S3Store:
    return S3Store(parse_address("s3://bucket/run"), Backoff(attempts=1))


def test_a_store_that_does_not_say_where_the_next_page_begins(
    store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[dict[str, Any]] = [{"IsTruncated": True, "NextContinuationToken": "t"}] * 3
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(store, "_call", lambda method, **more: (asked.append(more), pages[len(asked) - 1])[1])
    with pytest.raises(EnvironmentFault, match="lists in pages"):  # the same token again: it would never end
        store.entries()
    assert len(asked) == 2
    pages[:] = [{"IsTruncated": True}]
    asked.clear()
    with pytest.raises(EnvironmentFault, match="lists in pages"):
        store.entries()


def test_an_object_that_goes_before_it_is_compared(
    store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    entry = Entry(3, "900150983cd24fb0d6963f7d28e17f72")

    def gone(method: str, **more: Any) -> Any:
        raise Missing

    monkeypatch.setattr(store, "_call", gone)
    assert store.matches("file", entry, path) is None
    monkeypatch.setattr(
        store, "_call", lambda method, **more: {"ETag": f'"{entry.etag}"', "ContentLength": 3}
    )
    assert store.matches("file", entry, path) is True
    path.write_bytes(b"abd")
    assert store.matches("file", entry, path) is False
