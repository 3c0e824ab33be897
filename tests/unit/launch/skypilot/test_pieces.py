"""Places, prices, tasks, partitions and the registry: the SkyPilot infrastructure's parts that need no SkyPilot."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from spotune.core.errors import InfraError, InputError
from spotune.core.money import Place, price_of
from spotune.launch.engine import CLOUDS, JobStatus, PaidInterval, Submission, cloud_of, infra_of, is_infra, spell
from spotune.launch.plan import PRIORITIES
from spotune.launch.settings import SlurmSettings, Workspace, load_settings
from spotune.launch.skypilot import offers
from spotune.launch.skypilot import task as skypilot_task
from spotune.launch.skypilot.client import PIDS, ApiServer, find_controllers, server_problems
from spotune.launch.skypilot.engine import Registry, RunEntry, SkyInfra
from spotune.launch.skypilot.offers import (
    choose,
    first_tried,
    narrowed,
    price_rows,
    slurm_machine,
    within,
)
from spotune.launch.skypilot.task import Partition, placed, recovered, task_config
from tests.real_sky import RealSky
from tests.waiting import ended, until

SPOT, ONDEMAND = Partition("spot", True), Partition("ondemand", False)


def test_places() -> None:
    for name in ("aws", "gcp/us-central1/us-central1-a", "slurm/lab/spot", "kubernetes/arn:aws/eks/x", "k8s", "any"):
        assert infra_of(name) == "skypilot"
    assert infra_of("local") == "local"
    assert (cloud_of("k8s/x"), spell("K8s/My/Ctx"), spell("local")) == ("kubernetes", "kubernetes/My/Ctx", "local")
    assert not is_infra("by hand")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("slrum/lab", "did you mean slurm?"),
        ("moon", "one of local"),
        ("aws/a/b/c", "aws/REGION/ZONE"),
        ("slurm//spot", "slurm/CLUSTER/PARTITION"),
        ("any/aws", "--infra any"),
    ],
)
def test_a_place_that_is_none(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        infra_of(name)


def quote(zone: str, usd: float, use_spot: bool = True, **changes: Any) -> tuple[Place, float]:
    return replace(Place("aws", "us-east-1", zone, "g6.xlarge", "L4:1", use_spot), **changes), usd


def test_zones_of_one_price_are_one_row() -> None:
    quotes = [
        *(quote(zone, 0.8, use_spot=False) for zone in ("a", "b")),
        quote("a", 0.40),
        quote("b", 0.35),
        quote("a", 0.0, instance_type="g6.2xlarge"),  # not known, not free
    ]
    rows = price_rows(quotes, "SkyPilot's catalog", 5.0)
    assert [(row.zone, row.use_spot, row.price_usd_per_hour) for row in rows] == [
        ("b", True, 0.35),
        ("*", True, 0.40),
        ("a", True, 0.40),
        ("*", False, 0.8),
    ]
    assert {(row.infra, row.at, row.source) for row in rows} == {("aws", 5.0, "SkyPilot's catalog")}
    cheapest = choose(rows, use_spot=False)
    assert cheapest
    assert not cheapest.use_spot
    assert choose([], True) is None
    assert [row.zone for row in within(rows, "aws/us-east-1/a")] == ["*", "a", "*"]
    assert within(rows, "aws/eu-west-1") == []
    assert len(within(rows, "any")) == 4
    landed = price_of(Place("aws", "us-east-1", "us-east-1c", "g6.xlarge", "L4:1", True), rows)
    assert landed
    assert landed.price_usd_per_hour == 0.40  # its zone is none of ours: not understated


def test_slurm_has_a_row_for_each_partition() -> None:
    quotes = [quote(zone, usd, zone == "spot", infra="slurm") for zone, usd in (("spot", 0.0), ("ondemand", 0.0))]
    rows = price_rows(quotes, "slurm.pricing", 0.0)
    assert [(row.zone, row.use_spot) for row in rows] == [("ondemand", False), ("spot", True)]
    assert rows[0].source == "no price in slurm.pricing"


@pytest.mark.parametrize(
    ("cpus", "memory", "accelerators", "machine"),
    [
        (None, None, "L4:1", "4CPU--16GB--L4:1"),
        ("2", "4", "L4:1", "2CPU--4GB--L4:1"),
        ("2+", "4x", "L4:2", "2CPU--8GB--L4:2"),
        (None, None, "", "2CPU--2GB"),
    ],
)
def test_what_slurm_is_asked_for(cpus: str | None, memory: str | None, accelerators: str, machine: str) -> None:
    assert slurm_machine(cpus, memory, accelerators) == machine


def test_partitions_as_slurm_tells_them() -> None:
    text = (
        "PartitionName=spot AllowGroups=ALL PriorityJobFactor=1 PriorityTier=1 PreemptMode=CANCEL State=UP\n"
        "PartitionName=ondemand AllowGroups=ALL PriorityTier=10 PreemptMode=OFF State=UP\n"
    )
    assert skypilot_task.parse_partitions(text) == [SPOT, ONDEMAND]
    flat = (
        "PartitionName=gpu PriorityTier=1 PreemptMode=OFF\nPartitionName=gpu-preempt PriorityTier=1 PreemptMode=OFF\n"
    )
    assert [one.preemptible for one in skypilot_task.parse_partitions(flat)] == [False, True]


def login(tmp_path: Path, script: str) -> dict[str, str]:
    """An environment whose ssh runs a script in place of the login node."""
    (tmp_path / ".slurm").mkdir()
    (tmp_path / ".slurm/config").write_text("Host lab other\n  HostName 127.0.0.1\nHost *\n  User x\n")
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    ssh.write_text(f"#!/bin/bash\n{script}\n")
    ssh.chmod(0o755)
    return {"HOME": str(tmp_path), "PATH": f"{ssh.parent}:{os.environ['PATH']}"}


def test_the_settings_correct_slurm(tmp_path: Path) -> None:
    environ = login(tmp_path, "echo PartitionName=gpu PriorityTier=1 PreemptMode=OFF")
    assert skypilot_task.clusters(environ) == ["lab", "other"]
    assert skypilot_task.known_partitions("lab", SlurmSettings(), environ) == [Partition("gpu", False)]
    ours = SlurmSettings(preemptible=("lab/gpu", "lab/new", "other/x"))
    assert skypilot_task.known_partitions("lab", ours, environ) == [Partition("gpu", True), Partition("new", True)]
    assert skypilot_task.partitions_of("slurm/lab/spot", ours, environ)["lab"][-1] == Partition(
        "spot", True
    )  # as its name says
    assert skypilot_task.preemptible_partitions("slurm/lab/spot", ours, environ) == ["lab/gpu", "lab/new", "lab/spot"]
    assert skypilot_task.preemptible_partitions("aws", ours, environ) == []


def test_a_login_node_that_does_not_answer_is_one_line(tmp_path: Path) -> None:
    environ = login(tmp_path, "echo no route >&2; echo to host >&2; exit 255")
    with pytest.raises(InfraError, match="slurm/lab: no route to host"):
        skypilot_task.on_login("lab", "true", environ)
    assert skypilot_task.known_partitions("lab", SlurmSettings(), environ) == []


def test_where_it_may_run_on_slurm() -> None:
    known = {"lab": [SPOT, ONDEMAND]}
    assert narrowed("slurm/lab", None, True, known) == ["slurm/lab/spot"]
    assert narrowed("slurm/lab", False, False, known) == ["slurm/lab/ondemand"]
    assert narrowed("slurm/lab/ondemand", None, True, known) == ["slurm/lab/ondemand"]  # the task's own word gives way
    assert narrowed("slurm/lab", True, True, {"lab": []}) == []
    with pytest.raises(InputError, match="--no-use-spot: a job on slurm/lab/spot may be preempted .*lab/ondemand"):
        narrowed("slurm/lab/spot", False, False, known)
    with pytest.raises(InputError, match="--use-spot: no partition of slurm/lab may be preempted"):
        narrowed("slurm/lab", True, True, {"lab": [ONDEMAND]})


def test_a_task_at_its_place() -> None:
    wanted = {"accelerators": "L4:1", "use_spot": True, "region": "us-east-1", "any_of": [{"cloud": "aws", "cpus": 4}]}
    assert placed(wanted, "gcp") == {"accelerators": "L4:1", "use_spot": True, "any_of": [{"cpus": 4}], "infra": "gcp"}
    assert placed(wanted, "any") == wanted
    assert placed({"use_spot": True}, "slurm/lab/spot") == {"infra": "slurm/lab/spot"}
    two = placed({"any_of": [{"accelerators": "L4:1", "use_spot": True}]}, "slurm/lab", ["slurm/lab/a", "slurm/lab/b"])
    assert two["any_of"] == [{"accelerators": "L4:1", "infra": f"slurm/lab/{name}"} for name in "ab"]


def test_pods_without_spot_nodes_are_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only SkyPilot's server can tell: it is asked, and asked again without spot."""

    def check(job: Any) -> None:
        if job.config["resources"].get("use_spot"):
            raise InfraError("SkyPilot: no spot nodes")

    monkeypatch.setattr(offers.client, "task", lambda config: SimpleNamespace(config=config))
    monkeypatch.setattr(offers.client, "check_feasible", check)
    task = {"resources": {"accelerators": "L4:1", "use_spot": True}}
    found, _, notes = offers._feasible(offers.Wanted(task, "kubernetes/lab"), ["kubernetes"])
    assert found["resources"] == {"accelerators": "L4:1", "infra": "kubernetes/lab"}
    assert notes == ("kubernetes/lab has no spot machines for this: on demand instead",)
    with pytest.raises(InfraError, match="no spot nodes"):
        offers._feasible(offers.Wanted(task, "kubernetes/lab", use_spot=True), ["kubernetes"])


def test_what_is_tried_first() -> None:
    rows = price_rows([quote("a", 0.4), quote("b", 0.8, use_spot=False, accelerators="T4:1")], "catalog", 0.0)
    spot = Place("aws", "us-east-1", accelerators="L4:1", use_spot=True)
    other = Place("", accelerators="T4:1", use_spot=False)
    for choices, is_ordered, usd in (([other, spot], False, 0.4), ([other, spot], True, 0.8), ([other], False, 0.8)):
        found = first_tried(rows, choices, is_ordered)
        assert found
        assert found.price_usd_per_hour == usd
    none_fits = [replace(spot, infra="", region="", use_spot=False), replace(spot, infra="gcp", region="")]
    assert first_tried(rows, none_fits, False) is None


def test_a_submission_as_a_task() -> None:
    task = {"workdir": ".", "run": "x", "secrets": {"A": None}, "resources": {"infra": "slurm/lab/spot", "priority": 3}}
    task["envs"] = {"SPOTUNE_BUCKET": "file:///b"}
    submission = Submission(
        "run-a", task, "/home/ada/work", "ada", infra="slurm/lab", priority=3, secrets={"TOKEN": "x"}
    )
    found = task_config(submission, 100)
    assert (found["name"], found["workdir"]) == ("run-a", "/home/ada/work")
    assert found["resources"] == {**task["resources"], "job_recovery": {"recover_on_exit_codes": [75]}}
    assert found["secrets"] == {"A": None, "TOKEN": "x"}
    assert found["_metadata"]["spotune"] == {"user": "ada", "infra": "slurm/lab", "bucket": "file:///b", "priority": 3}
    assert task["workdir"] == "."


def test_priority_goes_on_in_slurms_queue() -> None:
    def options(priority: int, infra: str = "slurm/lab", nice: int | None = None, **task: Any) -> Any:
        submission = Submission("run-a", task, "/w", "ada", infra=infra, priority=priority)
        found = task_config(submission, SlurmSettings().nice if nice is None else nice)
        return found.get("config", {}).get("slurm", {}).get("sbatch_options")

    assert [options(priority)["nice"] for priority in (*PRIORITIES, 0, 20, 900)] == [2000, 0, 1000, 980, 100]
    assert [options(priority, nice=100)["nice"] for priority in (-20, 20, 100, 900)] == [120, 80, 0, 0]
    assert options(0, "any") == {"nice": 1000}
    assert options(0, "aws") is None
    given = {"slurm": {"sbatch_options": {"nice": 7, "qos": "low"}, "quota": {"account": "nlp"}}}
    assert options(5, config=given) == {"nice": 7, "qos": "low"}
    assert task_config(Submission("run-a", {"config": given}, "/w", "ada", infra="slurm/lab"), 0)["config"] == given


def test_75_is_always_worth_another_machine() -> None:
    assert recovered({"job_recovery": "FAILOVER"})["job_recovery"] == {
        "strategy": "FAILOVER",
        "recover_on_exit_codes": [75],
    }
    named = {"job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": 41}}
    assert recovered(named)["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [41, 75]}
    alternatives = recovered({"any_of": [{"job_recovery": "FAILOVER"}, {"cpus": 4}]})["any_of"]
    assert [one.get("job_recovery", {}).get("recover_on_exit_codes") for one in alternatives] == [[75], None]
    assert recovered({"job_recovery": {"recover_on_exit_codes": [75]}}) == {
        "job_recovery": {"recover_on_exit_codes": [75]}
    }


ENTRY = RunEntry("run-a", "slurm/lab", "file:///b", "ada", 0, 5.0, "/w", {"run": "x"}, ["TOKEN"], [7])


def test_the_registry_keeps_how_it_ended(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    assert registry.entries() == []
    registry.write(ENTRY)
    assert registry.folder.stat().st_mode & 0o777 == 0o700
    registry.settle(replace(ENTRY.status(), state="RUNNING"))
    assert registry.entry("run-a") == ENTRY
    machine = PaidInterval("run-a", 1.0, 2.0, "slurm")
    registry.keep_history("run-a", [machine])  # it has not ended yet
    assert registry.entry("run-a") == ENTRY
    ended = replace(ENTRY.status(), state="FAILED", reason="why")
    registry.settle(ended)
    registry.keep_history("run-a", [replace(machine, ended_at=None)])
    found = registry.entry("run-a")
    assert found
    assert (found.status(), found.intervals()) == (ended, None)
    registry.keep_history("run-a", [machine])
    found = registry.entry("run-a")
    assert found
    assert found.intervals() == [machine]
    registry.folder.joinpath("run-b.json").write_text("half a rec")
    assert [entry.run_id for entry in registry.entries()] == ["run-a"]
    assert registry.folder.joinpath("run-b.json.damaged-1").read_text() == "half a rec"


def test_of_what_has_ended_skypilot_is_not_asked(tmp_path: Path) -> None:
    """Nothing of this imports sky: the door is not even opened."""
    infra = SkyInfra(tmp_path, {})
    assert infra.jobs() == infra.jobs(["run-a"]) == infra.jobs(everyone=True) == infra.history("run-a") == []
    for verb in (infra.resume, infra.check_resumable):
        with pytest.raises(InputError, match="run-a"):
            verb("run-a")
    registry = Registry(tmp_path)
    registry.write(ENTRY)
    registry.settle(replace(ENTRY.status(), state="FAILED", reason="why"))
    assert [(job.run_id, job.state, job.reason) for job in infra.jobs()] == [("run-a", "FAILED", "why")]
    with pytest.raises(InputError, match="secret TOKEN is not set here"):
        infra.check_resumable("run-a")


def test_slurm_is_told_to_take_the_allocation(tmp_path: Path) -> None:
    """The command runs as it would on the login node, with Slurm's commands replaced by ones that write down."""
    said = tmp_path / "said"
    for name, body in (("squeue", f'echo 41; echo "squeue $@" >> {said}'), ("scancel", f'echo "scancel $@" >> {said}')):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/bash\n{body}\n")
        tool.chmod(0o755)
    environ = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def run(command: str) -> str:
        done = subprocess.run(["bash", "-c", command], env=environ, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run(skypilot_task.taking("run-a-7-x", 2)) == "taken"  # does not wait for the end
    asked, signalled = said.read_text().splitlines()
    assert "--name=run-a-7-x" in asked
    assert signalled == "scancel --signal=URG 41"
    until(lambda: len(said.read_text().splitlines()) > 2, said.read_text)
    assert said.read_text().splitlines()[2:] == ["scancel 41"]
    said.unlink()
    assert run(skypilot_task.taking("run-a-7-x", 0)) == "taken"
    assert said.read_text().splitlines()[1:] == ["scancel --full --signal=KILL 41", "scancel 41"]
    (tmp_path / "bin/squeue").write_text("#!/bin/bash\ntrue\n")
    assert run(skypilot_task.taking("run-a-7-x", 0)) == "none"


def test_what_is_wrong_with_a_server() -> None:
    fine = ApiServer(
        "http://x", "0.14.1", True, consolidation=True, controllers=2, controllers_mb=400, free_mb=9000, cpus=2
    )
    assert server_problems(fine) == []
    assert "consolidation mode is off" in server_problems(replace(fine, consolidation=False))[0]
    assert "12 job controllers on 2 CPUs" in server_problems(replace(fine, controllers=12))[0]
    assert (
        "hold 2300 MB of memory and 1900 MB are left"
        in server_problems(replace(fine, controllers=12, controllers_mb=2300, free_mb=1900, cpus=8))[0]
    )
    assert "cannot be told from here" in server_problems(ApiServer("http://far", "0.14.1", False))[0]


def test_controllers_that_are_gone_are_none(tmp_path: Path) -> None:
    assert find_controllers(tmp_path) == (0, 0.0)
    pids = tmp_path / PIDS
    pids.parent.mkdir()
    me = psutil.Process()
    gone = subprocess.Popen(["true"])
    ended(gone)
    pids.write_text(f"{gone.pid},5.0\n{me.pid},{me.create_time()}\n{me.pid},5.0\n{me.pid}\nnonsense\n")
    count, memory_mb = find_controllers(tmp_path)
    assert count == 2  # the one with its time, the one without
    assert memory_mb > 10


def test_a_bucket_of_files_needs_shared_storage(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("slurm: {shared: [/shared]}\n")
    environ = {"SPOTUNE_HOME": str(tmp_path), "SPOTUNE_BUCKET": "file:///shared/spotune"}
    workspace = Workspace.open(environ, tmp_path)
    workspace.check_bucket_reaches("slurm/lab")
    workspace.check_bucket_reaches("local")
    with pytest.raises(InputError, match="machines of aws cannot see"):
        workspace.check_bucket_reaches("aws")
    elsewhere = Workspace.open({**environ, "SPOTUNE_BUCKET": "file:///sharedby/none"}, tmp_path)
    with pytest.raises(InputError, match="slurm.shared"):
        elsewhere.check_bucket_reaches("slurm/lab")


@pytest.mark.parametrize("text", ["slurm: {shared: here}", "slurm: {shared: [here]}", "slurm: {shard: []}"])
def test_settings_of_slurm_that_cannot_be(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="slurm"):
        load_settings(tmp_path, tmp_path)


@pytest.mark.xdist_group("sky")
def test_the_clouds_are_skypilots(tmp_path: Path, sky_says: RealSky) -> None:
    ask = "import json; from sky.skylet.constants import ALL_CLOUDS; print(json.dumps(sorted(ALL_CLOUDS)))"
    assert sorted(CLOUDS) == sky_says.json(tmp_path, ask)


GPU = "{'Gpus': [{'MemoryInfo': {'SizeInMiB': 24576}}]}"
CATALOG = {
    "aws": [
        "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch",
        f'g6.xlarge,L4,1.0,4.0,16.0,"{GPU}",0.80,0.40,us-east-1,use1-az1,x86_64',
        f'g6.xlarge,L4,1.0,4.0,16.0,"{GPU}",0.80,0.30,us-east-1,use1-az2,x86_64',
        f'g5.xlarge,A10G,1.0,4.0,16.0,"{GPU}",1.00,,us-east-1,use1-az2,x86_64',
    ],
    "gcp": [
        "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice",
        "g2-standard-4,4.0,16.0,,,,us-central1,us-central1-a,0.15,0.05",
        f',,,L4,1,"{GPU}",us-central1,us-central1-a,0.56,0.22',
    ],
}
ASK = """
import json
from dataclasses import astuple
from spotune.launch.skypilot import client
from spotune.launch.skypilot.offers import cloud_quotes
task = client.task({"run": "x", "resources": {"accelerators": {"L4": 1, "A10G": 1}, "use_spot": True}})
quotes = [quote for name in ("aws", "gcp") for quote in cloud_quotes(name, task).items()]
print(json.dumps([(astuple(place), usd) for place, usd in quotes]))
"""


@pytest.mark.xdist_group("sky")
def test_prices_of_every_place_from_skypilots_catalog(tmp_path: Path, sky_says: RealSky) -> None:
    """No cloud is enabled, nobody is asked: the catalog is read as it lies there."""
    for name, lines in CATALOG.items():
        path = tmp_path / ".sky/catalogs/v8" / name / "vms.csv"
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(lines) + "\n")
    rows = price_rows([(Place(*place), usd) for place, usd in sky_says.json(tmp_path, ASK)], "catalog", 0.0)
    found = {(row.infra, row.zone, row.accelerators, row.use_spot): row.price_usd_per_hour for row in rows}
    assert found == {
        ("gcp", "*", "L4:1", True): 0.27,
        ("aws", "use1-az2", "L4:1", True): 0.3,
        ("aws", "use1-az1", "L4:1", True): 0.4,
        ("aws", "*", "L4:1", True): 0.4,
        ("gcp", "*", "L4:1", False): 0.71,
        ("aws", "*", "L4:1", False): 0.8,
        ("aws", "*", "A10G:1", False): 1.0,
    }


def test_statuses_are_kept_whole(tmp_path: Path) -> None:
    status = JobStatus("run-a", "FAILED", 1, "ada", "slurm/lab/spot", 1.0, 2.0, 3.0, 2, 1, "why", 3, bucket="file:///b")
    registry = Registry(tmp_path)
    registry.write(ENTRY)
    registry.settle(status)
    found = registry.entry("run-a")
    assert found
    assert found.status() == status
