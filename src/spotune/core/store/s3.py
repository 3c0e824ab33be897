"""The single requests to S3, and to what speaks it, by s3fs."""

import asyncio
import math
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any

from spotune.core.store.faults import Patience, answer_of
from spotune.core.store.objects import Head, Page, Piece

PART_BYTES = 8 << 20
MOST_PARTS = 9_000  # S3 takes 10,000
CONNECTIONS = 64
READ_BYTES = 1 << 20
TOKEN = "writer"  # the key of the object's metadata that holds its writer's token


@dataclass(frozen=True)
class Upload:
    """A multipart upload; its parts cost money until it is completed or aborted."""

    bucket: str
    key: str
    upload_id: str


class S3:
    """See ``objects.Api``."""

    parts_in_flight = 3

    def __init__(self, patience: Patience) -> None:
        with suppress(ImportError):  # of which each verb says so
            import_module("s3fs")  # here: the first request's time is the store's
        self._patience = patience

    async def connect(self) -> Any:
        client = await asyncio.to_thread(self._make, asyncio.get_running_loop())
        await client.set_session()
        return client

    def _make(self, loop: asyncio.AbstractEventLoop) -> Any:
        import fsspec

        settings = {
            **fsspec.config.conf.get("s3", {}).get("config_kwargs", {}),
            "connect_timeout": self._patience.request_s,
            "read_timeout": None,  # a slow link takes long to empty the buffers after an upload; the limits are ours
            "max_pool_connections": CONNECTIONS,
            "retries": {"total_max_attempts": 1},  # retries are ours
        }
        client = fsspec.filesystem(
            "s3", loop=loop, skip_instance_cache=True, use_listings_cache=False, config_kwargs=settings
        )
        client.retries = 1
        return client

    async def close(self, client: Any) -> None:
        if client._s3 is not None:
            await client._s3creator.__aexit__(None, None, None)

    def part_bytes(self, size: int) -> int:
        return max(PART_BYTES, math.ceil(size / MOST_PARTS))

    async def head(self, client: Any, path: str) -> Head:
        bucket, key, _ = client.split_path(path)
        answer = await client._call_s3("head_object", Bucket=bucket, Key=key, **client.req_kw)
        return Head(answer["ContentLength"], answer.get("Metadata", {}).get(TOKEN, ""))

    async def get(self, client: Any, path: str, start: int, length: int) -> Piece:
        bucket, key, _ = client.split_path(path)
        wanted = f"bytes={start}-{start + length - 1}"
        try:
            answer = await client._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted, **client.req_kw)
        except OSError as error:
            if start == 0 and answer_of(error)[0] == 416:  # an empty object has no ranges
                return Piece(b"", 0, "")
            raise
        try:
            data = await self._read(answer["Body"], answer["ContentLength"])
        finally:
            answer["Body"].close()
        size = int(answer["ContentRange"].rpartition("/")[2]) if "ContentRange" in answer else len(data)
        if len(data) != min(length, size - start):
            raise ConnectionError(f"{len(data)} bytes came for {wanted} of {size}")
        return Piece(data, size, answer["ETag"])

    async def _read(self, body: Any, length: int) -> bytearray:
        """The body, unless it falls silent."""
        data, count = bytearray(length), 0
        clock, silence_s = asyncio.get_running_loop().time, self._patience.request_s
        async with asyncio.timeout(silence_s) as limit:
            while piece := await body.read(READ_BYTES):
                data[count : count + len(piece)] = piece
                count += len(piece)
                limit.reschedule(clock() + silence_s)
        del data[count:]
        return data

    async def put(self, client: Any, path: str, data: bytes, token: str, new: bool) -> None:
        mode = "create" if new else "overwrite"
        await client._pipe_file(path, data, chunksize=len(data) + 1, mode=mode, Metadata={TOKEN: token})

    async def begin(self, client: Any, path: str, token: str, new: bool) -> Upload:
        bucket, key, _ = client.split_path(path)
        answer = await client._call_s3("create_multipart_upload", Bucket=bucket, Key=key, Metadata={TOKEN: token})
        return Upload(bucket, key, answer["UploadId"])

    async def part(self, client: Any, upload: Upload, start: int, data: bytes, size: int) -> dict[str, Any]:
        number = start // self.part_bytes(size) + 1
        names = {"Bucket": upload.bucket, "Key": upload.key, "UploadId": upload.upload_id}
        answer = await client._call_s3("upload_part", **names, PartNumber=number, Body=data)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    async def finish(self, client: Any, upload: Upload, receipts: list[Any], new: bool) -> None:
        names = {"Bucket": upload.bucket, "Key": upload.key, "UploadId": upload.upload_id}
        condition = {"IfNoneMatch": "*"} if new else {}
        await client._call_s3("complete_multipart_upload", **names, **condition, MultipartUpload={"Parts": receipts})

    async def abort(self, client: Any, upload: Upload) -> None:
        await client._abort_mpu(upload.bucket, upload.key, upload.upload_id)

    async def page(self, client: Any, path: str, flat: bool, marker: Any) -> Page:
        bucket, prefix, _ = client.split_path(path)
        names = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else "", "Delimiter": "" if flat else "/"}
        following = {"ContinuationToken": marker} if marker else {}
        answer = await client._call_s3("list_objects_v2", **names, **following, **client.req_kw)
        found = [entry["Key"] for entry in answer.get("Contents", [])]
        found += [entry["Prefix"] for entry in answer.get("CommonPrefixes", [])]
        return Page([f"{bucket}/{name}" for name in found], answer.get("NextContinuationToken"))

    async def delete(self, client: Any, path: str) -> None:
        await client._rm_file(path)

    async def unfinished(self, client: Any, path: str, older_than_s: float, marker: Any) -> Page:
        bucket, prefix, _ = client.split_path(path)
        names = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        answer = await client._call_s3("list_multipart_uploads", **names, **(marker or {}))
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(date) if date else datetime.now(UTC)  # the server's clock, where it tells
        found = [
            (f"{bucket}/{entry['Key']}", Upload(bucket, entry["Key"], entry["UploadId"]))
            for entry in answer.get("Uploads", [])
            if (now - entry["Initiated"]).total_seconds() >= older_than_s
        ]
        if not answer.get("IsTruncated"):
            return Page(found)
        return Page(found, {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]})
