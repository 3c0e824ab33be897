"""Uploads the result, reads it back and certifies it; only then is a run SUCCEEDED."""

import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from spotune.core.errors import BadRecord, InputError, SpotuneError, StoreError
from spotune.core.fingerprint import file_facts
from spotune.core.io import failpoint
from spotune.core.keys import Keys
from spotune.core.protocol import OUTPUT
from spotune.core.records import Certificate
from spotune.core.store import Store
from spotune.guard.claim import check_fence
from spotune.guard.restore import THREADS, TRIES

# dtype -> bytes of an element, and the bits of its exponent. Only NaN and infinity have all of these bits set.
_FLOATS = {
    "F64": (8, 0x7FF0 << 48),
    "F32": (4, 0x7F80 << 16),
    "BF16": (2, 0x7F80),
    "F16": (2, 0x7C00),
    "F8_E5M2": (1, 0x7C),
    "F8_E4M3": (1, 0x7F),
}


def weights_sha256(files: Iterable[Path]) -> str:
    """Returns the sha256 (hex) over all tensors by name: ``name\\n dtype\\n shape\\n``, then the raw bytes. No torch.

    dtype is safetensors' word (``F32``, ``BF16``), shape is comma-separated. The fingerprint of the same weights is the
    same however they are sharded. Raises StoreError for a damaged file, SpotuneError for a tensor that holds NaN or
    +inf: nothing checks that later. -inf may stand in a mask.
    """
    tensors: dict[str, tuple[Path, str, list[int], int, int]] = {}
    for path in files:
        with open(path, "rb") as file:
            try:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 100_000_000)))
                for name in header.keys() - {"__metadata__"}:
                    tensors[name] = (path, *_place_of(header[name], 8 + length))
            except (struct.error, AttributeError, ValueError, RecursionError) as error:
                raise StoreError(f"{path.name}: not a safetensors file: {error}") from error
    digest = hashlib.sha256()
    for name in sorted(tensors):
        path, dtype, shape, offset, size = tensors[name]
        digest.update(f"{name}\n{dtype}\n{','.join(map(str, shape))}\n".encode())
        with open(path, "rb") as file:
            file.seek(offset)
            while size > 0:
                block = file.read(min(size, 1 << 20))
                if not block:
                    raise StoreError(f"{path.name}: tensor {name} is cut off")
                digest.update(block)
                if has_not_finite(block, dtype):
                    raise SpotuneError(f"{path.name}: tensor {name} holds NaN or infinity: not a result to certify")
                size -= len(block)
    return digest.hexdigest()


def _place_of(facts: Any, start: int) -> tuple[str, list[int], int, int]:
    """Returns a tensor's dtype, shape, offset in the file and size in bytes; raises ValueError."""
    match facts:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            if all(type(size) is int for size in shape) and 0 <= begin <= end:
                return dtype, shape, start + begin, end - begin
    raise ValueError("a tensor without dtype, shape and data_offsets")


def has_not_finite(block: bytes, dtype: str) -> bool:
    """Returns whether a block holds NaN or +inf; ``dtype`` is safetensors' word. Integers never do."""
    size, exponent = _FLOATS.get(dtype, (0, 0))
    if not size:
        return False
    # Fast, and enough for nearly all blocks: the highest byte has the exponent's highest bits.
    top = exponent >> 8 * (size - 1)
    highest = block[size - 1 :: size]
    if not any(byte in highest for byte in range(256) if byte & top == top):
        return False
    # Each element is a lane of one great integer: adding to a large enough element carries into the sign's place.
    count = len(block) // size
    lanes = (1 << 8 * size * count) // ((1 << 8 * size) - 1)  # 1 in each lane
    sign = 1 << 8 * size - 1
    value = int.from_bytes(block, "little")
    magnitude, signs = value & lanes * (sign - 1), value & lanes * sign
    beyond = (magnitude + lanes * (sign - exponent)) & lanes * sign  # NaN or infinite
    is_nan = (magnitude + lanes * (sign - exponent - 1)) & lanes * sign if dtype != "F8_E4M3" else beyond
    return bool(is_nan) or beyond & ~signs != 0


COPIED = ".spotune-copy.json"  # names the run and the files that spotune copied to a folder

Facts = dict[str, dict[str, Any]]  # relative path -> {size: bytes, sha256: hex}


def certify(store: Store, keys: Keys, attempt: int, step: int, folder: Path) -> Certificate:
    """Uploads ``folder/output``, reads it back, writes ``completed.json`` create-only and returns it.

    Can be repeated. Raises Fenced, StoreError, and SpotuneError for weights that are not finite.
    """
    fence = partial(check_fence, store, keys, attempt)
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
    except BadRecord as error:  # somebody else's: no later try replaces it
        why = str(error).removesuffix(" (remove it)")  # once is enough
        raise InputError(keys.completed, f"in the way of the certificate: {why}", remedy="remove it") from error
    raise StoreError(f"{keys.completed}: written, but not there when read back")


def send(store: Store, source: Path, prefix: str, fence: Callable[[], None], uploaded: Callable[[], None]) -> Facts:
    """Uploads all files below ``source`` to ``prefix``, reads each back, and returns their facts. Raises StoreError.

    ``fence`` raises Fenced for an attempt that must not remove files; ``uploaded`` runs before a file is read back.
    """

    def put(path: Path) -> tuple[str, dict[str, Any]]:
        name, facts = path.relative_to(source).as_posix(), file_facts(path)
        key = f"{prefix}/{name}"
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            back = Path(folder, "back")
            # Create-only, and only an unfenced attempt removes a file: a zombie that wakes up in here must not put its
            # own result under its successor's certificate.
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
    """Returns the fingerprint of the weights in a folder. Raises SpotuneError if they are not finite."""
    weights = sorted(source.rglob("*.safetensors"))
    if not weights:
        raise StoreError(f"{keys.run_id}: the result holds no weights")
    return weights_sha256(weights)


def certificate_of(keys: Keys, attempt: int, step: int, weights: str, files: Facts) -> Certificate:
    """Returns a certificate for files that were read back from the bucket; ``weights``: their fingerprint."""
    return Certificate(
        run_id=keys.run_id, attempt=attempt, step=step, weights_sha256=weights, completed_at=time.time(), files=files
    )


def fetch_result(store: Store, keys: Keys, certificate: Certificate, target: Path) -> None:
    """Downloads the certified result; raises SpotuneError if a file differs from its certificate."""

    def get(name: str) -> None:
        for _ in range(TRIES):  # the transfer may be at fault, not the bucket
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
    """Copies the result to the config's ``output_dir``, as TRL users expect.

    Replaces only files that spotune copied there before (``COPIED`` names them), and leaves folders of logs or
    checkpoints. Raises OSError if other files may be somebody's: the folder's name comes from a record in the bucket,
    which others may write.
    """
    source = folder / OUTPUT
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    try:
        copied = {str(name) for name in json.loads((target / COPIED).read_bytes())["files"]}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        copied = set()
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
