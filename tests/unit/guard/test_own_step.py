"""When the guard wants a Slurm step of its own, and with which command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spotune.guard.main import srun_command, wants_step

MANAGED = {"SKYPILOT_CLUSTER_INFO": '{"cloud": "Slurm"}', "SKYPILOT_MANAGED_JOB_ID": "4"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"SKYPILOT_MANAGED_JOB_ID": "4"}, False),  # a cloud
        ({"SLURM_JOB_ID": "7"}, True),  # a batch script
        ({"SLURM_JOB_ID": "7", "SLURM_TASK_PID": "99"}, True),  # below the first process of a step
        ({"SLURM_JOB_ID": "7", "SLURM_TASK_PID": "12"}, False),  # the first process of a step
        ({"SLURM_JOB_ID": "7", **MANAGED}, True),
        ({"SLURM_JOB_ID": "7", **MANAGED, "SPOTUNE_OWN_STEP": "7"}, False),
        ({"SLURM_JOB_ID": "8", **MANAGED, "SPOTUNE_OWN_STEP": "7"}, True),  # started from within another job
        ({"SLURM_JOB_ID": "7", "SKYPILOT_CLUSTER_INFO": '{"cloud": "Slurm"}'}, False),  # a dev cluster
    ],
)
def test_who_wants_a_step(environ: dict[str, str], wanted: bool) -> None:
    assert wants_step(environ, pid=12) is wanted


def test_the_step_is_on_this_node_with_all_that_the_job_has() -> None:
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "gpu2",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "SKYPILOT_INTERNAL_JOB_ID": "1",
    }
    command = srun_command(environ, "elsewhere")
    assert command[0] == "srun"
    assert {"--overlap", "--jobid=7", "--nodes=1", "--ntasks=1", "--nodelist=gpu2"} <= set(command)
    assert {"--cpu-bind=none", "--gres=gpu:2", "--job-name=sky-1", "--input=none", "--unbuffered"} <= set(command)


def test_the_step_asks_for_nothing_that_is_not_known() -> None:
    command = srun_command({"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "gpu2.site.example")
    assert {"--nodelist=gpu2", "--job-name=spotune"} <= set(command)
    assert not [word for word in command if word.startswith("--gres")]


SRUN = """#!/bin/sh
[ "$REFUSE" ] && { echo "srun: error: no such step" >&2; exit 1; }
while [ "${1#--}" != "$1" ]; do
  [ "$1" = --cpu-bind=none ] && echo "srun: cluster configuration lacks support for cpu binding" >&2
  shift
done
exec "$@"
"""


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "7"}, "[spotune] in a step of its own in Slurm job 7"),
        ({"SLURM_JOB_ID": "7", "REFUSE": "1"}, "[spotune] no step of its own in Slurm job 7"),
    ],
)
def test_the_script_goes_there_and_passes_its_exit_code_on(tmp_path: Path, environ: dict[str, str], said: str) -> None:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "spotune.sft", "no-such-config.yaml"],
        env={**os.environ, **environ, "PATH": path, "SPOTUNE_BUCKET": f"file://{tmp_path}/bucket"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no-such-config.yaml" in done.stderr.splitlines()[-1]
    assert done.stderr.startswith(said)
    assert done.stderr.count("step of its own") == bool(said)
    assert "cpu binding" not in done.stderr
