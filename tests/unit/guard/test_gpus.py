"""How busy the GPUs are. There is none here: a stand-in for nvidia-smi is on PATH."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from spotune.guard.journal import GpuMeter, read_sample
from tests.waiting import until


class Events:
    """Takes the events of a journal."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def write(self, event: str, **fields: Any) -> None:
        self.written.append({"event": event, **fields})


def test_several_gpus_are_one_sample() -> None:
    assert read_sample("50, 2048, 23034\n100, 4096, 23034\n") == {
        "busy": 0.75, "memory_gib": 4.0, "memory_total_gib": 22.494,
    }  # fmt: skip


@pytest.mark.parametrize("listing", ["", "[N/A], 1, 2\n", "No devices were found\n", "1, 2\n"])
def test_what_nvidia_smi_does_not_know_is_no_sample(listing: str) -> None:
    assert read_sample(listing) is None


def test_the_gpus_that_this_run_has_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho 50, 1024, 2048\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    events = Events()
    with GpuMeter(1, {"CUDA_VISIBLE_DEVICES": "3"}, events, every_s=0.0):  # type: ignore[arg-type]
        until(lambda: len(events.written) >= 2)
    assert not meters()  # it asks no more
    assert events.written[0] == {"event": "gpu", "busy": 0.5, "memory_gib": 1.0, "memory_total_gib": 2.0}
    assert (tmp_path / "asked").read_text().splitlines()[0].endswith("-i 3")


def meters() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gpus"]


def test_a_machine_without_one_is_not_asked() -> None:
    with GpuMeter(0, {}, Events(), every_s=0.0):  # type: ignore[arg-type]
        assert not meters()


def test_a_driver_that_fails_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with GpuMeter(1, {}, Events(), every_s=0.0):  # type: ignore[arg-type]
        until(lambda: not meters())  # it has given up
    assert capsys.readouterr().err.count("GPUs are not measured") == 1
