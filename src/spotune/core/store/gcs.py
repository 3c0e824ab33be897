"""The single requests to Google Cloud Storage, by gcsfs."""

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from inspect import unwrap
from typing import Any

from spotune.core.store.faults import Patience, answer_of
from spotune.core.store.objects import Head, Page, Piece

PART_BYTES = 8 << 20
GRANULE_BYTES = 256 << 10  # a resumable upload keeps whole ones, but for its end
TOKEN = "writer"  # the key of the object's metadata that holds its writer's token
BINARY = "application/octet-stream"


@dataclass
class Upload:
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

    async def begin(self, client: Any, path: str, token: str, new: bool) -> Upload:
        from gcsfs.core import initiate_upload

        bucket, key, _ = client.split_path(path)
        mode = "create" if new else "overwrite"
        return Upload(await initiate_upload(client, bucket, key, BINARY, {TOKEN: token}, mode=mode))

    async def part(self, client: Any, upload: Upload, start: int, data: bytes, size: int) -> None:
        from gcsfs.core import upload_chunk

        arrived = await self._arrived(client, upload, size) - start if upload.doubtful else 0
        upload.doubtful = True
        if arrived < len(data):
            rest = data[max(0, arrived) :]
            await upload_chunk(client, upload.location, rest, start + len(data) - len(rest), size, BINARY)
        upload.doubtful = False

    async def _arrived(self, client: Any, upload: Upload, size: int) -> int:
        """How many bytes of a resumable upload the store has."""
        question = {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
        headers, answer = await client._call("PUT", upload.location, headers=question)
        if answer:  # the object: all of them
            return size
        end = int(headers["Range"].rpartition("-")[2]) + 1 if "Range" in headers else 0
        return end - end % GRANULE_BYTES

    async def finish(self, client: Any, upload: Upload, receipts: list[Any], new: bool) -> None:
        """Nothing is left to do: the last part's arrival makes the object."""

    async def abort(self, client: Any, upload: Upload) -> None:
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
