"""What a failed request to S3 means: worth another attempt, nothing there, another object by now, or an error of the user's."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

from trainway.errors import EnvironmentFault
from trainway.storage.retry import Passing
from trainway.storage.store import Changed

_PASSING_CODES = {
    "BadDigest",  # the bytes were altered on the way
    "IncompleteBody",
    "InternalError",
    "InvalidPart",  # another process goes on with the same upload: it is sent once more
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "XAmzContentSHA256Mismatch",
}
_REGION = (
    "set AWS_DEFAULT_REGION to the bucket's region, and AWS_ENDPOINT_URL for a store that is not Amazon's"
)
_CURES = {
    "RequestTimeTooSkewed": "set this machine's clock: it is more than 15 minutes off the store's",
    "RequestExpired": "set this machine's clock: it is more than 15 minutes off the store's",
    "ExpiredToken": "log in anew: the session in the environment has expired",
    "TokenRefreshRequired": "log in anew: the session in the environment has expired",
    "InvalidAccessKeyId": "correct AWS_ACCESS_KEY_ID: the store does not know it",
    "SignatureDoesNotMatch": "correct AWS_SECRET_ACCESS_KEY",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}
_MISSING_CODES = {"404", "NoSuchKey", "NotFound"}
_CHANGED_CODES = {"412", "PreconditionFailed", "416", "InvalidRange"}


class Missing(Exception):
    """There is no such object, or no such upload."""


def told(error: Exception, where: str) -> Exception:
    """What a failed request means. The server's own words are left out: they may repeat a login."""
    import aiohttp

    boto = importlib.import_module("botocore.exceptions")

    if isinstance(error, boto.ClientError):
        return _told_by_server(error.response, where)
    if isinstance(
        error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError
    ):
        return EnvironmentFault(
            f"{where}: no login for this store",
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set, and the machine has no role",
            "set them in the environment of this process, with AWS_ENDPOINT_URL for a store that is not Amazon's",
        )
    network = (
        boto.HTTPClientError, boto.IncompleteReadError, boto.ResponseStreamingError,
        importlib.import_module("botocore.parsers").ResponseParserError,
        aiohttp.ClientError, asyncio.TimeoutError, TimeoutError, ConnectionError,
    )  # fmt: skip
    if isinstance(error, network) or type(error).__name__ in ("IncompleteRead", "FSTimeoutError"):
        return Passing(f"the connection failed ({type(error).__name__})")
    if isinstance(error, boto.BotoCoreError):
        fix = "check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the login in the environment"
        return EnvironmentFault(f"{where}: the request cannot be made", type(error).__name__, fix)
    return error


def _told_by_server(response: Mapping[str, Any], where: str) -> Exception:
    code = str(response.get("Error", {}).get("Code", ""))
    about = response.get("ResponseMetadata", {})
    status = int(about.get("HTTPStatusCode") or 0)
    if status == 429 or status >= 500 or code in _PASSING_CODES:
        return Passing(
            f"the store answers {status} {code}", _seconds(about.get("HTTPHeaders", {}).get("retry-after"))
        )
    if code == "NoSuchBucket":
        return EnvironmentFault(f"{where}: there is no such bucket", "", "make it, or correct the address")
    if code in _MISSING_CODES or code == "NoSuchUpload":
        return Missing()
    if code in _CHANGED_CODES:
        return Changed()
    fix = _CURES.get(code, "see that the login in the environment may list, read, write and remove there")
    return EnvironmentFault(f"{where}: the store refuses", f"it answers {status} {code}", fix)


def _seconds(value: str | None) -> float:
    return float(value) if value and value.isdecimal() else 0.0
