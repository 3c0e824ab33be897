"""The end of a run: the result is uploaded, read back and certified; only then is it SUCCEEDED."""

import shutil
import time
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


def certify(store: Store, keys: Keys, attempt: int, step: int, folder: Path) -> Certificate:
    """Uploads ``folder/output``, reads it back, writes ``completed.json`` create-only and returns it.

    Safe to be cut off anywhere and repeated. Raises Fenced or StoreError.
    """
    check_fence(store, keys, attempt)
    output = folder / OUTPUT
    paths = sorted(path for path in output.rglob("*") if path.is_file())
    back = folder / "readback"
    shutil.rmtree(back, ignore_errors=True)

    def put(path: Path) -> tuple[str, dict[str, Any]]:
        name = path.relative_to(output).as_posix()
        store.upload(path, f"{keys.output}/{name}")
        reach("result-uploaded")
        store.download(f"{keys.output}/{name}", back / name)
        facts = file_facts(path)
        if file_facts(back / name) != facts:
            raise StoreError(f"{keys.output}/{name}: read back, it is not what was uploaded")
        return name, facts

    with ThreadPoolExecutor(THREADS) as pool:
        files = dict(pool.map(put, paths))
    weights = [back / name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise StoreError(f"{keys.run_id}: the result holds no weights")
    reach("result-read")
    certificate = Certificate(
        run_id=keys.run_id,
        attempt=attempt,
        step=step,
        weights_sha256=weights_sha256(weights),
        completed_at=time.time(),
        files=files,
    )
    shutil.rmtree(back, ignore_errors=True)
    check_fence(store, keys, attempt)
    store.create(keys.completed, certificate.to_bytes())
    reach("certified")
    data = store.read(keys.completed)
    if data is None:
        raise StoreError(f"{keys.completed}: written, but not there when read back")
    return Certificate.from_bytes(data, keys.completed)


def copy_output(folder: Path, target: Path) -> None:
    """Leaves a copy of the result where the config's ``output_dir`` says, as TRL users expect."""
    shutil.copytree(folder / OUTPUT, target, dirs_exist_ok=True)
