"""python -m tests.lab.restore NODE: give a node back to the spot partition."""

import sys

from tests.lab import nodes
from tests.lab.layout import LabError, Layout


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        lab = Layout.read()
        node = lab.node(argv[0])
        nodes.restore(lab, node)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2
    print(f"lab: {node.name} takes jobs again")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
