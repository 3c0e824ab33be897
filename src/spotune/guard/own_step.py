"""On Slurm the guard runs in a job step of its own, so that notices reach it.

Slurm signals the first process of each step only. In the step that SkyPilot starts that is SkyPilot's executor: a
SIGTERM kills it, all below it goes with it, and training never hears of the preemption. The same is true of a
batch script. So where there is a Slurm job around it the guard starts itself again as the first process of a step
that shares the job's resources, and task YAMLs stay plain.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping

from spotune.contracts.environment import OWN_STEP
from spotune.guard.say import say

PROBE_S = 60.0  # Slurm may be busy; a step is made in tenths of a second


def enter_own_step(argv: list[str], environ: Mapping[str, str]) -> None:
    """Replaces this process by the same command in a step of its own; returns where that is not needed or not had."""
    if not wants_step(environ, os.getpid()) or not shutil.which("srun"):
        return
    step = srun_command(environ, socket.gethostname())
    if refusal := _refusal(step):
        say(f"no step of its own in Slurm job {environ['SLURM_JOB_ID']}, notices may not arrive: {refusal}")
        return
    say(f"in a step of its own in Slurm job {environ['SLURM_JOB_ID']}, so that notices arrive")
    command = [*step, sys.executable, "-m", "spotune.sft", *argv]
    os.execvpe("srun", command, {**environ, OWN_STEP: environ["SLURM_JOB_ID"]})


def wants_step(environ: Mapping[str, str], pid: int) -> bool:
    """Whether process ``pid`` is in a Slurm job, but not the first process of a step.

    Not on a SkyPilot dev cluster: there several tasks may share a node, a new step could be given another task's GPU,
    and nobody would recover the task.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not job or environ.get(OWN_STEP) == job or environ.get("SLURM_TASK_PID") == str(pid):
        return False
    return bool(environ.get("SKYPILOT_MANAGED_JOB_ID")) or not environ.get("SKYPILOT_CLUSTER_INFO")


def srun_command(environ: Mapping[str, str], host: str) -> list[str]:
    """The command that starts what follows it in a step on this node, with all that the job has here."""
    node = environ.get("SLURMD_NODENAME") or host.split(".", 1)[0]
    # Steps of this name are what SkyPilot ends when the task is cancelled.
    task = environ.get("SKYPILOT_INTERNAL_JOB_ID", "")
    command = ["srun", "--overlap", f"--jobid={environ['SLURM_JOB_ID']}", "--nodes=1", "--ntasks=1"]
    command += [f"--nodelist={node}", f"--job-name={f'sky-{task}' if task else 'spotune'}"]
    # Without these a step may get one core, or none of the GPUs.
    if cpus := cpus_on_each_node(environ.get("SLURM_JOB_CPUS_PER_NODE", "")):
        command.append(f"--cpus-per-task={cpus}")
    if gpus := _count(environ.get("CUDA_VISIBLE_DEVICES", "")):
        command.append(f"--gres=gpu:{gpus}")
    return [*command, "--mem=0", "--export=ALL", "--input=none", "--unbuffered", "--quiet"]


def cpus_on_each_node(text: str) -> int:
    """What a job has on every one of its nodes, from ``8``, ``8(x2)`` or ``8(x2),4``; 0 when it is not said."""
    return min((int(cpus) for cpus in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", text)), default=0)


def _count(devices: str) -> int:
    return len([device for device in devices.split(",") if device.strip() not in ("", "-1", "NoDevFiles")])


def _refusal(step: list[str]) -> str:
    """Why Slurm does not make such a step, empty when it does: a failed step must not be taken for a failed run."""
    try:
        done = subprocess.run([*step, "true"], capture_output=True, text=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[0] if lines else f"srun ended with exit code {done.returncode}")
