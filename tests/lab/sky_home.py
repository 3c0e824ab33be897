"""HOME of the lab's SkyPilot: its configuration, plug-ins and catalogs, and the ``env`` file for shells."""

import shutil
from pathlib import Path

from tests.lab.layout import Layout

HERE = Path(__file__).parent

CONFIG = """\
allowed_clouds: [slurm]
jobs:
  controller:
    consolidation_mode: true  # in the API server: Slurm cannot host a controller
slurm:
  pricing: {cpu: 0.0, memory: 0.0, accelerators: {L4: 0.80}}
  cluster_configs:
    lab:
      partition_configs:
        spot: {pricing: {cpu: 0.0, memory: 0.0, accelerators: {L4: 0.25}}}
        ondemand: {pricing: {cpu: 0.0, memory: 0.0, accelerators: {L4: 0.80}}}
"""

PLUGINS = """\
plugins:
  - class: spotune_lab_plugins.NetworkIsHere
  - class: spotune_lab_plugins.OneController
"""

# A question that names no cloud reads every cloud's price list, and fetches what is missing from the internet.
HEADER = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone\n"
)
ACCELERATORS = "AcceleratorName,Clouds\nL4,\"['AWS', 'GCP', 'RunPod']\"\n"
CLOUDS = """aws azure cudo do fluidstack gcp hyperbolic ibm lambda mithril nebius oci paperspace primeintellect runpod
scp seeweb shadeform vast vsphere yotta""".split()


def configure(lab: Layout) -> None:
    """Writes what is not there yet: ``config.yaml`` and ``plugins.yaml`` are the user's to edit."""
    sky = lab.home / ".sky"
    sky.mkdir(parents=True, exist_ok=True)
    for name, text in {"config.yaml": CONFIG, "plugins.yaml": PLUGINS}.items():
        if not (sky / name).exists():
            (sky / name).write_text(text)
    lists = {f"{cloud}/vms.csv": HEADER for cloud in CLOUDS} | {"common/accelerators.csv": ACCELERATORS}
    for name, text in lists.items():
        path = sky / "catalogs" / "v8" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(text)
    modules = lab.root / "modules"
    modules.mkdir(exist_ok=True)
    (lab.root / "tmp").mkdir(exist_ok=True)
    shutil.copy(HERE / "sky_plugins.py", modules / "spotune_lab_plugins.py")
    (lab.root / "env").write_text(shell_text(lab))


def environ(lab: Layout) -> dict[str, str]:
    """For whatever starts SkyPilot here: ``Layout.environ``, where the plug-ins are, and a TMPDIR of the lab's own.

    SkyPilot's server leaves the files of its requests in TMPDIR.
    """
    return {**lab.environ(), "PYTHONPATH": str(lab.root / "modules"), "TMPDIR": str(lab.root / "tmp")}


def shell_text(lab: Layout) -> str:
    lines = [f"export {name}='{value}'" for name, value in environ(lab).items()]
    lines += [f"export SPOTUNE_PYTHON='{lab.job_python}'  # for tasks: --env SPOTUNE_PYTHON"]
    first = "# Source me: `sky` and `spotune` of this shell then talk to the lab, and only to it."
    return "\n".join([first, *lines, ""])
