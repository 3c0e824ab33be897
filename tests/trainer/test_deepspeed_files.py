"""DeepSpeed's checkpoints: its own classes are read, and code that somebody put into one is not run.

DeepSpeed is not installed here. Modules of its names stand in for it, with its classes and its call of ``torch.load``.
"""

import enum
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from spotune.core.errors import SpotuneError
from spotune.sft import checkpoint_files
from spotune.sft.trainer import prepare


class DynamicLossScaler:
    def __init__(self) -> None:
        self.cur_scale, self.dtype = 65536.0, torch.half


class ZeroStageEnum(int, enum.Enum):
    gradients = 2


@dataclass
class fragment_address:
    numel: int
    start: int


class Code:
    """Runs a command where it is unpickled by a reader that calls what a file names."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self._command,)


def load_as_deepspeed(path: Path) -> Any:
    """As in deepspeed/runtime/checkpoint_engine/torch_checkpoint_engine.py."""
    return torch.load(str(path), map_location=torch.device("cpu"), weights_only=False)


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {
        DynamicLossScaler: "deepspeed.runtime.fp16.loss_scaler",
        ZeroStageEnum: "deepspeed.runtime.zero.config",
        fragment_address: "deepspeed.utils.tensor_fragment",
    }
    for kind, name in places.items():
        parts = name.split(".")
        for package in (".".join(parts[: count + 1]) for count in range(len(parts))):
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package) or ModuleType(package))
        setattr(sys.modules[name], kind.__name__, kind)
        monkeypatch.setattr(kind, "__module__", name)
    monkeypatch.setattr(torch, "load", torch.load)  # so that it is put back


def make_state() -> dict[str, Any]:
    return {
        "loss_scaler": DynamicLossScaler(),
        "zero_stage": ZeroStageEnum.gradients,
        "param_slice_mappings": [{"weight": fragment_address(64, 0)}],
        "single_partition_of_fp32_groups": [torch.ones(64)],
        "ds_config": {"zero_optimization": {"stage": 2}},
        "ds_version": "0.19.8",
    }


def test_its_own_classes_are_read(tmp_path: Path) -> None:
    torch.save(make_state(), tmp_path / "optim_states.pt")
    checkpoint_files.refuse_deepspeed_code()
    found = load_as_deepspeed(tmp_path / "optim_states.pt")
    assert found["loss_scaler"].cur_scale == 65536.0
    assert found["zero_stage"] is ZeroStageEnum.gradients
    assert found["param_slice_mappings"] == [{"weight": fragment_address(64, 0)}]
    assert torch.equal(found["single_partition_of_fp32_groups"][0], torch.ones(64))


def test_code_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "global_step3"
    folder.mkdir()
    torch.save(make_state() | {"more": Code(f"touch {tmp_path}/ran")}, folder / "optim_states.pt")
    checkpoint_files.refuse_deepspeed_code()
    what = "global_step3/optim_states.pt: cannot be read as weights: names posix.system, which no checkpoint needs"
    with pytest.raises(SpotuneError, match=f"^{what}$"):
        load_as_deepspeed(folder / "optim_states.pt")
    assert not (tmp_path / "ran").exists()


def test_a_resume_under_deepspeed_runs_no_code(tmp_path: Path) -> None:
    """The worker's own step before Trainer loads, here of a checkpoint that lacks the rest."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    torch.save({"more": Code(f"touch {tmp_path}/ran")}, folder / "optim_states.pt")
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=True, args=None, boundary=None)
    with pytest.raises(SpotuneError, match="not a whole checkpoint"):
        prepare(trainer, {"checkpoint": str(folder)})
    with pytest.raises(SpotuneError, match="names posix.system"):
        load_as_deepspeed(folder / "optim_states.pt")
    assert not (tmp_path / "ran").exists()


def test_deepspeed_itself_would_run_it(tmp_path: Path) -> None:
    torch.save({"more": Code(f"touch {tmp_path}/ran")}, tmp_path / "optim_states.pt")
    load_as_deepspeed(tmp_path / "optim_states.pt")
    assert (tmp_path / "ran").exists()
