"""Taking a managed job's machine away, as its infrastructure does. Tried on Slurm; the rest is by the book."""

import subprocess
from collections.abc import Mapping

from spotune.contracts.errors import InfraError, InputError
from spotune.launch.skypilot import slurm
from spotune.launch.skypilot.jobs import ManagedJob

_TIMEOUT_S = 60.0
# Clouds terminate what is paid for: that stays in the hands of whoever has their credentials.
_BY_HAND = {
    "aws": "aws ec2 terminate-instances on {name}",
    "gcp": "gcloud compute instances simulate-maintenance-event on {name}",
    "azure": "az vmss simulate-eviction, or az vm simulate-eviction, on {name}",
}


def take_machine(job: ManagedJob, notice_s: float, environ: Mapping[str, str]) -> None:
    """Raises InputError where there is no machine, or where it is not for spotune to take."""
    cloud, name = job.infra.split("/", 1)[0], job.cluster_on_cloud
    if not name:
        raise InputError(job.run_id, f"is {job.status}: it has no machine to take away")
    if cloud == "slurm":
        if not slurm.take(job.region, name, notice_s, environ):
            raise InputError(job.run_id, f"slurm/{job.region} runs no job {name}: it has no machine to take away")
    elif cloud == "kubernetes":
        _delete_pods(job, notice_s, environ)
    else:
        by_hand = _BY_HAND.get(cloud, "terminate {name} in its console").format(name=name)
        raise InputError(job.run_id, f"spotune terminates no machine of {cloud}", remedy=by_hand)


def _delete_pods(job: ManagedJob, notice_s: float, environ: Mapping[str, str]) -> None:
    """The pods get a deletion timestamp and are killed when the grace is over; kubectl does not wait for it."""
    command = ["kubectl", "delete", "pod", "-l", f"skypilot-cluster={job.cluster_on_cloud}", "--wait=false"]
    command += [f"--grace-period={int(notice_s)}", *(["--force"] if notice_s < 1 else [])]
    command += ["--context", job.region] if job.region else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environ)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InfraError(f"kubectl: {error}") from error
    if done.returncode:
        raise InfraError(f"kubectl: {' '.join(done.stderr.split())}")
    if "deleted" not in done.stdout:
        raise InputError(job.run_id, "has no pod to take away")
