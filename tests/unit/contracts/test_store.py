"""The bucket means the same on a disk, on S3 and on GCS."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spotune.contracts.errors import InputError, StoreError
from spotune.contracts.store import Store
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
    store.delete(["runs/a/x", "runs/a/never"])
    assert store.keys("runs") == ["runs/b/deep/y"]


def test_create_happens_once(store: Store) -> None:
    assert store.create("runs/a/claim", b"first")
    assert not store.create("runs/a/claim", b"second")
    assert store.read("runs/a/claim") == b"first"


def test_of_many_creators_on_a_disk_one_wins(local_store: Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: local_store.create("runs/a/claim", b"%d" % n), range(64)))
    assert won.count(True) == 1
    assert local_store.read("runs/a/claim") == b"%d" % won.index(True)
    assert local_store.keys("runs") == ["runs/a/claim"]


def test_files_go_up_and_come_back(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(6_000_000))
    store.upload(source, "runs/a/big")
    store.download("runs/a/big", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        store.download("runs/a/gone", tmp_path / "gone")


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


def test_a_full_disk_is_worth_another_machine(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(StoreError, match="cannot write: .*No space left"):
        local_store.write("runs/a/x", b"1")


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
    with pytest.raises(InputError, match=r"SPOTUNE_BUCKET: no such bucket: .*no-such-bucket/x \(create it first\)"):
        store.create("runs/a/x", b"1")


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
