"""What belongs to a lab: its folder, account, ports and host names, all from one slot number."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SSH_PORT = 17100
API_PORT = 46780  # SkyPilot's own default is 46580; it also takes 50011 + (port - 46580)
SLOT_PORTS = 20


class LabError(Exception):
    """What is wrong, in one line."""


@dataclass(frozen=True)
class Node:
    """One of the lab's machines: this one, under another host name and address."""

    name: str
    address: str
    port: int


@dataclass(frozen=True)
class Layout:
    """One lab. Labs with different slots can run side by side.

    Attributes:
        slot: 0 for the usual one.
        root: the folder below which everything is.
        grace_s: seconds from the notice to the kill when a spot job is preempted.
        cpus: of each node, as Slurm counts them; more than there are is fine.
        memory_mb: of each node.
    """

    slot: int
    root: Path
    grace_s: int = 25
    cpus: int = 8
    memory_mb: int = 8000

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "Layout":
        slot = int(environ.get("SPOTUNE_LAB_SLOT") or 0)
        if not 0 <= slot < 20:
            raise LabError(f"SPOTUNE_LAB_SLOT: {slot} is not from 0 to 19")
        root = Path(environ.get("SPOTUNE_LAB_DIR") or f"/var/tmp/spotune-lab{slot or ''}")
        if len(root.parts) < 3 or not root.is_absolute():
            raise LabError(f"SPOTUNE_LAB_DIR: {root} is not a folder of its own")
        return cls(slot, root, int(environ.get("SPOTUNE_LAB_GRACE_S") or 25))

    @property
    def user(self) -> str:
        """The account that owns the jobs; it cannot read what only root may."""
        return f"spotlab{self.slot or ''}"

    @property
    def nodes(self) -> tuple[Node, Node]:
        first, second = (
            Node(f"lab{self.slot or ''}-gpu{number}", f"127.0.{1 + self.slot}.{number}", self._port(1 + number))
            for number in (1, 2)
        )
        return first, second

    def node(self, name: str) -> Node:
        """A node by its name, or by its number."""
        for number, node in enumerate(self.nodes, 1):
            if name in (node.name, str(number), f"gpu{number}"):
                return node
        raise LabError(f"{name}: no such node (there are {', '.join(node.name for node in self.nodes)})")

    def _port(self, index: int) -> int:
        return SSH_PORT + SLOT_PORTS * self.slot + index

    @property
    def ssh_port(self) -> int:
        return self._port(0)

    @property
    def controller_port(self) -> int:
        return self._port(1)

    @property
    def api_port(self) -> int:
        return API_PORT + SLOT_PORTS * self.slot

    @property
    def mark(self) -> str:
        """Ends each line that the lab writes to a file of the system."""
        return f"# spotune-lab-{self.slot}"

    @property
    def profile(self) -> Path:
        """A login shell of a job puts the lab's programs in front by this file."""
        return Path(f"/etc/profile.d/spotune-lab-{self.slot}.sh")

    @property
    def etc(self) -> Path:
        return self.root / "etc"

    @property
    def slurm_conf(self) -> Path:
        return self.etc / "slurm.conf"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def home(self) -> Path:
        """HOME of whoever talks to the lab's SkyPilot; the caller's own ~/.sky is not touched."""
        return self.root / "home"

    @property
    def jobs_home(self) -> Path:
        """Home of the account that owns the jobs: the clusters' homes are in it."""
        return self.root / self.user

    @property
    def shared(self) -> Path:
        """What jobs and tests both may write: buckets."""
        return self.root / "shared"

    @property
    def programs(self) -> Path:
        """Stand-ins for what a node would download, in front of its PATH."""
        return self.root / "programs"

    @property
    def job_python(self) -> Path:
        """What SPOTUNE_PYTHON is for tasks."""
        return self.root / "python" / "python"

    def environ(self) -> dict[str, str]:
        """What a process needs in its environment to talk to this lab, and to no other SkyPilot."""
        return {
            "HOME": str(self.home),
            "SLURM_CONF": str(self.slurm_conf),
            "SKYPILOT_API_SERVER_LOCAL_PORT": str(self.api_port),
            "SKYPILOT_API_SERVER_ENDPOINT": f"http://127.0.0.1:{self.api_port}",
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            "SPOTUNE_LAB_SLOT": str(self.slot),
            "SPOTUNE_LAB_DIR": str(self.root),
        }
