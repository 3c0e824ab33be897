"""Taking a machine of a cloud: what is refused, what is asked, and what SkyPilot's provisioner is told at last."""

from dataclasses import replace
from pathlib import Path

import pytest

from spotune.core.errors import InputError
from spotune.launch.skypilot import client
from spotune.launch.skypilot.client import ProvisionedCluster
from spotune.launch.skypilot.engine import take_machine
from spotune.launch.skypilot.jobs import ManagedJob
from tests.real_sky import RealSky

JOB = ManagedJob(
    7, "run-a", "RUNNING", 1.0, infra="aws/us-east-1/us-east-1a", cluster="run-a-7", cluster_on_cloud="run-a-7-x"
)
MACHINE = ProvisionedCluster("run-a-7-x", "AWS", {"region": "us-east-1"}, nodes=2)


@pytest.fixture
def terminated(monkeypatch: pytest.MonkeyPatch) -> list[ProvisionedCluster]:
    found: list[ProvisionedCluster] = []
    monkeypatch.setattr(client, "machine", {"run-a-7": MACHINE}.get)
    monkeypatch.setattr(client, "terminate", found.append)
    return found


def test_a_clouds_instances_go_once_it_is_agreed(terminated: list[ProvisionedCluster]) -> None:
    asked: list[str] = []
    take_machine(JOB, 0, {}, asked.append)
    assert asked == ["Terminate the 2 instances of cluster run-a-7-x on aws/us-east-1/us-east-1a?"]
    assert terminated == [MACHINE]

    def refuse(question: str) -> None:
        raise InputError("stdin", "nobody to ask")

    with pytest.raises(InputError, match="nobody to ask"):
        take_machine(JOB, 0, {}, refuse)
    assert terminated == [MACHINE]


@pytest.mark.parametrize(
    ("job", "notice_s", "says"),
    [
        (replace(JOB, cluster_on_cloud=""), 0, "no machine to take away"),
        (
            JOB,
            30,
            "--notice: aws gives no notice .*--no-notice, or AWS FIS .*-interruptions.* for run-a-7-x",
        ),
        (
            replace(JOB, infra="lambda/x"),
            30,
            r"lambda gives no notice when spotune terminates a machine \(--no-notice\)",
        ),
        (replace(JOB, cluster="run-a-8"), 0, r"not in this machine's records .*the API server's machine"),
        (replace(JOB, cluster_on_cloud="run-a-7-y"), 0, "not in this machine's records"),  # the next one already
    ],
)
def test_what_is_not_taken(terminated: list[ProvisionedCluster], job: ManagedJob, notice_s: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        take_machine(job, notice_s, {}, lambda question: None)
    assert not terminated


AGAINST_EC2 = """
from types import SimpleNamespace

import boto3
from moto import mock_aws
from sky import clouds, global_user_state
from sky.server import common

from spotune.launch.skypilot import client

handle = SimpleNamespace(
    cluster_name_on_cloud="run-a-7-x", cluster_yaml="run-a-7.yml", launched_nodes=2,
    launched_resources=SimpleNamespace(cloud=clouds.AWS()),
)
provider = {"region": "us-east-1", "security_group": {"GroupName": "sky-sg-x"}}
global_user_state.get_cluster_from_name = {"run-a-7": {"handle": handle, "workspace": "default"}}.get
global_user_state.get_cluster_yaml_dict = {"run-a-7.yml": {"provider": provider}}.get
with mock_aws():
    ec2 = boto3.resource("ec2", region_name="us-east-1")
    vpc = next(iter(ec2.vpcs.all()))
    ec2.create_security_group(GroupName="sky-sg-x", Description="x", VpcId=vpc.id)
    instances = []
    for name, count in (("run-a-7-x", 2), ("run-b-8-y", 1)):
        tags = [{"Key": key, "Value": name} for key in ("ray-cluster-name", "skypilot-cluster-name")]
        instances += ec2.create_instances(
            ImageId="ami-12c6146b", MinCount=count, MaxCount=count, InstanceType="g6.xlarge",
            TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
        )
    machine = client.machine("run-a-7")
    print(client.machine("run-a-8"), machine.nodes)
    client.terminate(machine)
    for instance in instances:
        instance.reload()
        print(instance.state["Name"])
common.is_api_server_local = lambda: False
print(client.machine("run-a-7"))
"""


@pytest.mark.slow
@pytest.mark.xdist_group("sky")
def test_skypilots_provisioner_terminates_that_cluster_alone(tmp_path: Path, sky_says: RealSky) -> None:
    """SkyPilot's own code against a stand-in for EC2; the cluster's record is made up."""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    said = sky_says.lines(tmp_path, AGAINST_EC2, environ=keys)
    assert said == ["None 2", "terminated", "terminated", "running", "None"]
