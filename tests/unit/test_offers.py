"""Which machine SkyPilot picks for a task: its own optimizer over price rows, with AWS and GCP enabled.

The optimizer runs in a process of its own, with a HOME of its own, where the catalog lies as files and two clouds are
noted as enabled, as ``sky check`` notes them; nothing of SkyPilot is replaced.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

TASKS = Path(__file__).parents[2] / "tasks"
REAL = Path(__file__).parents[3] / "shared" / "catalog" / "v8"
AWS = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch"
)
GCP = "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice"
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
        "T4,\"['AWS', 'GCP']\"",
    ],
}
PICK = """
import json, sys, yaml, sky
from sky import global_user_state, optimizer
from sky.clouds import cloud
for capability in (cloud.CloudCapability.COMPUTE, cloud.CloudCapability.STORAGE):
    global_user_state.set_enabled_clouds(["aws", "gcp"], capability, "default")
global_user_state.set_allowed_clouds(["aws", "gcp"], "default")
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


def picks(home: Path, names: list[str]) -> dict[str, Any]:
    """What SkyPilot's optimizer picks for each task, with the catalog that lies in ``home``."""
    config = {"allowed_clouds": ["aws", "gcp"]}
    (home / ".sky").mkdir(exist_ok=True)
    (home / ".sky" / "config.yaml").write_text(yaml.safe_dump(config))
    environ = {**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [sys.executable, "-c", PICK, *(str(TASKS / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=home, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {Path(path).name: pick for path, pick in found.items()}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("sky")
    for name, lines in ROWS.items():
        path = home / ".sky" / "catalogs" / "v8" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return picks(home, ["dev.yaml", "train.yaml", "train-multinode.yaml"])


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


@pytest.mark.skipif(not REAL.is_dir(), reason="the real catalog is not part of this repository")
def test_real_prices(tmp_path: Path) -> None:
    catalog = tmp_path / ".sky" / "catalogs" / "v8"
    shutil.copytree(REAL, catalog, copy_function=shutil.copyfile)
    for folder in (catalog, *catalog.iterdir()):
        folder.chmod(0o755)
    found = picks(tmp_path, ["dev.yaml", "train.yaml", "train-multinode.yaml"])
    for name in ("train.yaml", "train-multinode.yaml"):
        assert found[name]["spot"], found[name]
    assert not found["dev.yaml"]["spot"]
    assert found["train.yaml"]["usd_per_hour"] < found["dev.yaml"]["usd_per_hour"] < 0.8
