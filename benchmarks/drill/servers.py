"""Object stores on loopback, and what lies about in them: moto for S3, an emulator for GCS."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKET = "spotune"
CHECKOUT = Path(__file__).parents[2]
START_S = 60.0


@contextmanager
def s3_server() -> Iterator[str]:
    """A moto S3 server with a bucket ``spotune``; yields its endpoint."""
    port = free_port()
    with _server("moto_server", "-H", "127.0.0.1", "-p", str(port), port=port):
        from botocore.session import get_session  # boto3 is not in the trainer's environment

        endpoint = f"http://127.0.0.1:{port}"
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        client = get_session().create_client("s3", endpoint_url=endpoint, **keys)
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield endpoint


@contextmanager
def gcs_server() -> Iterator[str]:
    """A GCS emulator with a bucket ``spotune``; yields its endpoint."""
    port = free_port()
    words = ("start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", BUCKET)
    with _server("gcp-storage-emulator", *words, port=port):
        yield f"http://127.0.0.1:{port}"


def s3_environment(endpoint: str) -> dict[str, str]:
    """What leads a client to the server of ``s3_server``."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys}


def gcs_environment(endpoint: str) -> dict[str, str]:
    """What leads a client to the server of ``gcs_server``."""
    return {"STORAGE_EMULATOR_HOST": endpoint}


@dataclass(frozen=True)
class Bucket:
    """A bucket's URL and the environment that leads to it."""

    url: str
    environ: Mapping[str, str] = field(default_factory=dict)

    def unfinished_uploads(self, prefix: str) -> int:
        """Multipart uploads below a prefix that were neither completed nor aborted; S3 alone can list them."""
        if not self.url.startswith("s3://"):
            return 0
        import fsspec

        filesystem: Any = fsspec.filesystem("s3")
        name, _, below = self.url.removeprefix("s3://").partition("/")
        listed = filesystem.call_s3("list_multipart_uploads", Bucket=name)
        start = f"{below}/{prefix}".lstrip("/")
        return sum(upload["Key"].startswith(start) for upload in listed.get("Uploads") or [])

    def partial_files(self, prefix: str) -> int:
        """Files below a prefix whose writer died before it could rename them; a disk's bucket only."""
        if not self.url.startswith("file://"):
            return 0
        return len(list(Path(self.url.removeprefix("file://"), prefix).rglob(".part-*")))


@contextmanager
def reach_bucket(asked: str, folder: Path) -> Iterator[Bucket]:
    """The bucket that was asked for: a URL as it is, ``file``, or a server of our own for ``s3`` and ``gs``."""
    match asked:
        case "s3":
            with s3_server() as endpoint:
                yield Bucket(f"s3://{BUCKET}/gameday", s3_environment(endpoint))
        case "gs":
            with gcs_server() as endpoint:
                yield Bucket(f"gs://{BUCKET}/gameday", gcs_environment(endpoint))
        case "" | "file":
            yield Bucket(f"file://{folder}/bucket")
        case _:
            yield Bucket(asked)


def free_port() -> int:
    """A TCP port of loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _server(program: str, *words: str, port: int) -> Iterator[None]:
    command = [_program(program), *words]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not _listens(port):
            if server.poll() is not None:
                raise RuntimeError(f"{program} ended with exit code {server.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{program} did not start within {START_S:.0f} s")
            time.sleep(0.1)
        yield
    finally:
        server.kill()
        server.wait()


def _program(name: str) -> str:
    """The program's path in this environment, else in the launcher's: the trainer's has no servers."""
    beside, launcher = Path(sys.executable).with_name(name), CHECKOUT / ".venv" / "bin" / name
    return str(beside if beside.exists() else launcher)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
