"""The worker's small parts: what a fault means, what the guard asks for, when to save, which trackers."""

import errno
import faulthandler
import os
from pathlib import Path
from typing import Any

import pytest

from spotune.core.errors import InputError, StoreError
from spotune.core.protocol import CONTROL, STACKS_SIGNAL, Control, Job, Wish, python_stacks_path, write_json
from spotune.sft.arguments import effective, usable_trackers
from spotune.sft.boundary import Extra
from spotune.sft.preflight import Stopped, outcome_of
from spotune.sft.worker import write_stacks_when_asked


class SafetensorError(Exception):
    """Named as safetensors' own."""


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def wrapped(cause: Exception) -> Exception:
    error = OSError("cannot load")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (InputError("c.yaml", "no"), "bad_input"),
        (StoreError("c.yaml: data[0].source: cannot reach s3://b/x.jsonl"), "retry"),
        (Stopped(3), "stopped"),
        (ValueError("a bug"), "failed"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), "failed"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "retry"),
        (RuntimeError("NCCL error: unhandled system error"), "retry"),
        (OSError(errno.ENOSPC, "No space left on device"), "retry"),
        (RuntimeError("DataLoader worker (pid 29655) is killed by signal: Killed. "), "retry"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "retry"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback …"), "failed"),
        (FileNotFoundError(errno.ENOENT, "no file"), "failed"),
        (OSError(errno.EROFS, "Read-only file system"), "retry"),
        (OSError("Cannot allocate memory"), "retry"),
        (MemoryError(), "retry"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "retry"),
        (SafetensorError("Error while deserializing header: incomplete metadata"), "bad_input"),
        (ValueError("Could not convert 'No space left on device'"), "failed"),
        (PermissionError(errno.EACCES, "Permission denied", "No space left on device"), "failed"),
        (ConnectionResetError("reset"), "retry"),
        (wrapped(ConnectionError("no route")), "retry"),
        (SystemExit(3), "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_a_fault_means(error: BaseException, how: str) -> None:
    outcome = outcome_of(error, 3)
    assert outcome.how == how
    assert "\n" not in outcome.message


def test_a_save_is_asked_for_once_per_count(tmp_path: Path) -> None:
    control = Control(tmp_path)
    assert control.look() == Wish()
    write_json(tmp_path / CONTROL, {"stop": False, "save": 1})
    assert control.look() == Wish(save=True)
    control.answered()
    assert control.look() == Wish()
    write_json(tmp_path / CONTROL, {"stop": True, "save": 3})
    assert control.look() == Wish(stop=True, save=True)


def job(config: dict[str, Any], **settings: Any) -> Job:
    return Job("r", 1, config, "c.yaml", "cache", **settings)


def test_what_is_the_guards_is_taken_out(tmp_path: Path) -> None:
    config = effective(
        job(
            {
                "data": [],
                "data_limit": 3,
                "num_processes": 2,
                "merge_adapter": True,
                "push_to_hub": True,
                "env": None,
            }
        ),
        tmp_path,
    )
    assert not {"data", "data_limit", "num_processes", "merge_adapter", "env"} & set(config)
    assert (config["output_dir"], config["push_to_hub"]) == (str(tmp_path / "trainer"), False)
    assert effective(job({"disable_tqdm": False}), tmp_path)["disable_tqdm"] is False


def test_trackers_that_cannot_work_are_left_out() -> None:
    assert usable_trackers(["wandb", "comet_ml"], {}) == []
    assert usable_trackers(["wandb"], {"WANDB_API_KEY": "k"}) == ["wandb"]
    assert usable_trackers(["wandb"], {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}) == []


def test_a_ranks_state_survives(tmp_path: Path) -> None:
    extra = Extra(tokens=7, loss_sum=0.1, metrics={"entropy": [1 / 3]})
    extra.write(tmp_path, 0)
    assert Extra.read(tmp_path, 0, 1, 7) == extra
    assert Extra.read(tmp_path, 1, 2, 7) == Extra(tokens=7)  # made by one rank, resumed by two


def test_a_rank_writes_its_stacks_when_it_is_asked(tmp_path: Path) -> None:
    write_stacks_when_asked(tmp_path, 3)
    try:
        for times in (1, 2):
            os.kill(os.getpid(), STACKS_SIGNAL)
            text = python_stacks_path(tmp_path, 3).read_text()
            assert text.count("in test_a_rank_writes_its_stacks_when_it_is_asked") == times
    finally:
        faulthandler.unregister(STACKS_SIGNAL)


def test_a_rank_that_cannot_write_its_stacks_trains_all_the_same(tmp_path: Path) -> None:
    write_stacks_when_asked(tmp_path / "none", 0)
