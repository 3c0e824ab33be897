"""python -m tests.lab.status: which daemons run, and what nodes and jobs do. Exit code 1 when a daemon is missing."""

import sys

from tests.lab import daemons, slurm
from tests.lab.layout import LabError, Layout


def main() -> int:
    try:
        lab = Layout.read()
        missing = False
        for daemon in daemons.daemons(lab):
            process = daemon.process()
            print(f"{daemon.name:20} {f'pid {process.pid}' if process else 'does not run'}")
            missing |= process is None
        if not missing:
            print(slurm.ask(lab, "sinfo", "-N", "-o", "%.10N %.10P %.8t %.14C %G"))
            print(slurm.ask(lab, "squeue", "-o", "%.6i %.40j %.10P %.10T %.8M %.10N %r"))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
