"""The bucket means the same on a disk, on S3 and on GCS."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, BinaryIO

import pytest
from s3fs import S3FileSystem

from spotune.core.errors import InputError, StoreError
from spotune.core.fingerprint import file_facts
from spotune.core.store import RetryPolicy, Store
from spotune.core.store.local import Disk
from spotune.core.store.objects import RANGE_BYTES
from tests.clocks import Clock
from tests.conftest import reach


def test_objects_are_written_read_listed_and_deleted(store: Store, tmp_path: Path) -> None:
    assert store.read("runs/a/none") is None
    assert not store.exists("runs/a/none")
    assert store.keys("runs") == []
    assert store.folders("runs") == []
    store.write("runs/a/x", b"1")
    store.write("runs/a/x", b"22")
    store.write("runs/b/deep/y", b"3")
    assert store.read("runs/a/x") == b"22"
    assert store.exists("runs/a/x")
    assert store.keys("runs") == ["runs/a/x", "runs/b/deep/y"]
    assert store.folders("runs") == ["a", "b"]
    assert (store.names("runs"), store.names("runs/b/deep"), store.names("runs/c")) == (["a/", "b/"], ["y"], [])
    store.delete(["runs/a/x", "runs/a/never"])
    assert store.keys("runs") == ["runs/b/deep/y"]


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_an_object_for_the_folder_itself_is_none_of_what_lies_in_it(store: Store) -> None:
    """The console makes one when somebody makes the folder there."""
    bucket, _, place = store.url.removeprefix("s3://").partition("/")
    S3FileSystem().call_s3("put_object", Bucket=bucket, Key=f"{place}/runs/a/", Body=b"")
    store.write("runs/a/x", b"1")
    assert (store.names("runs/a"), store.folders("runs")) == (["x"], ["a"])


def test_create_happens_once(store: Store) -> None:
    assert store.create("runs/a/claim", b"first")
    assert not store.create("runs/a/claim", b"second")
    assert store.read("runs/a/claim") == b"first"


@pytest.mark.parametrize("bucket", ["file", "s3"], indirect=True)
@pytest.mark.parametrize("verb", ["create", "upload_new"])
def test_of_many_creators_one_wins(verb: str, bucket: str, tmp_path: Path) -> None:
    stores = [Store(bucket) for _ in range(8)]
    together = Barrier(8)
    for n in range(8):
        (tmp_path / str(n)).write_bytes(b"%d" % n)

    def claim(n: int) -> bool:
        together.wait()
        if verb == "create":
            return stores[n].create("runs/a/claim", b"%d" % n)
        return stores[n].upload_new(tmp_path / str(n), "runs/a/claim")

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert won.count(True) == 1
    assert stores[0].read("runs/a/claim") == b"%d" % won.index(True)
    assert stores[0].keys("runs") == ["runs/a/claim"]


@pytest.mark.parametrize("size", [0, 1, RANGE_BYTES, 2 * RANGE_BYTES + 1])
def test_files_go_up_and_come_back(size: int, store: Store, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "new" / "back"
    source.write_bytes(os.urandom(size))
    store.upload(source, "runs/a/big")
    assert store.upload_new(source, "runs/a/new")
    assert not store.upload_new(tmp_path / "source", "runs/a/new")
    for key in ("runs/a/big", "runs/a/new"):
        assert store.download(key, back) == file_facts(source)
        assert back.read_bytes() == source.read_bytes()
    assert store.read("runs/a/big") == source.read_bytes()
    store.upload(source, "runs/a/big")
    assert store.keys("runs") == ["runs/a/big", "runs/a/new"]
    assert [path.name for path in back.parent.iterdir()] == ["back"]


def test_what_is_not_there_is_not_downloaded(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.download("runs/a/gone", tmp_path / "new" / "gone")
    with pytest.raises(FileNotFoundError, match="source"):
        store.upload(tmp_path / "source", "runs/a/x")
    assert not store.exists("runs/a/x")
    assert list(tmp_path.glob("new/*")) == []


def test_a_disk_bucket_takes_and_gives_hard_links(local_store: Store, tmp_path: Path) -> None:
    source, link = tmp_path / "source", tmp_path / "link"
    source.write_bytes(b"data")
    link.symlink_to(source)
    local_store.upload(link, "runs/a/x")
    local_store.upload(link, "runs/a/x")
    local_store.download("runs/a/x", tmp_path / "back")
    stored = tmp_path / "bucket" / "runs" / "a" / "x"
    assert stored.stat().st_ino == source.stat().st_ino == (tmp_path / "back").stat().st_ino
    assert [path.name for path in stored.parent.iterdir()] == ["x"]


@pytest.mark.parametrize(("given", "made"), [(0o2775, 0o2775), (0o777, 0o777), (0o700, 0o755), (0o1777, 0o755)])
def test_who_shares_a_disk_bucket_shares_its_folders(local_store: Store, tmp_path: Path, given: int, made: int) -> None:
    root = tmp_path / "bucket"
    root.mkdir()
    root.chmod(given)
    local_store.write("runs/a/x", b"1")
    (tmp_path / "source").write_bytes(b"2")
    local_store.upload(tmp_path / "source", "runs/b/c/y")
    folders = [path for path in root.rglob("*") if path.is_dir()]
    assert len(folders) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {made}


def refuse_link(source: Path, target: Path, **_: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_a_disk_bucket_elsewhere_copies(local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3_000_001))
    monkeypatch.setattr(os, "link", refuse_link)
    local_store.upload(source, "runs/a/x")
    assert local_store.download("runs/a/x", tmp_path / "back") == file_facts(source)
    stored = tmp_path / "bucket" / "runs" / "a" / "x"
    assert len({path.stat().st_ino for path in (source, stored, tmp_path / "back")}) == 3
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_file_server_that_restarts_is_waited_for(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [OSError(errno.ESTALE, "Stale file handle")] * 2

    def link(source: str, target: str, real: Callable[..., None] = os.link, **folders: Any) -> None:
        if replies:
            raise replies.pop()
        real(source, target, **folders)

    monkeypatch.setattr(os, "link", link)
    clock, patience = Clock(), RetryPolicy(deadline_s=60.0, first_wait_s=1.0, longest_wait_s=8.0)
    local_store._bucket = Disk(local_store.url.removeprefix("file://"), patience, clock, clock.sleep)
    assert local_store.create("runs/a/x", b"1")
    assert 0.5 + 1.0 <= clock.now <= 1.0 + 2.0  # two waits, and the second is longer
    clock.now = 0.0
    replies += [OSError(errno.ESTALE, "Stale file handle")] * 100
    with pytest.raises(StoreError, match="runs/a/y: cannot create: .*Stale"):
        local_store.create("runs/a/y", b"1")
    assert patience.deadline_s - patience.longest_wait_s <= clock.now <= patience.deadline_s
    assert local_store.keys("runs") == ["runs/a/x"]


def test_unfinished_uploads_are_removed(store: Store, tmp_path: Path) -> None:
    """Only those below the folder; the S3 server says that all were begun in 2010."""
    keys = ["runs/a/one", "runs/a/deep/two", "runs/ab/three"]
    store.write("runs/a/whole", b"1")
    if store.url.startswith("s3"):
        root = store.url.removeprefix("s3://spotune/")
        for name in (*(f"{root}/{key}" for key in keys), f"{root}-other/runs/a/four"):
            s3_client().create_multipart_upload(Bucket="spotune", Key=name)
    elif store.is_local:
        keys = [f"{key.rpartition('/')[0]}/.part-{n}" for n, key in enumerate(keys)]
        for key in keys:
            path = tmp_path / "bucket" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("half")
    else:
        assert store.abort_uploads("runs/a", 0.0) == []
        return
    assert store.abort_uploads("runs/a", 1e9) == []
    assert sorted(store.abort_uploads("runs/a", 0.0)) == sorted(keys[:2])
    assert store.abort_uploads("runs/a", 0.0) == []
    assert store.keys("runs") == ["runs/a/whole"]
    assert store.abort_uploads("runs", 0.0) == keys[2:]
    if store.url.startswith("s3"):
        left = s3_client().list_multipart_uploads(Bucket="spotune", Prefix=f"{root}-other/")["Uploads"]
        assert [upload["Key"] for upload in left] == [f"{root}-other/runs/a/four"]


def s3_client() -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


@pytest.mark.parametrize("place", ["file/bucket", "file"])
def test_a_file_in_the_way_is_bad_input(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(f"file://{tmp_path}/{place}")
    with pytest.raises(InputError, match="a file is in the way") as error:
        store.create("runs/a/x", b"1")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="SPOTUNE_BUCKET"):
        store.read("runs/a/x")


def test_a_place_where_nothing_can_be_made_is_bad_input() -> None:
    with pytest.raises(InputError, match="SPOTUNE_BUCKET"):
        Store("file:///proc/nowhere").create("runs/a/x", b"1")


def test_a_disk_bucket_loads_no_client(tmp_path: Path) -> None:
    script = (
        "import sys; from spotune.core.store import Store; store = Store(sys.argv[1])\n"
        "assert store.create('a', b'1') and store.read('a') == b'1' and store.keys('') == ['a']\n"
        "print({'fsspec', 'asyncio', 'aiohttp'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, f"file://{tmp_path}/bucket"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_full_disk_is_worth_another_machine(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(StoreError, match="cannot write: .*No space left"):
        local_store.write("runs/a/x", b"1")


def full_device(path: Path | int, mode: str, buffering: int = -1) -> BinaryIO:
    if mode == "xb":  # the download's file; others are read or written elsewhere
        return open("/dev/full", "wb", buffering=buffering)
    return open(path, mode, buffering=buffering)


def test_a_full_local_disk_is_said_as_it_is(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write("runs/a/x", b"data")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse_link)
        patch.setattr("spotune.core.store.local.open", full_device, raising=False)
        with pytest.raises(OSError, match="No space left") as error:
            store.download("runs/a/x", tmp_path / "back")
    assert error.value.errno == errno.ENOSPC
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("bucket", ["s3", "gs"], indirect=True)
def test_an_upload_that_arrives_short_is_an_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(b"data")
    api = store._bucket._api  # type: ignore[attr-defined]
    real = api.put

    async def cut(client: Any, path: str, data: bytes, token: str, new: bool) -> None:
        await real(client, path, data[:-1], token, new)

    monkeypatch.setattr(api, "put", cut)
    with pytest.raises(StoreError, match="runs/a/x: cannot upload: 3 bytes are stored, 4 were uploaded"):
        store.upload(tmp_path / "source", "runs/a/x")


@pytest.mark.parametrize("url", ["bucket", "file://relative", "s3://", "ftp://x/y", "file:///", ""])
def test_what_is_no_bucket_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="SPOTUNE_BUCKET"):
        Store(url)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_not_there_is_bad_input(
    scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach(scheme, request, monkeypatch)
    store = Store(f"{scheme}://no-such-bucket/x")
    assert store.read("runs/a/x") is None
    verbs: list[Callable[[], Any]] = [
        lambda: store.create("runs/a/x", b"1"),
        lambda: store.keys("runs"),
        lambda: store.folders("runs"),
    ]
    for verb in verbs:
        with pytest.raises(InputError, match=r"SPOTUNE_BUCKET: no such bucket: .*no-such-bucket/x \(create it first\)"):
            verb()


def test_no_credentials_are_bad_input(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reach("s3", request, monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match="SPOTUNE_BUCKET: .*access denied: Unable to locate credentials"):
        Store("s3://spotune/x").create("runs/a/x", b"1")
    s3fs.S3FileSystem.clear_instance_cache()
