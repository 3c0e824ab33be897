"""The certificate says only what was read back from the bucket."""

from pathlib import Path

import pytest

from spotune.contracts.errors import InputError, StoreError
from spotune.contracts.exchange import OUTPUT
from spotune.contracts.store import Store
from spotune.guard.finish import certify
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


def test_what_is_in_the_way_of_the_certificate_is_to_be_removed_once(local_store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "attempt"
    (folder / OUTPUT).mkdir(parents=True)
    write_weights(folder / OUTPUT / "model.safetensors", b"state")
    local_store.write(f"{KEYS.completed}/a", b"")
    with pytest.raises(InputError, match="in the way of the certificate") as raised:
        certify(local_store, KEYS, 1, 7, folder)
    assert str(raised.value).count("remove it") == 1
