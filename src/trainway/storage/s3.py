"""S3 and what speaks like it, by s3fs: requests of our own size, verified by MD5, with one bounded place for retries.

Sources: Amazon's "Checking object integrity" (an ETag is the MD5 of an object put at once, and the MD5 of its parts'
MD5s with their number else, unless it is encrypted by a key of KMS) and "Multipart upload limits".
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from trainway.errors import EnvironmentFault, UserError
from trainway.storage.address import Address
from trainway.storage.retry import Backoff, Passing, persist
from trainway.storage.s3_errors import Missing, told
from trainway.storage.store import BLOCK_BYTES, Changed, Content, Entry, file_md5, refuse_larger

T = TypeVar("T")

MAX_PARTS = 9_000
"""S3 takes 10,000."""
AT_A_TIME = 4
MAX_PART_BYTES = 256 << 20
"""Of an object that others have put there: its parts are read into memory to be compared."""
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60


class S3Store:
    """Objects below one address. Large ones go in parts, of which a killed upload's are taken over."""

    def __init__(self, address: Address, backoff: Backoff, block_bytes: int = BLOCK_BYTES) -> None:
        self._address, self._backoff, self._block_bytes = address, backoff, block_bytes
        self._files = _file_system()

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        start = self._key("")
        for page in self._pages("list_objects_v2", {"Prefix": self._key(prefix)}, "ContinuationToken"):
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # what a console puts there to show a folder
                    found[item["Key"].removeprefix(start)] = Entry(item["Size"], _etag(item))
        return found

    def put(self, name: str, content: Content) -> Entry:
        what = f"copying to {self._address}/{name}"
        if content.size <= self._block_bytes:
            data = b"".join(content.blocks())
            return persist(lambda: self._put_whole(name, data), what, self._backoff)
        return persist(lambda: self._put_parts(name, content), what, self._backoff)

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            listed = self._ask("head_object", Key=self._key(name))
            entry = Entry(listed["ContentLength"], _etag(listed))
            refuse_larger(entry.size, limit, f"{self._address}/{name}")
            return self._block(name, entry, 0, entry.size) if entry.size else b""
        except Missing:
            return None
        except Changed:
            return self.read(name, limit)

    def get(self, name: str, entry: Entry, to: Path) -> None:
        with open(to, "ab") as file, ThreadPoolExecutor(AT_A_TIME) as pool:
            starts = iter(range(file.tell(), entry.size, self._block_bytes))

            def block(start: int) -> Callable[[], bytes]:
                return partial(self._block, name, entry, start, min(start + self._block_bytes, entry.size))

            for data in _in_order(pool, map(block, starts)):
                file.write(data)

    def matches(self, name: str, entry: Entry, path: Path) -> bool | None:
        try:
            facts = self._ask("head_object", Key=self._key(name), PartNumber=1)
        except Missing:
            return None  # removed since it was read, which was of one version throughout
        md5, _, parts = entry.etag.partition("-")
        if not _is_hashed(facts) or len(md5) != 32:
            return None
        if not parts:
            return file_md5(path)[0].hex() == md5
        if facts["ContentLength"] > MAX_PART_BYTES or facts.get("PartsCount", 0) != int(parts):
            return None  # a store that does not tell how it was cut
        digest, count = file_md5(path, facts["ContentLength"])
        return digest.hex() == md5 and count == int(parts)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            # one by one: not everything that speaks like S3 removes many at once, and the order matters here
            self._ask("delete_object", Key=self._key(name))

    def drop_unfinished(self, prefix: str) -> None:
        for key, upload in self._unfinished(prefix):
            self._drop(key, upload)

    # ---- writing

    def _put_whole(self, name: str, data: bytes) -> Entry:
        md5 = hashlib.md5(data, usedforsecurity=False)
        answer = self._call("put_object", Key=self._key(name), Body=data, ContentMD5=_base64(md5.digest()))
        return Entry(len(data), _checked(answer, md5.hexdigest()))

    def _put_parts(self, name: str, content: Content) -> Entry:
        """Raises Passing when the whole has to be sent once more."""
        size = max(self._block_bytes, -(-content.size // MAX_PARTS))
        upload, there = self._begin(name)
        sums: list[bytes] = []
        etags: list[str] = []

        def sends() -> Iterator[Callable[[], str]]:
            for number, data in enumerate(content.blocks(size), 1):
                md5 = hashlib.md5(data, usedforsecurity=False)
                sums.append(md5.digest())
                if there.get(number) == Entry(len(data), md5.hexdigest()):
                    yield md5.hexdigest
                else:
                    yield partial(self._send_part, name, upload, number, data)

        try:
            with ThreadPoolExecutor(AT_A_TIME) as pool:
                etags.extend(_in_order(pool, sends()))
            return Entry(content.size, self._finish(name, upload, etags, sums))
        except Missing as error:
            raise Passing("the upload in parts is no longer known there") from error

    def _begin(self, name: str) -> tuple[str, dict[int, Entry]]:
        """An upload of this object and its parts that are there: a killed one's, else a new one's."""
        key = self._key(name)
        open_ones = [upload for found, upload in self._unfinished(name) if found == key]
        for upload in open_ones[:-1]:
            self._drop(key, upload)
        for upload in open_ones[-1:]:
            try:
                return upload, self._parts(key, upload)
            except Missing:
                pass
        return self._ask("create_multipart_upload", Key=key)["UploadId"], {}

    def _parts(self, key: str, upload: str) -> dict[int, Entry]:
        asked = {"Key": key, "UploadId": upload}
        pages = self._pages("list_parts", asked, "PartNumberMarker")
        parts = [part for page in pages for part in page.get("Parts", ())]
        return {part["PartNumber"]: Entry(part["Size"], _etag(part)) for part in parts}

    def _send_part(self, name: str, upload: str, number: int, data: bytes) -> str:
        md5 = hashlib.md5(data, usedforsecurity=False)

        def send() -> str:
            answer = self._call(
                "upload_part",
                Key=self._key(name), UploadId=upload, PartNumber=number, Body=data, ContentMD5=_base64(md5.digest()),
            )  # fmt: skip
            return _checked(answer, md5.hexdigest())

        return persist(send, f"copying part {number} to {self._address}/{name}", self._backoff)

    def _finish(self, name: str, upload: str, etags: Iterable[str], sums: Iterable[bytes]) -> str:
        numbered = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        md5 = hashlib.md5(b"".join(sums), usedforsecurity=False).hexdigest()
        expected = f"{md5}-{len(numbered)}"
        try:
            answer = self._ask(
                "complete_multipart_upload",
                Key=self._key(name), UploadId=upload, MultipartUpload={"Parts": numbered},
            )  # fmt: skip
        except Missing:
            # an attempt whose answer was lost may have finished it
            answer = self._ask("head_object", Key=self._key(name))
            if _etag(answer) != expected:
                raise
        return _checked(answer, expected)

    def _unfinished(self, prefix: str) -> list[tuple[str, str]]:
        """(key, id) of uploads that were begun and not finished, the oldest first."""
        found = []
        for page in self._pages("list_multipart_uploads", {"Prefix": self._key(prefix)}, "KeyMarker"):
            found += [
                (item.get("Initiated"), item["Key"], item["UploadId"]) for item in page.get("Uploads", ())
            ]
        return [(key, upload) for _, key, upload in sorted(found, key=lambda item: str(item[0]))]

    def _drop(self, key: str, upload: str) -> None:
        with suppress(Missing):
            self._ask("abort_multipart_upload", Key=key, UploadId=upload)

    # ---- reading

    def _block(self, name: str, entry: Entry, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of exactly the object that was listed. Raises Changed when it is another one."""
        key = self._key(name)

        async def ask(client: Any) -> tuple[str, bytes]:
            asked = {"Bucket": self._address.bucket, "Key": key, "Range": f"bytes={start}-{end - 1}"}
            answer = await client.get_object(
                **asked, **({"IfMatch": f'"{entry.etag}"'} if entry.etag else {})
            )
            async with answer["Body"] as body:
                return _etag(answer), await body.read()

        def read() -> bytes:
            etag, data = self._run(ask)
            if entry.etag and etag != entry.etag:
                raise Passing("the answer is of another object than was asked for")
            if len(data) != end - start:
                raise Passing(f"a short read: {len(data)} of {end - start} bytes")
            return data

        try:
            return persist(read, f"reading {self._address}/{name}", self._backoff)
        except Missing as error:
            raise Changed from error

    # ---- requests

    def _key(self, name: str) -> str:
        return f"{self._address.prefix}/{name}" if self._address.prefix else name

    def _pages(self, method: str, asked: Mapping[str, Any], marker: str) -> Iterator[dict[str, Any]]:
        asked = dict(asked)
        while True:
            page = self._ask(method, **asked)
            yield page
            if not page.get("IsTruncated"):
                return
            if f"Next{marker}" not in page or page[f"Next{marker}"] == asked.get(marker):
                raise EnvironmentFault(
                    f"{self._address}: the store lists in pages, and does not say where the next one begins",
                    f"its answer to {method} has no Next{marker}",
                    "use another store: this one speaks S3 in part only",
                )
            asked[marker] = page[f"Next{marker}"]
            if "NextUploadIdMarker" in page:
                asked["UploadIdMarker"] = page["NextUploadIdMarker"]

    def _ask(self, method: str, **arguments: Any) -> Any:
        """One small request, tried again while it may succeed."""
        where = f"{self._address.scheme}://{self._address.bucket}/{arguments.get('Key') or arguments.get('Prefix', '')}"
        return persist(
            lambda: self._call(method, **arguments), f"{method.replace('_', ' ')} {where}", self._backoff
        )

    def _call(self, method: str, **arguments: Any) -> Any:
        async def ask(client: Any) -> Any:
            return await getattr(client, method)(Bucket=self._address.bucket, **arguments)

        return self._run(ask)

    def _run(self, ask: Callable[[Any], Any]) -> Any:
        """What `ask(client)` gives, on s3fs's own thread. Raises Passing, Missing, Changed, EnvironmentFault."""
        from fsspec.asyn import sync

        async def asked() -> Any:
            await self._files.set_session()
            return await ask(await self._files.get_s3(self._address.bucket))

        try:
            # the requests have time limits of their own; this one is for a thread that has died
            return sync(self._files.loop, asked, timeout=CONNECT_TIMEOUT_S + 20 * READ_TIMEOUT_S)
        except (UserError, Passing):
            raise
        except Exception as error:
            raise told(error, str(self._address)) from error


def _file_system() -> Any:
    if importlib.util.find_spec("s3fs") is None:
        raise EnvironmentFault("s3:// needs s3fs, which is not installed", "", "pip install 'trainway[s3]'")
    # by name: neither library has types
    S3FileSystem = importlib.import_module("s3fs").S3FileSystem

    config = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "max_pool_connections": 2 * AT_A_TIME,
        # retries are ours: two layers of them would multiply
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        # Content-MD5 is what every store that speaks like S3 checks; trailing checksums some of them refuse
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    return S3FileSystem(config_kwargs=config, skip_instance_cache=True, use_listings_cache=False)


def _checked(answer: Mapping[str, Any], expected: str) -> str:
    """The ETag of what was just written. Raises Passing when it is of other bytes."""
    etag = _etag(answer)
    if _is_hashed(answer) and etag != expected:
        raise Passing(f"the store holds other bytes than it was sent (ETag {etag:.40})")
    return etag


def _is_hashed(answer: Mapping[str, Any]) -> bool:
    # of an object that is encrypted by a key of KMS or of the client the ETag is no MD5: there Content-MD5, which the
    # store has checked, stands alone
    encrypted = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    return not encrypted and "SSECustomerAlgorithm" not in answer


def _in_order(pool: ThreadPoolExecutor, works: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results in order, AT_A_TIME at once: no more than these are begun and held in memory."""
    waiting: deque[Future[T]] = deque()
    try:
        for work in works:
            if len(waiting) == AT_A_TIME:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
