"""The certificate says only what was read back from the bucket."""

from pathlib import Path

import pytest

from spotune.core.errors import InputError, StoreError
from spotune.core.protocol import OUTPUT
from spotune.core.store import Store
from spotune.guard.finish import COPIED, certify, copy_output
from tests.fake_worker import write_weights
from tests.unit.guard.attempts import KEYS


def upload_damaged(store: Store, path: Path, key: str) -> bool:
    """Uploads the file with one bit flipped: the size is right, so the upload itself succeeds."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    return store.create(key, bytes(data))


def test_a_damaged_result_is_not_certified(local_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "attempt"
    (folder / OUTPUT).mkdir(parents=True)
    write_weights(folder / OUTPUT / "model.safetensors", b"state")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload_new", upload_damaged)
        with pytest.raises(StoreError, match=r"model\.safetensors: read back, it is not what was uploaded"):
            certify(local_store, KEYS, 1, 7, folder)
    assert not local_store.exists(KEYS.completed)
    certificate = certify(local_store, KEYS, 1, 7, folder)  # the next try replaces the damaged file
    there = local_store.download(f"{KEYS.output}/model.safetensors", tmp_path / "back")
    assert there == certificate.files["model.safetensors"]


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    """An attempt's folder, with a result."""
    folder = tmp_path / "attempt"
    (folder / OUTPUT / "deep").mkdir(parents=True)
    for name in ("config.json", "deep/model.safetensors"):
        (folder / OUTPUT / name).write_text("new")
    return folder


def files_of(folder: Path) -> dict[str, str]:
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    return {name: text for name, text in found.items() if name != COPIED}


@pytest.mark.parametrize("there", [(), ("runs/events",), ("checkpoint-5/config.json",)])
def test_a_result_is_copied_where_no_file_lies_and_again_over_its_copy(
    attempt: Path, tmp_path: Path, there: tuple[str, ...]
) -> None:
    target = tmp_path / "out/mine"
    for name in there:
        (target / name).parent.mkdir(parents=True)
        (target / name).write_text("old")
    copy_output(attempt, target, "a-run")
    beside = dict.fromkeys(there, "old")
    assert files_of(target) == beside | {"config.json": "new", "deep/model.safetensors": "new"}
    (target / "notes").write_text("mine")
    (attempt / OUTPUT / "config.json").write_text("newer")
    copy_output(attempt, target, "another-run")
    assert files_of(target) == beside | {"config.json": "newer", "deep/model.safetensors": "new", "notes": "mine"}


@pytest.mark.parametrize("there", ["config.json", "deep/model.safetensors", "passwd"])
def test_files_of_somebody_else_stay(attempt: Path, tmp_path: Path, there: str) -> None:
    """A record of the bucket says where the copy goes, and so may say any folder of the user's."""
    victim = tmp_path / "victim"
    (victim / there).parent.mkdir(parents=True)
    (victim / there).write_text("old")
    with pytest.raises(FileExistsError, match=f"^it has a {there} that spotune did not put there"):
        copy_output(attempt, victim, "a-run")
    assert [path.name for path in victim.iterdir()] == [there.partition("/")[0]]
    assert files_of(victim) == {there: "old"}


def test_what_was_added_to_a_copy_stays(attempt: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    copy_output(attempt, target, "a-run")
    (target / "README.md").write_text("mine")
    (attempt / OUTPUT / "README.md").write_text("new")
    with pytest.raises(FileExistsError, match="it has a README.md"):
        copy_output(attempt, target, "a-run")
    assert files_of(target)["README.md"] == "mine"


def test_what_is_in_the_way_of_the_certificate_is_to_be_removed_once(local_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "attempt"
    (folder / OUTPUT).mkdir(parents=True)
    write_weights(folder / OUTPUT / "model.safetensors", b"state")
    local_store.write(f"{KEYS.completed}/a", b"")
    with pytest.raises(InputError, match="in the way of the certificate") as raised:
        certify(local_store, KEYS, 1, 7, folder)
    assert str(raised.value).count("remove it") == 1
