"""The end of a run: the result is uploaded, read back and certified; only then is it SUCCEEDED."""

import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spotune.contracts.errors import StoreError
from spotune.contracts.exchange import OUTPUT
from spotune.contracts.fingerprint import file_facts
from spotune.contracts.holds import reach
from spotune.contracts.keys import Keys
from spotune.contracts.records import Certificate
from spotune.contracts.store import Store
from spotune.guard.admission import check_fence
from spotune.guard.weights import weights_sha256

THREADS = 4
TRIES = 2

Facts = dict[str, dict[str, Any]]  # relative path -> {size: bytes, sha256: hex}


def certify(store: Store, keys: Keys, attempt: int, step: int, folder: Path) -> Certificate:
    """Uploads ``folder/output``, reads it back, writes ``completed.json`` create-only and returns it.

    Safe to be cut off anywhere and repeated. Raises Fenced or StoreError.
    """
    check_fence(store, keys, attempt)
    files = send(store, folder / OUTPUT, keys.output, lambda: reach("result-uploaded"))
    certificate = certificate_of(keys, attempt, step, folder / OUTPUT, files)
    reach("result-read")
    check_fence(store, keys, attempt)
    store.create(keys.completed, certificate.to_bytes())
    reach("certified")
    data = store.read(keys.completed)
    if data is None:
        raise StoreError(f"{keys.completed}: written, but not there when read back")
    return Certificate.from_bytes(data, keys.completed)


def send(store: Store, source: Path, prefix: str, sent: Callable[[], None]) -> Facts:
    """Uploads all files below ``source`` to ``prefix``, reads each back, and returns their facts.

    ``sent`` is called when a file has been uploaded, before it is read back. Raises StoreError.
    """

    def put(path: Path) -> tuple[str, dict[str, Any]]:
        name = path.relative_to(source).as_posix()
        store.upload(path, f"{prefix}/{name}")
        sent()
        with tempfile.TemporaryDirectory(dir=source.parent) as back:
            found = store.download(f"{prefix}/{name}", Path(back, path.name))
        facts = file_facts(path)
        if found != facts:
            raise StoreError(f"{prefix}/{name}: read back, it is not what was uploaded")
        return name, facts

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(put, sorted(path for path in source.rglob("*") if path.is_file())))


def certificate_of(keys: Keys, attempt: int, step: int, source: Path, files: Facts) -> Certificate:
    """What is said of files that were read back from the bucket as they are in ``source``."""
    weights = [source / name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise StoreError(f"{keys.run_id}: the result holds no weights")
    return Certificate(
        run_id=keys.run_id,
        attempt=attempt,
        step=step,
        weights_sha256=weights_sha256(weights),
        completed_at=time.time(),
        files=files,
    )


def fetch_result(store: Store, keys: Keys, certificate: Certificate, target: Path) -> None:
    """Downloads the certified result; raises StoreError when a file is not as certified."""

    def get(name: str) -> None:
        for _ in range(TRIES):  # the way here may be at fault, not what lies there
            try:
                if store.download(f"{keys.output}/{name}", target / name) == certificate.files[name]:
                    return
            except FileNotFoundError as error:
                raise StoreError(f"{keys.output}/{name}: certified, but not there") from error
        raise StoreError(f"{keys.output}/{name}: not what was certified (sha256)")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(get, certificate.files))


def copy_output(folder: Path, target: Path) -> None:
    """Leaves a copy of the result where the config's ``output_dir`` says, as TRL users expect."""
    shutil.copytree(folder / OUTPUT, target, dirs_exist_ok=True)
