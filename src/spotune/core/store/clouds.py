"""The single requests of S3 and of Google Cloud Storage."""

import asyncio
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from inspect import unwrap
from typing import Any

from spotune.core.store.faults import Patience, answer_of
from spotune.core.store.objects import Head, Page, Piece

# The single requests to S3, and to what speaks it, by s3fs.

PART_BYTES = 8 << 20
MOST_PARTS = 9_000  # S3 takes 10,000
CONNECTIONS = 64
READ_BYTES = 1 << 20
TOKEN = "writer"  # the key of the object's metadata that holds its writer's token


@dataclass(frozen=True)
class S3Upload:
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

    async def begin(self, client: Any, path: str, token: str, new: bool) -> S3Upload:
        bucket, key, _ = client.split_path(path)
        answer = await client._call_s3("create_multipart_upload", Bucket=bucket, Key=key, Metadata={TOKEN: token})
        return S3Upload(bucket, key, answer["UploadId"])

    async def part(self, client: Any, upload: S3Upload, start: int, data: bytes, size: int) -> dict[str, Any]:
        number = start // self.part_bytes(size) + 1
        names = {"Bucket": upload.bucket, "Key": upload.key, "UploadId": upload.upload_id}
        answer = await client._call_s3("upload_part", **names, PartNumber=number, Body=data)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    async def finish(self, client: Any, upload: S3Upload, receipts: list[Any], new: bool) -> None:
        names = {"Bucket": upload.bucket, "Key": upload.key, "UploadId": upload.upload_id}
        condition = {"IfNoneMatch": "*"} if new else {}
        await client._call_s3("complete_multipart_upload", **names, **condition, MultipartUpload={"Parts": receipts})

    async def abort(self, client: Any, upload: S3Upload) -> None:
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
            (f"{bucket}/{entry['Key']}", S3Upload(bucket, entry["Key"], entry["UploadId"]))
            for entry in answer.get("Uploads", [])
            if (now - entry["Initiated"]).total_seconds() >= older_than_s
        ]
        if not answer.get("IsTruncated"):
            return Page(found)
        return Page(found, {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]})


# The single requests to Google Cloud Storage, by gcsfs.

GRANULE_BYTES = 256 << 10  # a resumable upload keeps whole ones, but for its end
BINARY = "application/octet-stream"


@dataclass
class GcsUpload:
    """A resumable upload; ``doubtful`` when it is not known how much of the last part has arrived."""

    location: str
    doubtful: bool = False


class Gcs:
    """See ``objects.Api``."""

    parts_in_flight = 1  # a resumable upload is one stream

    def __init__(self, patience: Patience) -> None:
        # For what else gcsfs can be, it asks for the bucket's type over gRPC: where that cannot be reached each call
        # stalls for a minute. Named below is the plain kind, whoever imported gcsfs before; the variable saves time.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        with suppress(ImportError):  # of which each verb says so
            import_module("gcsfs")  # here: the first request's time is the store's
        self._patience = patience

    async def connect(self) -> Any:
        return await asyncio.to_thread(self._make, asyncio.get_running_loop())  # it may ask a metadata server

    def _make(self, loop: asyncio.AbstractEventLoop) -> Any:
        import aiohttp
        from gcsfs.core import GCSFileSystem

        client = GCSFileSystem(
            loop=loop,
            skip_instance_cache=True,
            use_listings_cache=False,
            requests_timeout=aiohttp.ClientTimeout(),  # the limits are ours
            **({"token": "anon"} if os.environ.get("STORAGE_EMULATOR_HOST") else {}),
        )
        single = unwrap(GCSFileSystem._request)  # without gcsfs's own retries, and its tracebacks on stderr

        async def request(*args: Any, **kwargs: Any) -> Any:
            await _renew_token(client)
            return await single(client, *args, **kwargs)

        client._request = request
        return client

    async def close(self, client: Any) -> None:
        if client._session is not None:
            await client._session.close()

    def part_bytes(self, size: int) -> int:
        return PART_BYTES

    async def head(self, client: Any, path: str) -> Head:
        bucket, key, _ = client.split_path(path)
        answer = await client._call("GET", "b/{}/o/{}", bucket, key, json_out=True)
        return Head(int(answer["size"]), (answer.get("metadata") or {}).get(TOKEN, ""))

    async def get(self, client: Any, path: str, start: int, length: int) -> Piece:
        wanted = f"bytes={start}-{start + length - 1}"
        try:
            headers, data = await self._get(client, client.url(path), wanted)
        except Exception as error:
            if start == 0 and answer_of(error)[0] == 416:  # an empty object has no ranges
                return Piece(b"", 0, "")
            raise
        size = int(headers["Content-Range"].rpartition("/")[2]) if "Content-Range" in headers else len(data)
        if len(data) != min(length, size - start):
            raise ConnectionError(f"{len(data)} bytes came for {wanted} of {size}")
        return Piece(data, size, headers.get("x-goog-generation", ""))

    async def _get(self, client: Any, url: str, wanted: str) -> tuple[Mapping[str, str], bytearray]:
        """As ``client._call``, but it ends when the connection falls silent."""
        import aiohttp
        from gcsfs.retry import validate_response

        await _renew_token(client)
        session, limit = await client._set_session(), aiohttp.ClientTimeout(sock_read=self._patience.request_s)
        headers = client._get_headers({"Range": wanted})
        async with session.get(url, headers=headers, params=client._get_params({}), timeout=limit) as answer:
            data, count = bytearray(answer.content_length or 0), 0
            async for piece in answer.content.iter_any():
                data[count : count + len(piece)] = piece
                count += len(piece)
            del data[count:]
            validate_response(answer.status, bytes(data) if answer.status >= 400 else b"", url)
            return answer.headers, data

    async def put(self, client: Any, path: str, data: bytes, token: str, new: bool) -> None:
        mode = "create" if new else "overwrite"
        await client._pipe_file(path, data, metadata={TOKEN: token}, chunksize=len(data) + 1, mode=mode)

    async def begin(self, client: Any, path: str, token: str, new: bool) -> GcsUpload:
        from gcsfs.core import initiate_upload

        bucket, key, _ = client.split_path(path)
        mode = "create" if new else "overwrite"
        return GcsUpload(await initiate_upload(client, bucket, key, BINARY, {TOKEN: token}, mode=mode))

    async def part(self, client: Any, upload: GcsUpload, start: int, data: bytes, size: int) -> None:
        from gcsfs.core import upload_chunk

        arrived = await self._arrived(client, upload, size) - start if upload.doubtful else 0
        upload.doubtful = True
        if arrived < len(data):
            rest = data[max(0, arrived) :]
            await upload_chunk(client, upload.location, rest, start + len(data) - len(rest), size, BINARY)
        upload.doubtful = False

    async def _arrived(self, client: Any, upload: GcsUpload, size: int) -> int:
        """How many bytes of a resumable upload the store has."""
        question = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
        headers, answer = await client._call("PUT", upload.location, headers=question)
        if answer:  # the object: all of them
            return size
        end = int(headers["Range"].rpartition("-")[2]) + 1 if "Range" in headers else 0
        return end - end % GRANULE_BYTES

    async def finish(self, client: Any, upload: GcsUpload, receipts: list[Any], new: bool) -> None:
        """Nothing is left to do: the last part's arrival makes the object."""

    async def abort(self, client: Any, upload: GcsUpload) -> None:
        await client._call("DELETE", upload.location)

    async def page(self, client: Any, path: str, flat: bool, marker: Any) -> Page:
        bucket, prefix, _ = client.split_path(path)
        names = {"prefix": f"{prefix}/" if prefix else None, "delimiter": None if flat else "/"}
        answer = await client._call("GET", "b/{}/o", bucket, json_out=True, **names, pageToken=marker or None)
        found = [item["name"] for item in answer.get("items", [])]
        found += answer.get("prefixes", [])
        return Page([f"{bucket}/{name}" for name in found], answer.get("nextPageToken"))

    async def delete(self, client: Any, path: str) -> None:
        await client._rm_file(path)

    async def unfinished(self, client: Any, path: str, older_than_s: float, marker: Any) -> Page:
        """None: a resumable upload that is not finished cannot be listed, costs nothing, and ends after a week."""
        return Page([])


async def _renew_token(client: Any) -> None:
    """Where a token must be renewed gcsfs waits for it inside the loop, which would hold up everything else."""
    await asyncio.to_thread(client.credentials.maybe_refresh)
