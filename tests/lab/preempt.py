"""python -m tests.lab.preempt NODE [SECONDS | --fail]: take a node (gpu1, gpu2) from the spot partition.

With SECONDS (600): a job of higher priority wants it for so long; spot jobs get the notice and the grace.
With --fail: the node is down at once, without a notice, until `python -m tests.lab.restore NODE`.
"""

import sys

from tests.lab import nodes
from tests.lab.layout import LabError, Layout


def main(argv: list[str]) -> int:
    if not argv or len(argv) > 2 or argv[0].startswith("-") or not (argv[1:] or ["1"])[0].lstrip("-").isalnum():
        print(__doc__, file=sys.stderr)
        return 2
    try:
        lab = Layout.read()
        node = lab.node(argv[0])
        if argv[1:] == ["--fail"]:
            nodes.fail(lab, node)
            print(f"lab: {node.name} is down")
        else:
            seconds = int((argv[1:] or ["600"])[0])
            job = nodes.preempt(lab, node, seconds)
            print(f"lab: {node.name} is wanted by job {job} for {seconds} s; {lab.grace_s} s of grace")
    except (LabError, ValueError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
