"""Takes nodes away from running jobs and gives them back, in the ways that real clusters do."""

import re

from tests.lab import slurm
from tests.lab.layout import Layout, Node


def preempt(lab: Layout, node: Node, seconds: int = 600) -> str:
    """A job of higher priority wants the node for so many seconds; spot jobs there have the grace. Returns its id."""
    command = ["sbatch", "--parsable", "--partition=ondemand", f"--nodelist={node.name}", "--exclusive", "--mem=0"]
    command += ["--gres=gpu:1", f"--job-name=preempt-{node.name}", "--output=/dev/null", "--chdir=/"]
    return slurm.ask(lab, *command, f"--time={seconds // 60 + 1}", "--wrap", f"sleep {seconds}").strip()


def fail(lab: Layout, node: Node) -> None:
    """The node is down from one moment to the next, for all that Slurm knows."""
    slurm.ask(lab, "scontrol", "update", f"NodeName={node.name}", "State=DOWN", "Reason=failed")


def restore(lab: Layout, node: Node) -> None:
    """The node takes jobs again, whatever had happened to it."""
    slurm.ask(lab, "scancel", f"--name=preempt-{node.name}")
    if re.match(r"down|drain", slurm.ask(lab, "sinfo", "-h", "-n", node.name, "-p", "spot", "-o", "%T")):
        slurm.ask(lab, "scontrol", "update", f"NodeName={node.name}", "State=RESUME")


def set_grace(lab: Layout, seconds: int) -> None:
    """The time between the notice and the kill, for preemptions from now on."""
    slurm.ask(lab, "scontrol", "update", "PartitionName=spot", f"GraceTime={seconds}")
