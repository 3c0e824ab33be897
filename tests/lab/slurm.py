"""The lab's Slurm: two nodes with one fake L4 each, a preemptible partition and one that preempts."""

import contextlib
import os
import secrets
import socket
import stat
import subprocess
from pathlib import Path

from tests.lab.layout import Layout
from tests.lab.machine import call

FREEZER = Path("/sys/fs/cgroup/freezer")

CONFIG = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket
CredType=cred/munge
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,bf_continue
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=60
StateSaveLocation={root}/state/controller
SlurmdSpoolDir={root}/state/%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.%n.pid
SlurmctldLogFile={log}/slurmctld.log
SlurmdLogFile={log}/slurmd.%n.log
JobCompType=jobcomp/filetxt
JobCompLoc={log}/ended-jobs.txt
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=spot Nodes={names} Default=YES MaxTime=7-0 State=UP PriorityTier=1 PreemptMode=CANCEL GraceTime={grace_s}
PartitionName=ondemand Nodes={names} MaxTime=7-0 State=UP PriorityTier=10 PreemptMode=OFF
"""


def configure(lab: Layout) -> None:
    """Writes slurm.conf and what it needs: the GPUs' devices, munge's key."""
    nodes, gpus = [], []
    for node in lab.nodes:
        nodes.append(
            f"NodeName={node.name} NodeHostname={node.name} NodeAddr={node.address} Port={node.port} "
            f"CPUs={lab.cpus} RealMemory={lab.memory_mb} Gres=gpu:L4:1 State=UNKNOWN"
        )
        device = _fake_gpu(lab.root / "dev" / node.name)
        gpus.append(f"NodeName={node.name} Name=gpu Type=L4 {f'File={device}' if device else 'Count=1'}\n")
    text = CONFIG.format(
        host=socket.gethostname().split(".")[0],
        port=lab.controller_port,
        munge=lab.root / "munge",
        tracking=tracking(),
        root=lab.root,
        run=lab.run,
        log=lab.log,
        nodes="\n".join(nodes),
        names=",".join(node.name for node in lab.nodes),
        grace_s=lab.grace_s,
    )
    lab.slurm_conf.write_text(text)
    (lab.etc / "gres.conf").write_text("".join(gpus))
    cgroup = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
    (lab.etc / "cgroup.conf").write_text(cgroup)
    key = lab.root / "munge" / "key"
    if not key.exists():
        key.touch(mode=0o400)
        key.write_bytes(secrets.token_bytes(128))


def tracking() -> str:
    """How Slurm finds a job's processes: by cgroup as real sites do, by the process tree where there is no freezer.

    It decides what a job that is preempted may still do: by cgroup only the first process of each step hears of it.
    """
    probe = FREEZER / "spotune-lab-probe"
    try:
        probe.mkdir()
    except OSError:
        return "linuxproc"
    probe.rmdir()
    return "cgroup"


def _fake_gpu(path: Path) -> Path | None:
    """A character device like /dev/null, None where devices cannot be made."""
    with contextlib.suppress(FileExistsError, PermissionError):
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.chmod(0o666)
    return path if path.is_char_device() else None


def ask(lab: Layout, *command: str) -> str:
    """The output of one of Slurm's own commands."""
    return call(*command, env={**os.environ, "SLURM_CONF": str(lab.slurm_conf)})


def jobs(lab: Layout, fmt: str = "%i") -> list[str]:
    """Slurm's jobs that have not ended, one line each."""
    done = subprocess.run(
        ["squeue", "-h", "-o", fmt],
        env={**os.environ, "SLURM_CONF": str(lab.slurm_conf)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split("\n")[:-1]
