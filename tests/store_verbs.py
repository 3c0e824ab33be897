"""Every verb of a store, as tests use them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spotune.core.store import Store

VERBS: dict[str, Callable[[Store, Path], Any]] = {
    "read": lambda store, big: store.read("runs/a/x"),
    "exists": lambda store, big: store.exists("runs/a/x"),
    "create": lambda store, big: store.create("runs/a/y", b"1"),
    "write": lambda store, big: store.write("runs/a/y", b"1"),
    "upload": lambda store, big: store.upload(big, "runs/a/y"),
    "upload_new": lambda store, big: store.upload_new(big, "runs/a/y"),
    "download": lambda store, big: store.download("runs/a/x", big.with_name("back")),
    "keys": lambda store, big: store.keys("runs/a"),
    "folders": lambda store, big: store.folders("runs/a"),
    "delete": lambda store, big: store.delete(["runs/a/x"]),
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def use_every_verb(store: Store, big: Path) -> None:
    """Every verb, with the results that a store without faults gives."""
    small = big.with_name("small")
    small.write_bytes(b"small")
    store.write("runs/a/x", b"1")
    store.write("runs/a/x", b"22")
    assert store.read("runs/a/x") == b"22"
    assert store.read("runs/a/none") is None
    assert store.create("runs/a/claim", b"mine")
    assert not store.create("runs/a/claim", b"yours")
    assert store.exists("runs/a/claim")
    store.upload(big, "runs/b/big")
    assert store.upload_new(big, "runs/b/new")
    assert not store.upload_new(small, "runs/b/new")
    assert store.upload_new(small, "runs/b/small")
    facts = {"size": big.stat().st_size, "sha256": sha256(big)}
    assert store.download("runs/b/new", big.with_name("back")) == facts
    assert sha256(big.with_name("back")) == sha256(big)
    assert store.keys("runs") == ["runs/a/claim", "runs/a/x", "runs/b/big", "runs/b/new", "runs/b/small"]
    assert store.folders("runs") == ["a", "b"]
    store.delete(["runs/a/x", "runs/a/never"])
    assert not store.exists("runs/a/x")
