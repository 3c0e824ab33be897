"""The end of a run: the result is uploaded, read back and certified; only then is it SUCCEEDED."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spotune.contracts.errors import BadRecord, InputError, SpotuneError, StoreError
from spotune.contracts.exchange import OUTPUT
from spotune.contracts.failpoints import failpoint
from spotune.contracts.fingerprint import file_facts
from spotune.contracts.keys import Keys
from spotune.contracts.records import Certificate
from spotune.contracts.store import Store
from spotune.guard.admission import check_fence
from spotune.guard.weights import weights_sha256

THREADS = 4
TRIES = 2
COPIED = ".spotune-copy.json"  # in a folder that a result was copied to: of which run, and its files

Facts = dict[str, dict[str, Any]]  # relative path -> {size: bytes, sha256: hex}


def certify(store: Store, keys: Keys, attempt: int, step: int, folder: Path) -> Certificate:
    """Uploads ``folder/output``, reads it back, writes ``completed.json`` create-only and returns it.

    Safe to be cut off anywhere and repeated. Raises Fenced, StoreError, and SpotuneError where weights are not finite.
    """

    def fence() -> None:
        check_fence(store, keys, attempt)

    fence()
    weights = weights_of(keys, folder / OUTPUT)
    files = send(store, folder / OUTPUT, keys.output, fence, lambda: failpoint("result-uploaded"))
    failpoint("result-read")
    certificate = certificate_of(keys, attempt, step, weights, files)
    fence()
    store.create(keys.completed, certificate.to_bytes())
    failpoint("certified")
    try:
        data = store.read(keys.completed)
        if data is not None:
            return Certificate.from_bytes(data, keys.completed)
    except BadRecord as error:  # somebody else's, which no later try replaces
        why = str(error).removesuffix(" (remove it)")  # which is said once
        raise InputError(keys.completed, f"in the way of the certificate: {why}", remedy="remove it") from error
    raise StoreError(f"{keys.completed}: written, but not there when read back")


def send(store: Store, source: Path, prefix: str, fence: Callable[[], None], uploaded: Callable[[], None]) -> Facts:
    """Uploads all files below ``source`` to ``prefix``, reads each back, and returns their facts. Raises StoreError.

    Args:
        fence: raises Fenced for an attempt that must not remove what lies there.
        uploaded: called when a file has been uploaded, before it is read back.
    """

    def put(path: Path) -> tuple[str, dict[str, Any]]:
        name, facts = path.relative_to(source).as_posix(), file_facts(path)
        key = f"{prefix}/{name}"
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            back = Path(folder, "back")
            # Create-only, and removed only by who is not fenced: a zombie that wakes up in here must not put its own
            # result under a certificate that its successor has written.
            while not store.upload_new(path, key):
                if store.download(key, back) == facts:
                    return name, facts
                fence()
                store.delete([key])
            uploaded()
            if store.download(key, back) != facts:
                raise StoreError(f"{key}: read back, it is not what was uploaded")
        return name, facts

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(put, sorted(path for path in source.rglob("*") if path.is_file())))


def weights_of(keys: Keys, source: Path) -> str:
    """Returns the fingerprint of the weights in a folder. Raises SpotuneError where they are not finite."""
    weights = sorted(source.rglob("*.safetensors"))
    if not weights:
        raise StoreError(f"{keys.run_id}: the result holds no weights")
    return weights_sha256(weights)


def certificate_of(keys: Keys, attempt: int, step: int, weights: str, files: Facts) -> Certificate:
    """Returns what is said of files that were read back from the bucket; ``weights``: their fingerprint."""
    return Certificate(
        run_id=keys.run_id,
        attempt=attempt,
        step=step,
        weights_sha256=weights,
        completed_at=time.time(),
        files=files,
    )


def fetch_result(store: Store, keys: Keys, certificate: Certificate, target: Path) -> None:
    """Downloads the certified result; raises SpotuneError when a file is not as certified."""

    def get(name: str) -> None:
        for _ in range(TRIES):  # the way here may be at fault, not what lies there
            try:
                found, certified = store.download(f"{keys.output}/{name}", target / name), certificate.files[name]
                if (found["size"], found["sha256"]) == (certified["size"], certified["sha256"]):
                    return
            except FileNotFoundError as error:
                raise SpotuneError(f"{keys.output}/{name}: certified, but not there") from error
        raise SpotuneError(f"{keys.output}/{name}: not what was certified (sha256)")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(get, certificate.files))


def copy_output(folder: Path, target: Path, run_id: str) -> None:
    """Leaves a copy of the result where the config's ``output_dir`` says, as TRL users expect.

    Raises OSError where that is, or may be, somebody's: a record in the bucket names it, and others may write there.
    Into a folder with files of its own a result goes only in the place of one that spotune copied there before, which
    ``COPIED`` names the files of. Folders beside it, of logs or checkpoints, stay.
    """
    source = folder / OUTPUT
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    copied = _copied(target)
    taken = next((name for name in names if os.path.lexists(target / name) and name not in copied), "")
    if not copied and target.is_dir():
        taken = taken or next((path.name for path in sorted(target.iterdir()) if not path.is_dir()), "")
    if taken:
        raise FileExistsError(f"it has a {taken} that spotune did not put there")
    target.mkdir(parents=True, exist_ok=True)
    part = target / f"{COPIED}.part"
    part.write_text(json.dumps({"run_id": run_id, "files": sorted({*copied, *names})}, indent=1))
    part.replace(target / COPIED)  # first: a copy that is cut off may be made again
    shutil.copytree(source, target, dirs_exist_ok=True)


def _copied(target: Path) -> frozenset[str]:
    """The files of a folder that spotune put there; none where nothing says so."""
    try:
        files = json.loads((target / COPIED).read_bytes())["files"]
        return frozenset(map(str, files))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return frozenset()
