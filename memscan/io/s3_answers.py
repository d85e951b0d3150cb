"""This module checks answers of S3.

An answer must be complete, in time, from S3, and have the stored bytes; otherwise it counts as no answer.

The HTTP library waits READ_SECONDS for each piece, so an answer that arrives slowly enough may last for ever. A proxy
may answer with its own page and code 200. A bit may flip on the way. Each of these becomes a `BrokenAnswer`, after
which s3fs tries again as after a broken connection.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from typing import Any

import s3fs

from memscan.io import s3

# Fields that S3 always answers with; a page that a proxy has put in its place has none of them.
_MARKS = {
    "GetObject": "ETag",
    "HeadObject": "ETag",
    "PutObject": "ETag",
    "UploadPart": "ETag",
    "CompleteMultipartUpload": "ETag",
    "ListObjectsV2": "Name",
}
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_WHOLE = re.compile(r"bytes 0-(\d+)/(\d+)")


class BrokenAnswer(ConnectionError):
    """This is an answer that does not count as one; s3fs repeats the request after it."""


s3fs.core.add_retryable_error(BrokenAnswer)


class S3Files(s3fs.S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """This is s3fs with a check of every answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of objects whose bytes were not those of their ETag: what they were then. The same bytes twice are no accident
        # on the way, but a store whose ETags are no MD5; its buckets are then not compared any more.
        self._other: dict[tuple[str, str], str] = {}
        self._no_md5: set[str] = set()

    async def get_s3(self, bucket: str | None = None) -> Any:
        client = await super().get_s3(bucket)
        if not isinstance(client._make_api_call, _Watched):
            client._make_api_call = _Watched(client._make_api_call, self)
        return client

    def compare(self, bucket: str, key: str, expected: str, found: str) -> None:
        """Raise BrokenAnswer if an object's bytes are not those that its ETag names."""
        if found == expected or bucket in self._no_md5:
            self._other.pop((bucket, key), None)
        elif self._other.get((bucket, key)) == found:
            self._no_md5.add(bucket)
        else:
            self._other[bucket, key] = found
            raise BrokenAnswer("the bytes that arrived are not those that are stored")


class _Watched:
    """A client's call of one operation, within a time, and with an answer that is S3's."""

    def __init__(self, call: Any, files: S3Files) -> None:
        self._call, self._files = call, files

    async def __call__(self, operation: str, arguments: dict[str, Any]) -> Any:
        # s3fs tries single operations again by itself, but not the pages of a listing.
        rounds = s3.ROUNDS if operation == "ListObjectsV2" else 1
        for left in reversed(range(rounds)):
            try:
                return await self._once(operation, arguments)
            except BrokenAnswer:
                if not left:
                    raise
                await asyncio.sleep(0.1)
        raise AssertionError("unreachable")

    async def _once(self, operation: str, arguments: dict[str, Any]) -> Any:
        body = arguments.get("Body", b"")
        limit = s3.deadline(len(body) if isinstance(body, bytes | bytearray | memoryview) else 0)
        answer = await _within(limit, self._call(operation, arguments))
        mark = _MARKS.get(operation)
        if mark is not None and not answer.get(mark):
            raise BrokenAnswer("the answer is not one of S3 (a page of a proxy?)")
        if operation == "GetObject":
            answer["Body"] = _Body(answer, self._files, arguments)
        return answer


class _Body:
    """This is the body of an answer: read within a time, of its full length, and compared with the ETag's MD5."""

    def __init__(self, answer: dict[str, Any], files: S3Files, arguments: dict[str, Any]) -> None:
        self._inner, self._files = answer["Body"], files
        self._place = arguments["Bucket"], arguments["Key"]
        self._length = int(answer.get("ContentLength") or 0)
        self._until = asyncio.get_running_loop().time() + s3.deadline(self._length)
        self._count = 0
        self._expected = _md5_of(answer)
        self._digest = hashlib.md5(usedforsecurity=False)

    async def read(self, amount: int | None = None) -> bytes:
        left = self._until - asyncio.get_running_loop().time()
        asked = self._inner.read() if amount is None or amount < 0 else self._inner.read(amount)
        try:
            data: bytes = await _within(left, asked)
        except Exception as error:
            if type(error).__name__ != "FlexibleChecksumError":  # botocore's, of a checksum that S3 keeps
                raise
            raise BrokenAnswer("the bytes that arrived are not those that are stored") from error
        self._count += len(data)
        if self._expected is not None:
            self._digest.update(data)
        if self._count > self._length or (self._count < self._length and (amount is None or amount < 0 or not data)):
            raise BrokenAnswer(f"{self._count} of {self._length} bytes arrived")
        if self._count == self._length and self._expected is not None:
            expected, self._expected = self._expected, None
            self._files.compare(*self._place, expected, self._digest.hexdigest())
        return data

    def close(self) -> None:
        self._inner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _md5_of(answer: dict[str, Any]) -> str | None:
    """Return the MD5 of a whole object if its ETag is one: not for multipart uploads, nor for the user's own keys."""
    whole = answer.get("ContentRange") is None
    if not whole and (found := _WHOLE.fullmatch(str(answer["ContentRange"]))):
        whole = int(found[1]) + 1 == int(found[2])
    plain = answer.get("ServerSideEncryption") in (None, "AES256") and not answer.get("SSECustomerAlgorithm")
    found = _MD5.fullmatch(str(answer.get("ETag")))
    return found[1] if whole and plain and found else None


async def _within(seconds: float, work: Any) -> Any:
    try:
        return await asyncio.wait_for(work, max(seconds, 0.001))
    except TimeoutError as error:
        raise BrokenAnswer(f"no complete answer within {seconds:.0f} s") from error
