"""Keys and names never leave the bucket: what leads elsewhere is refused by every verb, and changes nothing there."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spotune.core import keys
from spotune.core import store as store_store
from spotune.core.errors import BadRecord, InputError, Misplaced, StoreError, launcher_code
from spotune.core.keys import is_key, name_fault, number_of
from spotune.core.store import Store, objects
from spotune.core.store import local as store_local
from spotune.core.store.local import open_folders
from tests.conftest import reach
from tests.store_verbs import VERBS

OUTSIDE = [
    "../out",
    "a/../../out",
    "/etc/hostname",
    "a//b",
    "a/./b",
    ".",
    "..",
    "a/",
    "a\0b",
    "x" * 256,
    "a/" * 65 + "a",
]


@pytest.mark.parametrize("key", ["a", "a/b", ".hidden", "...", "a b", "ä" * 127, "__0_0.distcp", "\udc80", "x" * 255])
def test_what_is_a_key(key: str) -> None:
    assert is_key(key)


@pytest.mark.parametrize("key", [*OUTSIDE, "", None, 7, "ä" * 128, "/".join(["x" * 200] * 6)])
def test_what_is_not_a_key(key: object) -> None:
    assert not is_key(key)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["a", "b/c", "b/d", "A"], ""),
        (["a", "a/b"], "a/b"),
        (["a/b/c", "a"], "a/b/c"),
        (["b", "../a"], "../a"),
        (["\ud800"], "\ud800"),
        ([], ""),
    ],
)
def test_names_of_files_in_one_folder(names: list[str], fault: str) -> None:
    assert name_fault(names) == fault


@pytest.mark.parametrize(
    ("text", "number"),
    [("0001", 1), ("12345", 12345), ("1", None), ("00012", None), ("²", None), ("-001", None), ("9" * 5000, None)],
)
def test_numbers_in_keys(text: str, number: int | None) -> None:
    assert number_of(text, 4, 10**6) == number


@pytest.mark.parametrize("key", OUTSIDE)
@pytest.mark.parametrize("bucket", ["file", "s3"], indirect=True)
def test_a_name_that_leads_out_is_refused_by_every_verb(key: str, store: Store, tmp_path: Path) -> None:
    local, back = tmp_path / "local", tmp_path / "new" / "back"
    local.write_bytes(b"mine")
    verbs: list[Callable[[], Any]] = [
        lambda: store.read(key),
        lambda: store.exists(key),
        lambda: store.create(key, b"1"),
        lambda: store.write(key, b"1"),
        lambda: store.upload(local, key),
        lambda: store.upload_new(local, key),
        lambda: store.download(key, back),
        lambda: store.keys(key),
        lambda: store.names(key),
        lambda: store.delete([key]),
        lambda: store.abort_uploads(key, 0.0),
    ]
    for verb in verbs:
        with pytest.raises(Misplaced, match="not a key of this bucket") as error:
            verb()
        assert (error.value.exit_code, launcher_code(error.value), "\n" in str(error.value)) == (2, 2, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local"]


@pytest.mark.parametrize("scheme", ["s3"])
def test_objects_with_such_names_are_not_listed(
    scheme: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reach(scheme, request, monkeypatch)
    import boto3

    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for name in ("runs/a/x", "runs/a/../b/y", "runs//z", "runs/a/./w", "runs/a/"):
        client.put_object(Bucket="spotune", Key=f"{tmp_path.name}/{name}", Body=b"1")
    store = Store(f"s3://spotune/{tmp_path.name}")
    assert store.keys("runs") == ["runs/a/x"]
    assert (store.names("runs"), store.names("runs/a")) == (["a/"], ["x"])


def outside(tmp_path: Path) -> Path:
    """A folder of somebody else, with a file in it."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "x", folder / "deep/y"):
        path.write_text("theirs")
    return folder


def listing(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("verb", sorted(VERBS))
@pytest.mark.parametrize("link", ["runs", "runs/a"])
def test_a_link_on_the_way_is_refused(local_store: Store, tmp_path: Path, verb: str, link: str) -> None:
    theirs = outside(tmp_path)
    (theirs / "a").mkdir()
    (theirs / "a/x").write_text("theirs")
    before = listing(theirs)
    place = tmp_path / "bucket" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(theirs, target_is_directory=True)
    big = tmp_path / "big"
    big.write_bytes(b"mine")
    with pytest.raises(Misplaced, match=f"^{link}: a link, not a folder"):
        VERBS[verb](local_store, big)
    assert listing(theirs) == before
    assert not (tmp_path / "back").exists()


def make_link(place: Path, theirs: Path) -> None:
    place.symlink_to(theirs / "x")


def make_dangling(place: Path, theirs: Path) -> None:
    place.symlink_to(theirs / "new")


def make_socket(place: Path, theirs: Path) -> None:
    here = Path.cwd()
    os.chdir(place.parent)  # a socket's name is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(place.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "a link": make_link,
    "a link,": make_dangling,
    "a pipe": lambda place, theirs: os.mkfifo(place),
    "a socket": make_socket,
    "a folder": lambda place, theirs: place.mkdir(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_file_is_not_read(local_store: Store, tmp_path: Path, kind: str) -> None:
    """Nor waited for: a pipe would never be opened. Nor written through."""
    theirs = outside(tmp_path)
    before = listing(theirs)
    (tmp_path / "bucket/runs/a").mkdir(parents=True)
    place = tmp_path / "bucket/runs/a/x"
    KINDS[kind](place, theirs)
    with pytest.raises(Misplaced, match=f"^runs/a/x: {kind}") as error:
        local_store.read("runs/a/x")
    assert isinstance(error.value, BadRecord)
    with pytest.raises(Misplaced, match=f"^runs/a/x: {kind}"):
        local_store.download("runs/a/x", tmp_path / "back")
    assert not local_store.exists("runs/a/x")
    assert not local_store.create("runs/a/x", b"1")
    assert (local_store.keys("runs"), local_store.keys("runs/b")) == ([], [])
    if kind == "a folder":
        with pytest.raises(StoreError):
            local_store.write("runs/a/x", b"1")
        return
    assert local_store.names("runs/a") == []
    local_store.write("runs/a/x", b"1")
    assert local_store.read("runs/a/x") == b"1"
    assert not place.is_symlink()
    assert listing(theirs) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone makes devices")
def test_a_device_is_not_opened(local_store: Store, tmp_path: Path) -> None:
    local_store.write("runs/a/y", b"1")
    os.mknod(tmp_path / "bucket/runs/a/x", 0o20600, os.makedev(1, 5))
    with pytest.raises(Misplaced, match="^runs/a/x: a device, not a file"):
        local_store.read("runs/a/x")


def test_what_is_listed_below_links_is_nothing(local_store: Store, tmp_path: Path) -> None:
    theirs = outside(tmp_path)
    local_store.write("runs/a/x", b"1")
    folder = tmp_path / "bucket/runs/a"
    (folder / "folder").symlink_to(theirs, target_is_directory=True)
    (folder / "file").symlink_to(theirs / "x")
    (theirs / ".part-1").write_text("half")
    (folder / ".part-2").symlink_to(theirs / "x")
    assert local_store.keys("runs") == ["runs/a/x"]
    assert (local_store.names("runs/a"), local_store.folders("runs/a")) == (["x"], [])
    assert local_store.abort_uploads("runs", 0.0) == []
    local_store.delete(["runs/a/file", "runs/a/x"])
    assert not (folder / "file").is_symlink()
    assert (folder / "folder").is_symlink()
    assert len(listing(theirs)) == 3


def test_the_bucket_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk", target_is_directory=True)
    store = Store(f"file://{tmp_path}/link/deep/bucket")
    store.write("runs/a/x", b"1")
    assert (tmp_path / "disk/deep/bucket/runs/a/x").read_bytes() == b"1"
    assert store.keys("") == ["runs/a/x"]
    store.delete(["runs/a/x"])
    assert list((tmp_path / "disk/deep/bucket").iterdir()) == []
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere/bucket")
    with pytest.raises(InputError, match="SPOTUNE_BUCKET"):
        Store(f"file://{tmp_path}/gone").write("runs/a/x", b"1")


def test_a_folder_that_is_swapped_meanwhile_leads_nowhere_else(
    local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, folder = outside(tmp_path), tmp_path / "bucket/runs/a"
    before = listing(theirs)
    local_store.write("runs/a/y", b"1")
    real = store_local._write_part

    def swap(opened: int, data: bytes) -> str:
        if not folder.is_symlink():
            folder.rename(tmp_path / "bucket/runs/moved")
            folder.symlink_to(theirs, target_is_directory=True)
        return real(opened, data)

    monkeypatch.setattr(store_local, "_write_part", swap)
    local_store.write("runs/a/x", b"1")
    assert listing(theirs) == before
    assert sorted(path.name for path in (tmp_path / "bucket/runs/moved").iterdir()) == ["x", "y"]


def test_few_calls_open_a_place(local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the bucket, one for each folder, one for the file: a bucket may be on a file server."""
    local_store.write("runs/a/b/c/x", b"1")
    opened: list[Any] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *args, **options: opened.append(args) or real(*args, **options))
    before = len(os.listdir("/proc/self/fd"))
    assert local_store.read("runs/a/b/c/x") == b"1"
    assert len(opened) == 6
    with open_folders(str(tmp_path / "bucket"), ["runs", "a"]):
        pass
    assert len(os.listdir("/proc/self/fd")) == before


def restored(store: Store, tmp_path: Path) -> tuple[int, int]:
    """The inodes of an object and of the file that it was downloaded to."""
    back = tmp_path / "back"
    store.download("runs/a/x", back)
    return (tmp_path / "bucket/runs/a/x").stat().st_ino, back.stat().st_ino


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o666])
def test_a_file_that_others_may_write_is_copied(local_store: Store, tmp_path: Path, mode: int) -> None:
    """Its bytes could change after they were hashed."""
    local_store.write("runs/a/x", b"1")
    (tmp_path / "bucket/runs/a/x").chmod(mode)
    there, here = restored(local_store, tmp_path)
    assert (there == here) is (mode in (0o600, 0o644))


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away")
def test_a_file_of_another_user_is_copied(local_store: Store, tmp_path: Path) -> None:
    local_store.write("runs/a/x", b"1")
    os.chown(tmp_path / "bucket/runs/a/x", 12345, 12345)
    there, here = restored(local_store, tmp_path)
    assert there != here
    local = tmp_path / "local"
    local.write_text("2")
    os.chown(local, 12345, 12345)
    local_store.upload(local, "runs/a/y")
    assert (tmp_path / "bucket/runs/a/y").stat().st_ino != local.stat().st_ino


def test_an_object_that_is_too_large_is_not_a_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (keys, store_store, store_local, objects):
        monkeypatch.setattr(module, "RECORD_MOST_BYTES", 1 << 20)
    store.write("runs/a/x", b"x" * (1 << 20))
    assert len(store.read("runs/a/x") or b"") == 1 << 20
    store.write("runs/a/x", b"x" * (1 << 20) + b"y")
    with pytest.raises(BadRecord, match="runs/a/x: larger than 1 MiB, too large to be a record"):
        store.read("runs/a/x")
