"""Places in object storage by name: `s3://bucket/prefix` and `gs://bucket/prefix`; never with a login in them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainway.errors import ConfigError

SCHEMES = ("s3", "gs")

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_QUERY = re.compile(r"\?[^/]*=")
_CREDENTIALS = "take it out; the login comes from the environment (AWS_ACCESS_KEY_ID and the like, or the machine's role)"


@dataclass(frozen=True)
class Address:
    """A bucket and a prefix in it, without slashes at its ends."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")


def is_url(place: str) -> bool:
    """Whether a place is written as an address rather than as a path."""
    return _URL.fullmatch(place) is not None


def is_remote(place: str) -> bool:
    """Whether a place is in object storage, by the way it is written."""
    match = _URL.fullmatch(place)
    return match is not None and match["scheme"] in SCHEMES


def parse_address(place: str) -> Address:
    """The address that `place` is. Raises ConfigError, which repeats nothing that could be secret."""
    match = _URL.fullmatch(place)
    scheme = match["scheme"].lower() if match else ""
    if match is None or scheme not in SCHEMES:
        known = " or ".join(f"{name}://bucket/path" for name in SCHEMES)
        shown = f"{scheme}://..." if match else repr(place)
        raise ConfigError(f"{shown} is no address of object storage", f"known is {known}", "correct it")
    bucket, _, prefix = match["rest"].partition("/")
    if "@" in bucket or ":" in bucket:
        raise ConfigError(
            f"a login stands in the address {scheme}://...", "it would end in logs", _CREDENTIALS
        )
    if _QUERY.search(prefix):
        raise ConfigError(
            f"a query stands in the address {scheme}://{bucket}/...", "a signature may be in it", _CREDENTIALS
        )
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"{place!r} names no bucket", "", f"write {scheme}://bucket/path")
    prefix = prefix.strip("/")
    if prefix and not is_safe_name(prefix):
        raise ConfigError(f"{place!r} is no plain path in a bucket", "it holds //, . or ..", "correct it")
    return Address(scheme, bucket, prefix)


def is_safe_name(name: str) -> bool:
    """Whether an object's name is a plain relative path: it can be a file below a directory and nowhere else."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\0-\x1f\x7f\\]", name)
