"""The calls of a store that are under way, and what they have moved: on a disk, an S3 server and a GCS emulator."""

from pathlib import Path

import pytest

from spotune.core.errors import StoreError
from spotune.core.store import Call, Store

SIZE = 3 << 20


@pytest.mark.parametrize(
    "bucket", ["file", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("s3", "gs"))], indirect=True
)
def test_what_files_move_is_counted_and_records_are_not(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * SIZE)
    store.upload(file, "a/file")
    assert store.calls.moved_bytes == SIZE
    store.download("a/file", tmp_path / "back")
    assert 2 * SIZE - (1 << 20) <= store.calls.moved_bytes <= 2 * SIZE
    moved = store.calls.moved_bytes
    store.create("a/record", b"{}")
    assert store.read("a/record") == b"{}"
    assert store.calls.moved_bytes == moved
    assert store.calls.under_way() == {}


def test_a_copy_is_counted_while_it_is_made(
    local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotune.core.store.local._link_part", lambda *args: None)  # another file system
    file, seen = tmp_path / "file", []
    file.write_bytes(b"x" * SIZE)
    move = local_store._bucket.move

    def watch(count: int) -> None:
        move(count)
        seen.extend(local_store.calls.under_way().values())

    local_store._bucket.move = watch
    local_store.upload(file, "a/file")
    assert seen == [Call("upload", "a/file", part << 20) for part in (1, 2, 3)]


def test_a_call_that_fails_is_under_way_no_more(local_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fail(key: str) -> bytes:
        seen.extend(local_store.calls.under_way().values())
        raise OSError("the disk is gone")

    monkeypatch.setattr(local_store._bucket, "read", fail)
    with pytest.raises(StoreError):
        local_store.read("a/record")
    assert seen == [Call("read", "a/record")]
    assert local_store.calls.under_way() == {}
