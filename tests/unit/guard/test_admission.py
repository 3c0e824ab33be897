"""The claim of an attempt number."""

from pathlib import Path

from spotune.core.store import Store
from spotune.guard.claim import claim_attempt
from spotune.guard.journal import Machine
from tests.unit.guard.attempts import KEYS

RIVAL = b"another machine's claim"


class LastWriterWins(Store):
    """A store without conditional writes. Another machine claims attempt 1 at the same moment, and writes last."""

    def create(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        if key == KEYS.attempt(1):
            self.write(key, RIVAL)
        return True


def test_a_claim_is_read_back(tmp_path: Path) -> None:
    store = LastWriterWins(f"file://{tmp_path}/bucket")
    record = claim_attempt(store, KEYS, Machine.read({}))
    assert record.attempt == 2
    assert store.read(KEYS.attempt(1)) == RIVAL
    assert store.read(KEYS.attempt(2)) == record.to_bytes()


def test_a_number_whose_folder_cannot_be_is_passed_over(tmp_path: Path) -> None:
    attempts = tmp_path / "bucket" / KEYS.attempts
    attempts.mkdir(parents=True)
    (attempts / "0001").symlink_to(tmp_path)
    (attempts / "0002").touch()
    store = Store(f"file://{tmp_path}/bucket")
    assert claim_attempt(store, KEYS, Machine.read({})).attempt == 3
    assert claim_attempt(store, KEYS, Machine.read({})).attempt == 4
