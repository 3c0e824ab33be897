"""Takes nodes away from running jobs and gives them back, in the ways that real clusters do."""

import os
import re
from contextlib import suppress

import psutil

from tests.lab import daemons, slurm
from tests.lab.layout import LabError, Layout, Node


def preempt(lab: Layout, node: Node, seconds: int = 600) -> str:
    """A job of higher priority wants the node for so many seconds; spot jobs there have the grace. Returns its id."""
    command = ["sbatch", "--parsable", "--partition=ondemand", f"--nodelist={node.name}", "--exclusive", "--mem=0"]
    command += ["--gres=gpu:1", f"--job-name=preempt-{node.name}", "--output=/dev/null", "--chdir=/"]
    return slurm.ask(lab, *command, f"--time={seconds // 60 + 1}", "--wrap", f"sleep {seconds}").strip()


def fail(lab: Layout, node: Node) -> None:
    """The node is cut off, and down for all that Slurm knows; what runs there goes on, since nobody can end it."""
    _daemon(lab, node).suspend()
    slurm.ask(lab, "scontrol", "update", f"NodeName={node.name}", "State=DOWN", "Reason=failed")


def vanish(lab: Layout, node: Node) -> None:
    """The node is gone without a word, with all that ran on it; ``restore`` brings an empty one back."""
    daemon = _daemon(lab, node)
    machine = _host_name_space(daemon.pid)  # each node has one of its own: daemons.py
    on_it = [one for one in psutil.process_iter() if one != daemon and _host_name_space(one.pid) == machine]
    fail(lab, node)
    for process in on_it:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _host_name_space(pid: int) -> str:
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/uts")
    return ""


def _daemon(lab: Layout, node: Node) -> psutil.Process:
    (daemon,) = (daemon for daemon in daemons.daemons(lab) if daemon.name == f"slurmd {node.name}")
    if process := daemon.process():
        return process
    raise LabError(f"{daemon.name} does not run")


def restore(lab: Layout, node: Node) -> None:
    """The node takes jobs again, whatever had happened to it."""
    slurm.ask(lab, "scancel", f"--name=preempt-{node.name}")
    _daemon(lab, node).resume()
    daemons.wait_until(lambda: _takes_jobs(lab, node), 60, f"{node.name} does not come back")


def _takes_jobs(lab: Layout, node: Node) -> bool:
    """Else asks Slurm to take it back, which it refuses where the node's own daemon was quicker."""
    if not re.match(r"down|drain", slurm.ask(lab, "sinfo", "-h", "-n", node.name, "-p", "spot", "-o", "%T")):
        return True
    slurm.ask(lab, "scontrol", "update", f"NodeName={node.name}", "State=RESUME")
    return False


def set_grace(lab: Layout, seconds: int) -> None:
    """The time between the notice and the kill, for preemptions from now on."""
    slurm.ask(lab, "scontrol", "update", "PartitionName=spot", f"GraceTime={seconds}")
