"""How fast a checkpoint comes back: ``restore`` beside the rates that bound it, measured in the same run.

    python benchmarks/restore.py [--gigabytes 2.4]

The goal is 70 % of the lower of two rates: reading the same files from the disk, and sha256 over them on one core.
Where the system allows it (root), the page cache is dropped before each measurement.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from spotune.core.keys import Keys
from spotune.core.protocol import Staged
from spotune.core.records import RunRecord
from spotune.core.store import Store
from spotune.guard.checkpoints import Lineage, commit_checkpoint, seal
from spotune.guard.restore import restore

ROUNDS = 5
BLOCK = 8 << 20


def drop_page_cache() -> bool:
    """Empties the page cache; returns whether that is allowed here."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def make_checkpoint(folder: Path, size: int) -> Staged:
    """Files of a full fine-tune's proportions: a third weights, two thirds optimizer, and small ones."""
    checkpoint = folder / "trainer" / "checkpoint-100"
    checkpoint.mkdir(parents=True)
    for name, share in (("model.safetensors", 1 / 3), ("optimizer.pt", 2 / 3)):
        with open(checkpoint / name, "wb") as file:
            for _ in range(int(size * share) // BLOCK):
                file.write(os.urandom(BLOCK))
    for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (checkpoint / name).write_bytes(os.urandom(4096))
    return seal(folder, Staged(100, str(checkpoint), epoch=1.0, tokens=1, world_size=1, threads=1), "c")


def rate(action: Callable[[], None], size: int) -> list[float]:
    """MB/s of an action, once for each round."""
    rates = []
    for _ in range(ROUNDS):
        drop_page_cache()
        began = time.monotonic()
        action()
        rates.append(size / 1e6 / (time.monotonic() - began))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.4)
    size = int(parser.parse_args().gigabytes * 1e9)
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as name:
        folder, keys = Path(name), Keys("restore")
        store = Store(f"file://{folder}/bucket")
        run = RunRecord(
            run_id="restore", created_at=0, user="u", config_path="c", config={}, config_sha256="c", data_sha256="d"
        )
        staged = make_checkpoint(folder / "work", size)
        commit = commit_checkpoint(store, keys, Lineage(run, 1, "", 0), staged)
        files = [folder / "bucket" / keys.checkpoint(100, 1) / name for name in commit.files]
        total = sum(file.stat().st_size for file in files)

        def read() -> None:
            for file in files:
                with open(file, "rb", buffering=0) as handle:
                    while handle.read(BLOCK):
                        pass

        block = os.urandom(BLOCK)

        def digest() -> None:
            sha256 = hashlib.sha256()
            for _ in range(total // BLOCK):
                sha256.update(block)

        def bring_back() -> None:
            target = folder / "target"
            shutil.rmtree(target, ignore_errors=True)
            found = restore(store, keys, target)
            assert found.commit, "nothing was restored"
            assert not found.rejected, found.rejected

        print(
            f"{total / 1e9:.1f} GB, page cache {'dropped' if drop_page_cache() else 'not dropped'} before each round\n"
        )
        rates = {
            "disk, read": rate(read, total),
            "sha256, one core": rate(digest, total),
            "restore": rate(bring_back, total),
        }
    print("| | MB/s, median | least | most |\n|---|---|---|---|")
    for label, values in rates.items():
        print(f"| {label} | {statistics.median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")
    bound = min(statistics.median(rates["disk, read"]), statistics.median(rates["sha256, one core"]))
    print(f"\nrestore / the lower of disk and sha256: {statistics.median(rates['restore']) / bound:.0%}")


if __name__ == "__main__":
    main()
