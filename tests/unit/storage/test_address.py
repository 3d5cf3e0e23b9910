"""Addresses: what they are, and that none with a login is taken or repeated."""

from __future__ import annotations

import pytest

from trainway.errors import ConfigError
from trainway.storage.address import Address, is_remote, is_safe_name, parse_address

CANARY = "AKIACANARY7SECRET"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("s3://bucket", Address("s3", "bucket", "")),
        ("s3://bucket/", Address("s3", "bucket", "")),
        ("gs://my.bucket-1/a/b/", Address("gs", "my.bucket-1", "a/b")),
        ("s3://bucket/$(touch x);'\"", Address("s3", "bucket", "$(touch x);'\"")),
    ],
)
def test_an_address_is_a_bucket_and_a_prefix(place: str, expected: Address) -> None:
    assert parse_address(place) == expected
    assert str(parse_address(place)) == place.rstrip("/")


@pytest.mark.parametrize(
    "place",
    [
        f"s3://{CANARY}:{CANARY}@bucket/a",
        f"s3://{CANARY}@bucket",
        f"s3://bucket/a?X-Amz-Signature={CANARY}",
        f"https://{CANARY}@host/a",
        f"ftp://user:{CANARY}@host",
    ],
)
def test_a_login_in_an_address_is_refused_and_not_repeated(place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(place)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["s3://", "s3:///a", "s3://b/a//b", "s3://bucket/../a", "s3://bucket/a\nb", "bucket/a"]
)
def test_what_is_no_address(place: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(place)


def test_what_is_in_object_storage() -> None:
    places = ["s3://a/b", "gs://a", "hf://a/b", "/a/b", "a/b", "s3:/a", "file:///a"]
    assert [place for place in places if is_remote(place)] == ["s3://a/b", "gs://a"]


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../b", ".", "", "a\\b", "a\0b", "a\nb", "a/"])
def test_names_that_would_leave_a_directory_are_unsafe(name: str) -> None:
    assert not is_safe_name(name)
    assert is_safe_name("a/b.c-d_e $(x)")
