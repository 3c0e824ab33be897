"""Sharded checkpoints: what torch wrote is read as ever, and code that somebody put into one is not run."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from spotune.core.errors import SpotuneError
from spotune.sft.checkpoint_files import refuse_code

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning", "ignore::FutureWarning")


class Code:
    """Runs a command where it is unpickled by a reader that calls what a file names."""

    def __init__(self, command: str, call: Callable[..., Any] = os.system) -> None:
        self._command, self._call = command, call

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self._call, (self._command,)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemReader, "read_metadata", FileSystemReader.read_metadata)
        patch.setattr(DefaultLoadPlanner, "load_bytes", DefaultLoadPlanner.load_bytes)
        yield


def state() -> dict[str, Any]:
    """A model and its optimizer after a step, with values of each kind that optimizers keep."""
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 3).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9), foreach=None)
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "text": "a", "list": [1, 2.0, None, True]}


def save(folder: Path, **more: Any) -> dict[str, Any]:
    saved = state() | more
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return saved


def load(folder: Path, **more: Any) -> dict[str, Any]:
    wanted = state() | more
    for parameter in wanted["model"].values():
        parameter.zero_()
    wanted["optimizer"]["param_groups"][0]["lr"] = 7.0
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), planner=DefaultLoadPlanner(), no_dist=True)
    return wanted


def test_a_genuine_one_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    saved = save(tmp_path)
    by_torch = FileSystemReader(tmp_path).read_metadata()
    refuse_code()
    found, loaded = FileSystemReader(tmp_path).read_metadata(), load(tmp_path)
    by_torch.storage_meta, found.storage_meta = None, None  # with a new id for each reading
    assert found == by_torch
    assert loaded["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    assert (loaded["text"], loaded["list"]) == ("a", [1, 2.0, None, True])
    for name, parameter in saved["model"].items():
        assert torch.equal(loaded["model"][name], parameter)


def poison_metadata(folder: Path, bait: str) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Code(bait)))


def poison_a_part(folder: Path, bait: str) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.planner_data = Code(bait)
    (folder / ".metadata").write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("poison", [poison_metadata, poison_a_part])
def test_metadata_runs_no_code(tmp_path: Path, poison: Callable[[Path, str], None]) -> None:
    save(tmp_path)
    poison(tmp_path, f"touch {tmp_path}/ran")
    refuse_code()
    with pytest.raises(CheckpointException, match="which no checkpoint needs"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_torch_itself_would_run_it(tmp_path: Path) -> None:
    save(tmp_path)
    poison_a_part(tmp_path, f"touch {tmp_path}/ran")
    FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("call", [os.system, eval, getattr, torch.load, torch.hub.load, Path.unlink])
def test_metadata_names_its_own_classes_only(tmp_path: Path, call: Callable[..., Any]) -> None:
    save(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Code(f"{tmp_path}/ran", call)))
    refuse_code()
    with pytest.raises(SpotuneError, match=r"/\.metadata: not a sharded checkpoint's metadata: names \S+, which no"):
        FileSystemReader(tmp_path).read_metadata()


@pytest.mark.parametrize("data", [b"", b"\x80\x05.", pickle.dumps(7), pickle.dumps(Metadata({})), b"\xff" * 100])
def test_metadata_that_is_none_is_named(tmp_path: Path, data: bytes) -> None:
    save(tmp_path)
    (tmp_path / ".metadata").write_bytes(data)
    refuse_code()
    with pytest.raises(SpotuneError, match=r"/\.metadata: not a sharded checkpoint's metadata: "):
        FileSystemReader(tmp_path).read_metadata()


@pytest.mark.parametrize("name", ["/etc/hostname", "../secret", "", "a/../../b"])
def test_metadata_leads_to_no_other_file(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    found = pickle.loads((tmp_path / ".metadata").read_bytes())
    next(iter(found.storage_data.values())).relative_path = name
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found))
    refuse_code()
    with pytest.raises(SpotuneError, match="names a file outside the checkpoint"):
        FileSystemReader(tmp_path).read_metadata()


def test_values_run_no_code(tmp_path: Path) -> None:
    save(tmp_path, text=Code(f"touch {tmp_path}/ran"))
    refuse_code()
    with pytest.raises(CheckpointException, match="text: not a plain value of a checkpoint"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
