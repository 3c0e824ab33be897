"""Which machine SkyPilot picks for a task, and what the plan says: its own optimizer over price rows.

The optimizer runs in a process of its own (tests/real_sky.py), with a HOME of its own, where the catalog lies as files
and some clouds are noted as enabled, as ``sky check`` notes them; of SkyPilot nothing but the way to its server is
replaced.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.real_sky import RealSky

pytestmark = pytest.mark.xdist_group("sky")

TASKS = Path(__file__).parents[2] / "tasks"
TRAIN = ("train.yaml", "train-multinode.yaml")
REAL = Path(__file__).parents[3] / "shared" / "catalog" / "v8"
AWS = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch"
)
GCP = "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice"
OTHERS = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,SpotPrice,Region,GpuInfo"
GPU = "{'Gpus': [{'MemoryInfo': {'SizeInMiB': 24576}}]}"
# Made up, so that what must be picked is plain: spot of L4 on GCP and of A10G on AWS are the cheapest of their cloud.
ROWS = {
    "aws/vms.csv": [
        AWS,
        f'g6.xlarge,L4,1.0,4.0,16.0,"{GPU}",0.80,0.40,us-east-1,use1-az1,x86_64',
        f'g5.xlarge,A10G,1.0,4.0,16.0,"{GPU}",1.00,0.31,us-east-1,use1-az2,x86_64',
        f'g4dn.xlarge,T4,1.0,4.0,16.0,"{GPU}",0.53,0.33,us-east-1,use1-az2,x86_64',
    ],
    "gcp/vms.csv": [
        GCP,
        "g2-standard-4,4.0,16.0,,,,us-central1,us-central1-a,0.15,0.05",
        f',,,L4,1,"{GPU}",us-central1,us-central1-a,0.56,0.22',
    ],
    "lambda/vms.csv": [OTHERS, f'gpu_1x_a10,A10,1.0,30,200,1.29,,us-east-1,"{GPU}"'],
    "nebius/vms.csv": [OTHERS, f'gpu-h100-sxm_1gpu-16vcpu-200gb,H100,1,16,200,2.95,1.25,eu-north1,"{GPU}"'],
    "azure/vms.csv": [
        "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,Generation",
        f'Standard_NV36ads_A10_v5,A10,1.0,36.0,440.0,"{GPU}",3.2,0.64,eastus,V2',
    ],
    "aws/images.csv": [
        "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId",
        "skypilot:custom-gpu-ubuntu,us-east-1,ubuntu,22.04,ami-1,20250910,ami-2",
    ],
    "gcp/images.csv": [
        "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId",
        "skypilot:custom-gpu-ubuntu-2204,,ubuntu,22.04,projects/x/global/images/y,20250910,",
    ],
    "common/accelerators.csv": [
        "AcceleratorName,Clouds",
        "L4,\"['AWS', 'GCP']\"",
        "A10G,['AWS']",
        "A10,\"['Azure', 'Lambda']\"",
        "H100,['nebius']",
        "T4,\"['AWS', 'GCP']\"",
    ],
}
ENABLE = """
import json, sys, yaml, sky
from sky import global_user_state, optimizer
from sky.clouds import cloud
clouds = sys.argv.pop(1).split(",")
for capability in (cloud.CloudCapability.COMPUTE, cloud.CloudCapability.STORAGE):
    global_user_state.set_enabled_clouds(clouds, capability, "default")
global_user_state.set_allowed_clouds(clouds, "default")
"""
PICK = """
found = {}
for path in sys.argv[1:]:
    task = sky.Task.from_yaml_config(yaml.safe_load(open(path)), env_overrides=[("SPOTUNE_BUCKET", "s3://bucket/x")])
    task.workdir = None
    with sky.Dag() as dag:
        dag.add(task)
    optimizer.Optimizer.optimize(dag, quiet=True)
    best = task.best_resources
    hourly = best.get_cost(3600) * task.num_nodes
    found[path] = {"cloud": str(best.cloud), "type": best.instance_type, "gpus": best.accelerators,
                   "spot": best.use_spot, "nodes": task.num_nodes, "usd_per_hour": hourly}
print(json.dumps(found))
"""


# The API server's part is done here in the process: what is enabled, and its optimizer.
OFFER = """
from spotune.core.errors import SpotuneError
from spotune.launch.skypilot import client, offers
client.enabled_clouds = lambda: clouds
def check_feasible(job):
    with client.translated(), sky.Dag() as dag:
        dag.add(job)
        optimizer.Optimizer.optimize(dag, quiet=True)
client.check_feasible = check_feasible
found = []
for resources, infra, use_spot in json.loads(sys.argv[1]):
    try:
        made = offers.make_offers(offers.Wanted({"run": "x", "resources": resources}, infra, use_spot), 0.0)
    except SpotuneError as error:
        found.append(str(error))
        continue
    chosen = made.chosen
    found.append({"infra": chosen.infra, "gpus": chosen.accelerators, "spot": chosen.use_spot, "notes": made.notes,
                  "kinds": sorted(made.kinds), "resources": made.task["resources"],
                  "rows": [(row.infra, row.accelerators, row.use_spot) for row in made.rows]})
print(json.dumps(found))
"""
AWS_GCP = ("aws", "gcp")


def ask(sky: RealSky, home: Path, script: str, *arguments: str, clouds: Sequence[str] = AWS_GCP) -> Any:
    """What a script says where SkyPilot has the catalog that lies in ``home``."""
    (home / ".sky").mkdir(exist_ok=True)
    (home / ".sky" / "config.yaml").write_text(yaml.safe_dump({"allowed_clouds": list(clouds)}))
    return sky.json(home, ENABLE + script, ",".join(clouds), *arguments)


def picks(sky: RealSky, home: Path, names: list[str]) -> dict[str, Any]:
    """What SkyPilot's optimizer picks for each task."""
    found = ask(sky, home, PICK, *(str(TASKS / name) for name in names))
    return {Path(path).name: pick for path, pick in found.items()}


def lay_catalog(home: Path) -> Path:
    for name, lines in ROWS.items():
        path = home / ".sky" / "catalogs" / "v8" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return home


@pytest.fixture(scope="module")
def made_up(sky_says: RealSky, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = lay_catalog(tmp_path_factory.mktemp("sky"))
    return picks(sky_says, home, ["dev.yaml", "train.yaml", "train-multinode.yaml"])


def test_train_gets_the_cheapest_spot_machine_of_any_cloud(made_up: dict[str, Any]) -> None:
    pick = made_up["train.yaml"]
    assert pick["spot"]
    assert (pick["cloud"], pick["gpus"]) == ("GCP", {"L4": 1})
    assert pick["usd_per_hour"] == pytest.approx(0.27)


def test_dev_gets_the_cheapest_machine_that_nobody_takes_away(made_up: dict[str, Any]) -> None:
    pick = made_up["dev.yaml"]
    assert not pick["spot"]
    assert (pick["cloud"], pick["type"]) == ("AWS", "g4dn.xlarge")
    assert pick["usd_per_hour"] == pytest.approx(0.53)


def test_several_nodes_are_spot_machines_too(made_up: dict[str, Any]) -> None:
    pick = made_up["train-multinode.yaml"]
    assert pick["spot"]
    assert pick["nodes"] == 2


def test_every_cloud_has_a_machine_for_train(sky_says: RealSky, tmp_path: Path) -> None:
    """Also those without spot, unless spot was asked for: then it is said what to leave out."""
    clouds = ("aws", "gcp", "azure", "lambda", "nebius")
    wants = [
        (yaml.safe_load((TASKS / name).read_text())["resources"], cloud, None) for name in TRAIN for cloud in clouds
    ]
    *found, refused = ask(
        sky_says, lay_catalog(tmp_path), OFFER, json.dumps([*wants, (wants[0][0], "lambda", True)]), clouds=clouds
    )
    expected = [("aws", "A10G:1"), ("gcp", "L4:1"), ("azure", "A10:1"), ("lambda", "A10:1"), ("nebius", "H100:1")]
    assert [(one["infra"], one["gpus"]) for one in found] == expected * 2
    assert [one["spot"] for one in found] == [True, True, True, False, True] * 2
    on_lambda = found[3]
    assert on_lambda["notes"] == ["lambda has no spot machines for this: on demand instead"]
    assert "use_spot" not in on_lambda["resources"]
    assert refused == "--use-spot: lambda has no spot machines (--no-use-spot)"


def test_each_alternative_says_whether_it_is_spot(sky_says: RealSky, tmp_path: Path) -> None:
    spot, on_demand = {"accelerators": "L4:1", "use_spot": True}, {"accelerators": "A10G:1", "use_spot": False}
    dear_first = {"accelerators": "L4:1", "infra": "aws"}
    wants = [
        ({"use_spot": False, "any_of": [spot, on_demand]}, "any", None),
        ({"use_spot": True, "ordered": [on_demand, spot]}, "any", None),
        ({"use_spot": True, "ordered": [dear_first, {"accelerators": "L4:1", "infra": "gcp"}]}, "any", None),
    ]
    either, in_order, placed = ask(sky_says, lay_catalog(tmp_path), OFFER, json.dumps(wants))
    assert (either["gpus"], either["spot"], either["kinds"]) == ("L4:1", True, [False, True])
    assert (in_order["gpus"], in_order["spot"], in_order["kinds"]) == ("A10G:1", False, [False, True])
    assert (placed["infra"], placed["kinds"]) == ("aws", [True])
    for one in (either, in_order):
        assert {("aws", "L4:1", True), ("aws", "A10G:1", False)} <= {tuple(row) for row in one["rows"]}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real catalog is not part of this repository")
def test_real_prices(sky_says: RealSky, tmp_path: Path) -> None:
    catalog = tmp_path / ".sky" / "catalogs" / "v8"
    shutil.copytree(REAL, catalog, copy_function=shutil.copyfile)
    for folder in (catalog, *catalog.iterdir()):
        folder.chmod(0o755)
    found = picks(sky_says, tmp_path, ["dev.yaml", "train.yaml", "train-multinode.yaml"])
    for name in TRAIN:
        assert found[name]["spot"], found[name]
    assert not found["dev.yaml"]["spot"]
    assert found["train.yaml"]["usd_per_hour"] < found["dev.yaml"]["usd_per_hour"] < 0.8
