"""The lab's daemons: munged, slurmctld, a slurmd for each node, sshd. Each writes its pid below ``run``."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.lab import login, slurm
from tests.lab.layout import LabError, Layout


@dataclass(frozen=True)
class Daemon:
    name: str
    program: str
    pid_file: Path
    command: tuple[str, ...]

    def process(self) -> psutil.Process | None:
        """The running daemon, None when the pid is of another program by now."""
        try:
            process = psutil.Process(int(self.pid_file.read_text()))
            return process if process.name() == self.program and process.status() != psutil.STATUS_ZOMBIE else None
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None


def daemons(lab: Layout) -> list[Daemon]:
    """All of them, in the order in which they start."""
    munge, conf = lab.root / "munge", str(lab.slurm_conf)
    munged = ("munged", f"--key-file={munge}/key", f"--socket={munge}/socket", f"--pid-file={lab.run}/munged.pid")
    munged += (f"--log-file={lab.log}/munged.log", f"--seed-file={munge}/seed", "--num-threads=2")
    found = [
        Daemon("munged", "munged", lab.run / "munged.pid", munged),
        Daemon("slurmctld", "slurmctld", lab.run / "slurmctld.pid", ("slurmctld", "-f", conf)),
    ]
    for node in lab.nodes:
        # With a host name of its own: SkyPilot tells nodes apart by the addresses of their host names.
        script = f"hostname {node.name} && exec slurmd -N {node.name} -f {conf}"
        pid_file = lab.run / f"slurmd.{node.name}.pid"
        found.append(Daemon(f"slurmd {node.name}", "slurmd", pid_file, ("unshare", "--uts", "sh", "-c", script)))
    sshd = (shutil.which("sshd") or "/usr/sbin/sshd", "-f", f"{lab.etc}/sshd_config", "-E", f"{lab.log}/sshd.log")
    return [*found, Daemon("sshd", "sshd", lab.run / "sshd.pid", sshd)]


def start(lab: Layout) -> None:
    """Starts what does not run; returns when the nodes are up and a login works."""
    Path("/run/sshd").mkdir(exist_ok=True)
    for daemon in daemons(lab):
        if daemon.process():
            continue
        if daemon.name == "munged":
            (lab.root / "munge" / "socket").unlink(missing_ok=True)
        environ = {**os.environ, "SLURM_CONF": str(lab.slurm_conf)}
        # Their output goes to a file: a daemon that inherits a pipe would keep its reader waiting.
        with open(lab.log / "start.log", "a") as log:
            done = subprocess.run(
                daemon.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, check=False, cwd="/"
            )
        if done.returncode:
            raise LabError(f"{daemon.name} did not start, see {lab.log}")
        if daemon.name == "munged":
            wait_until(lambda: (lab.root / "munge" / "socket").is_socket(), 10, f"munged is not there, see {lab.log}")
    wait_until(lambda: len(usable_nodes(lab)) == len(lab.nodes), 30, f"the nodes did not come up, see {lab.log}")
    wait_until(lambda: "spot" in login.log_in(lab), 15, f"no login over ssh, see {lab.log}/sshd.log")


def usable_nodes(lab: Layout) -> list[str]:
    """Names of the nodes that take jobs."""
    lines = slurm.ask(lab, "sinfo", "-h", "-N", "-p", "spot", "-o", "%N %t").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] in ("idle", "mix", "alloc")]


def wait_until(met: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Returns when ``met``; raises LabError after so many seconds. A LabError in ``met`` means not yet."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if met():
                return
        except LabError as error:
            otherwise = f"{otherwise.partition(' (')[0]} ({error})"
        if time.monotonic() > deadline:
            raise LabError(otherwise)
        time.sleep(0.2)


def make_folders(lab: Layout) -> None:
    """The lab's folders. Jobs see all but munge's and HOME's insides."""
    names = ["etc", "run", "log", "dev", "munge", "home", "shared", "programs", "state/controller", lab.user]
    for name in [*names, *(f"state/{node.name}" for node in lab.nodes)]:
        (lab.root / name).mkdir(parents=True, exist_ok=True)
    lab.root.chmod(0o755)
    (lab.root / "munge").chmod(0o711)
    lab.shared.chmod(0o1777)
