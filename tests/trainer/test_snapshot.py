"""Snapshots: what is written behind training is what was there when the copy was made, in the libraries' formats."""

import errno
import gc
import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from spotune.sft.snapshot import (
    ALIGNMENT,
    BLOCK,
    Arena,
    Capture,
    HashedFile,
    Writer,
    capturing,
    size_of,
    write_safetensors,
)


def write_all(capture: Capture) -> dict[Path, dict[str, Any]]:
    writer, facts = Writer(), {}
    writer.submit(capture.pieces, lambda found, _: facts.update(found))
    assert writer.settle() is None
    assert capture.pieces == []
    return facts


@pytest.fixture(params=["cold", "warm", "too small"])
def arena(request: pytest.FixtureRequest) -> Arena:
    made = Arena()
    if request.param != "cold":
        made.warm(1 << 20 if request.param == "warm" else 256)
        made.reset()
    return made


def test_training_goes_on_while_it_is_written(tmp_path: Path, arena: Arena) -> None:
    weights = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(5, dtype=torch.bfloat16)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.full((1000,), 0.5)}}, "lr": [0.1, (1, "x")]}
    capture = Capture(arena)
    with capturing(capture, None):
        safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        torch.save(optimizer, str(tmp_path / "optimizer.pt"))
    assert list(tmp_path.iterdir()) == []
    weights["b"].zero_()
    optimizer["state"][0]["exp_avg"].add_(1.0)  # type: ignore[index]
    facts = write_all(capture)
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["b"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(found["a"], torch.ones(5, dtype=torch.bfloat16))
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert torch.equal(loaded["state"][0]["exp_avg"], torch.full((1000,), 0.5))
    assert loaded["lr"] == [0.1, (1, "x")]
    for path in (tmp_path / "model.safetensors", tmp_path / "optimizer.pt"):
        assert facts[path] == {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_the_library_itself_writes_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {f"layer.{n}": torch.randn(n + 1, 7).to(kind) for n, kind in enumerate((torch.float32, torch.float16))}
    weights |= {"empty": torch.empty(0, 3), "flags": torch.tensor([True, False]), "scalar": torch.tensor(5)}
    safetensors.torch.save_file(weights, tmp_path / "theirs", metadata={"format": "pt"})
    with HashedFile(tmp_path / "ours") as file:
        write_safetensors(file, weights, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_kind_that_our_writer_does_not_know_is_the_librarys(tmp_path: Path) -> None:
    capture = Capture(Arena())
    with capturing(capture, None):
        safetensors.torch.save_file({"c": torch.ones(3, dtype=torch.complex64)}, tmp_path / "c.safetensors")
    write_all(capture)
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "c.safetensors")["c"], torch.ones(3, dtype=torch.complex64)
    )


def test_what_was_freed_is_not_taken_for_what_came_after(tmp_path: Path) -> None:
    """Python gives the address of a tensor that is gone to the next one: two files must not share it."""
    capture = Capture(Arena())
    gc.freeze()  # so that a collection looks at what was made here, and not at all that torch has brought
    try:
        with capturing(capture, None):
            for number in range(50):
                torch.save({"t": torch.full((number + 1,), float(number))}, tmp_path / f"{number}.pt")
                gc.collect()
    finally:
        gc.unfreeze()
    write_all(capture)
    for number in range(50):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)["t"]
        assert torch.equal(found, torch.full((number + 1,), float(number)))


def test_aliases_stay_aliases_and_objects_are_pickled_at_once(tmp_path: Path) -> None:
    shared = torch.ones(4)
    capture = Capture(Arena())
    state = OrderedDict(x=shared, y=shared, rng=("MT19937", np.arange(3), 7))

    settings = {"a": bytearray(b"1")}
    with capturing(capture, None):
        torch.save(state, tmp_path / "state.pt")
        torch.save(settings, tmp_path / "settings.pt")
    settings["a"][:] = b"2"
    shared.zero_()
    state["rng"][1][:] = 9
    write_all(capture)
    found = torch.load(tmp_path / "state.pt", weights_only=False)
    assert torch.equal(found["x"], torch.ones(4))
    assert found["x"].data_ptr() == found["y"].data_ptr()
    assert found["rng"][1].tolist() == [0, 1, 2]
    assert torch.load(tmp_path / "settings.pt", weights_only=False) == {"a": bytearray(b"1")}


def test_a_tokenizer_is_written_behind_training(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    tokenizer, capture = Tokenizer(), Capture(Arena())
    with capturing(capture, tokenizer):
        tokenizer.save_pretrained(tmp_path)
        assert not (tmp_path / "tokenizer.json").exists()
    write_all(capture)
    assert (tmp_path / "tokenizer.json").exists()
    assert "save_pretrained" not in vars(tokenizer)


def test_the_libraries_are_themselves_again_also_after_an_error(tmp_path: Path) -> None:
    before = (torch.save, safetensors.torch.save_file)
    with pytest.raises(KeyError), capturing(Capture(Arena()), None):
        raise KeyError
    assert (torch.save, safetensors.torch.save_file) == before


def test_an_arena_is_used_again() -> None:
    arena = Arena()
    tensors = [torch.ones(100), torch.ones(3, dtype=torch.float16)]
    assert size_of(tensors) == 448 + ALIGNMENT
    arena.warm(size_of(tensors))
    arena.reset()
    first = [arena.copy(tensor) for tensor in tensors]
    assert arena.copy(torch.ones(100)).data_ptr() not in range(first[0].data_ptr(), first[0].data_ptr() + 512)
    arena.reset()
    second = [arena.copy(tensor) for tensor in (*tensors, torch.ones(100))]
    assert second[2].data_ptr() - second[0].data_ptr() == 512


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 4097])
@pytest.mark.parametrize("direct", [True, False])
def test_a_hashed_file_is_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, direct: bool
) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    data = os.urandom(size)
    with HashedFile(tmp_path / "file") as file:
        for begin in range(0, size, 1_500_001):
            file.write(data[begin : begin + 1_500_001])
    assert (tmp_path / "file").read_bytes() == data
    assert file.facts == {"size": size, "sha256": hashlib.sha256(data).hexdigest()}


def test_a_full_disk_is_the_disks_fault_and_a_bug_is_not(tmp_path: Path) -> None:
    def full() -> dict[Path, dict[str, Any]]:
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken() -> dict[Path, dict[str, Any]]:
        raise KeyError("a bug")

    writer, handed_over = Writer(), []
    writer.submit([full], lambda facts, _: handed_over.append(facts))
    fault = writer.settle()
    assert fault
    assert fault.errno == errno.ENOSPC
    assert writer.settle() is None  # it is said once
    writer.submit([broken], lambda facts, _: handed_over.append(facts))
    with pytest.raises(KeyError):
        writer.settle()
    assert handed_over == []
