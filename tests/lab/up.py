"""Brings the lab up; repairs whatever does not run. ``--server`` also starts SkyPilot's API server."""

import sys
import time

from tests.lab import daemons, job_python, login, machine, programs, sky, sky_home, slurm
from tests.lab.layout import LabError, Layout


def up(lab: Layout) -> None:
    """From nothing, or from whatever is there."""
    machine.check_machine()
    machine.install_packages(lab)
    daemons.make_folders(lab)
    machine.add_hosts(lab)
    login.configure(lab)
    programs.install(lab)
    job_python.install(lab)
    slurm.configure(lab)
    sky_home.configure(lab)
    daemons.start(lab)


def main() -> int:
    started = time.monotonic()
    try:
        lab = Layout.read()
        up(lab)
        if "--server" in sys.argv[1:]:
            sky.start_server(lab)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    nodes = " and ".join(node.name for node in lab.nodes)
    print(f"lab: up in {time.monotonic() - started:.0f} s: {nodes}, one fake L4 each, {lab.grace_s} s of grace")
    print(f"  . {lab.root}/env           # this shell's sky then talks to the lab, and only to it")
    print("  sky check slurm            # infra: slurm/lab/spot (preemptible), slurm/lab/ondemand")
    print("  python -m tests.lab.preempt gpu1 60    # also restore, status, down")
    return 0


if __name__ == "__main__":
    sys.exit(main())
