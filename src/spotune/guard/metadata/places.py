"""Which services can warn this machine: decided from names and files alone, nothing is probed.

SkyPilot says whose machine it is. Where it does not (by hand; a Slurm node or a pod may be a cloud's machine too) the
firmware does, as the kernel shows it in ``/sys/class/dmi/id``.
"""

from collections.abc import Mapping
from pathlib import Path

from spotune.contracts import environment
from spotune.guard.metadata.source import Source

DMI = Path("/sys/class/dmi/id")
CLOUDS = ("aws", "gcp", "azure")
ANYWHERE = ("", "slurm", "kubernetes")  # what runs on any cloud's machines
AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"  # tells Azure from other Hyper-V hosts


def sources_for(infra: str, environ: Mapping[str, str], dmi: Path = DMI) -> list[Source]:
    """The services to watch; each module is imported only where its service is."""
    found: list[Source] = []
    if infra == "kubernetes":
        from spotune.guard.metadata.kubernetes import PodDeletion, this_pod

        if pod := this_pod(environ):
            found.append(PodDeletion(pod))
    cloud = infra if infra in CLOUDS else cloud_of(dmi) if infra in ANYWHERE else ""
    if cloud == "aws" and environ.get(environment.AWS_METADATA_DISABLED, "").lower() != "true":
        from spotune.guard.metadata import aws

        found.append(aws.SpotAction(environ.get(environment.AWS_METADATA) or aws.ENDPOINT))
    elif cloud == "gcp":
        from spotune.guard.metadata import gcp

        found.append(gcp.Preempted(environ.get(environment.GCP_METADATA) or gcp.HOST))
    elif cloud == "azure":
        from spotune.guard.metadata import azure

        found.append(azure.ScheduledEvents(environ.get(environment.AZURE_METADATA) or azure.ENDPOINT))
    return found


def cloud_of(dmi: Path = DMI) -> str:
    """Whose machine the firmware says this is: aws, gcp, azure, or empty."""
    vendor, product = _read(dmi / "sys_vendor"), _read(dmi / "product_name")
    # Older instance types are Xen machines, which only their BIOS tells from others.
    if vendor == "Amazon EC2" or _read(dmi / "bios_version").endswith("amazon"):
        return "aws"
    if product == "Google Compute Engine":
        return "gcp"
    if vendor == "Microsoft Corporation" and _read(dmi / "chassis_asset_tag") == AZURE_TAG:
        return "azure"
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):  # not there, not for us, not text
        return ""
