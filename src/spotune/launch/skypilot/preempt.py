"""Taking a managed job's machine away, as its infrastructure does. Tried on Slurm; the rest is by the book."""

import subprocess
from collections.abc import Mapping

from spotune.contracts.errors import InfraError, InputError
from spotune.launch.infra import Agree
from spotune.launch.skypilot import engine, slurm
from spotune.launch.skypilot.jobs import ManagedJob

_TIMEOUT_S = 60.0
# What has a cloud give the notice that it gives of an interruption of its own, with its own tools.
_NOTICES = {
    "aws": "AWS FIS (aws:ec2:send-spot-instance-interruptions)",
    "gcp": "gcloud compute instances simulate-maintenance-event",
    "azure": "az vm simulate-eviction",
}
_CONSOLE = "run it on the API server's machine, or terminate it in the cloud's console"


def take_machine(job: ManagedJob, notice_s: float, environ: Mapping[str, str], agree: Agree) -> None:
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
        if notice_s:
            by_hand = f", or {_NOTICES[cloud]} for {name}" if cloud in _NOTICES else ""
            raise InputError(
                "--notice", f"{cloud} gives none when it is told to terminate", remedy=f"--no-notice{by_hand}"
            )
        terminate(job, agree)


def terminate(job: ManagedJob, agree: Agree) -> None:
    """Terminates all instances of the job's cluster without SkyPilot's knowledge, as a cloud does.

    By SkyPilot's own provisioner, which every infrastructure has, and which needs the cluster's record: the API server
    has it, so that server must be on this machine.
    """
    machine = engine.machine(job.cluster)
    if machine is None or machine.name != job.cluster_on_cloud:
        what = f"its cluster {job.cluster} on {job.infra} is not in this machine's records of SkyPilot's"
        raise InputError(job.run_id, what, remedy=_CONSOLE)
    nodes = "instance" if machine.nodes == 1 else f"{machine.nodes} instances"
    agree(f"Terminate the {nodes} of cluster {machine.name} on {job.infra}?")
    engine.terminate(machine)


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
