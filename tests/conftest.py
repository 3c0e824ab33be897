"""What every test gets: a clean environment, and object stores on loopback for those that ask."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotune.contracts.store import Store

FOREIGN = ("SPOTUNE_", "SKYPILOT_", "SLURM_", "WANDB_")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the caller's own runs leaks in, nothing of a test leaks out, and no hub is asked."""
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SPOTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads of a tiny model wait for each other on a busy machine
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_for(port: int, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"server ended with exit code {server.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("server did not start within a minute")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A moto S3 server on loopback with a bucket ``spotune``; yields its endpoint."""
    port = _free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _wait_for(port, server)
        import boto3

        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=endpoint, **keys)
        client.create_bucket(Bucket="spotune")
        client.close()
        yield endpoint
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    """A GCS emulator on loopback with a bucket ``spotune``; yields its endpoint."""
    port = _free_port()
    program = str(Path(sys.executable).with_name("gcp-storage-emulator"))
    command = [
        program,
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--in-memory",
        "--default-bucket",
        "spotune",
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def reach(scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the environment that leads to the store of ``scheme`` on loopback, which is started when it is not there."""
    if scheme == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    if scheme == "gs":
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("gcs_server"))


@pytest.fixture(params=["file", "s3", "gs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of an empty place in each kind of bucket, with the environment that reaches it."""
    reach(request.param, request, monkeypatch)
    if request.param == "file":
        return f"file://{tmp_path}/bucket"
    return f"{request.param}://spotune/{tmp_path.name}-{time.time_ns()}"


@pytest.fixture
def store(bucket: str) -> Store:
    return Store(bucket)


@pytest.fixture
def local_store(tmp_path: Path) -> Store:
    return Store(f"file://{tmp_path}/bucket")
