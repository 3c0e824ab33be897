"""A checkpoint that cannot be loaded is found before Trainer loads it, whatever is wrong, and none of its code runs."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from spotune.sft.checkpoint_files import fault_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemReader, "read_metadata", FileSystemReader.read_metadata)
        patch.setattr(DefaultLoadPlanner, "load_bytes", DefaultLoadPlanner.load_bytes)
        yield


class Code:
    """Makes a file where an unpickler calls what it reads."""

    def __init__(self, file: Path) -> None:
        self._command = f"touch {file}"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


def make_checkpoint(folder: Path) -> Path:
    """A checkpoint with files of each kind, also FSDP's."""
    checkpoint = folder / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=None)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    torch.save(model.state_dict(), checkpoint / "pytorch_model_fsdp.bin")
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")
    torch.save({"last_epoch": 3, "_last_lr": [0.1]}, checkpoint / "scheduler.pt")
    rng = {"numpy": np.random.get_state(), "cpu": torch.get_rng_state(), "python": (3, (1, 2), None)}
    torch.save(rng, checkpoint / "rng_state.pth")
    torch.save({"any": Code(folder / "ran")}, checkpoint / "training_args.bin")  # nobody loads it
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 20}))
    for name, state in (("pytorch_model_fsdp_0", model.state_dict()), ("optimizer_0", optimizer.state_dict())):
        saved = {name: state, "text": "a", "list": [1, 2.0, None]}
        dcp.save(saved, storage_writer=dcp.FileSystemWriter(checkpoint / name), no_dist=True)
    return checkpoint


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(data) and None


def poison(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: torch.save({"a": Code(checkpoint.parent / "ran")}, checkpoint / name)


def cut(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (found,) = checkpoint.glob(name)
        os.truncate(found, found.stat().st_size // 2)

    return change


def poison_metadata(checkpoint: Path) -> None:
    (checkpoint / "optimizer_0/.metadata").write_bytes(pickle.dumps(Code(checkpoint.parent / "ran")))


def poison_a_value(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "optimizer_0")
    saved = {"text": Code(checkpoint.parent / "ran")}
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(checkpoint / "optimizer_0"), no_dist=True)


def lead_out(checkpoint: Path) -> None:
    path = checkpoint / "optimizer_0/.metadata"
    found = pickle.loads(path.read_bytes())
    next(iter(found.storage_data.values())).relative_path = "../../secret"
    path.write_bytes(pickle.dumps(found))


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "sharded metadata with code": (poison_metadata, "optimizer_0/.metadata: .* names posix.system"),
    "sharded metadata that is cut": (cut("optimizer_0/.metadata"), "optimizer_0/.metadata: not a sharded"),
    "sharded metadata that is empty": (write("optimizer_0/.metadata", b""), "optimizer_0/.metadata: not a sharded"),
    "sharded metadata that leads out": (lead_out, "names a file outside the checkpoint"),
    "a sharded value with code": (
        poison_a_value,
        "optimizer_0/__0_0.distcp: text: cannot be read as weights: names posix.system",
    ),
    "a shard that is cut": (cut("pytorch_model_fsdp_0/*.distcp"), "does not hold all that pytorch_model_fsdp_0/"),
    "an optimizer with code": (
        poison("optimizer.pt"),
        "optimizer.pt: cannot be read as weights: names posix.system, which no",
    ),
    "an optimizer that is cut": (cut("optimizer.pt"), "optimizer.pt: cannot be read as weights: "),
    "a scheduler that is text": (write("scheduler.pt", b"hello"), "scheduler.pt: cannot be read as weights: "),
    "an RNG state with code": (
        poison("rng_state.pth"),
        "rng_state.pth: cannot be read as weights: names posix.system, which no",
    ),
    "weights with code": (poison("pytorch_model_fsdp.bin"), "pytorch_model_fsdp.bin: cannot be read as weights: "),
    "weights that are cut": (cut("model.safetensors"), "model.safetensors: its weights are damaged: "),
    "a state that is cut": (cut("trainer_state.json"), "trainer_state.json: not JSON"),
    "the state of another step": (
        write("trainer_state.json", b'{"global_step": 21}'),
        "not the state of checkpoint-20",
    ),
    "a state without end": (write("trainer_state.json", b"[" * 100_000), "trainer_state.json: not JSON"),
}


def test_a_whole_one_has_no_fault(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path)
    assert fault_of(checkpoint, None) == ""
    assert fault_of(checkpoint, checkpoint) == ""
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrong", WRONG)
def test_each_fault_is_one_line_and_runs_nothing(tmp_path: Path, wrong: str) -> None:
    checkpoint = make_checkpoint(tmp_path)
    change, expected = WRONG[wrong]
    change(checkpoint)
    found = fault_of(checkpoint, None)
    assert "\n" not in found
    assert re.search(expected, found), found
    assert not (tmp_path / "ran").exists()


def test_the_best_checkpoint_must_have_weights_that_can_be_loaded(tmp_path: Path) -> None:
    checkpoint, best = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b")
    cut("model.safetensors")(best)
    assert fault_of(checkpoint, best).startswith("its best checkpoint, checkpoint-20: model.safetensors: its weights")
