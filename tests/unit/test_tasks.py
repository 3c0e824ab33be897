"""Task YAMLs are plain SkyPilot tasks: SkyPilot itself reads them."""

from pathlib import Path

import pytest

from tests.real_sky import RealSky

TASKS = Path(__file__).parents[2] / "tasks"
READ = """
import json, sys, yaml, sky
from sky.provision.kubernetes import utils
found = {}
for path in sys.argv[1:]:
    given = {"env_overrides": [("SPOTUNE_BUCKET", "s3://bucket/x")], "secrets_overrides": [("HF_TOKEN", "hf_value")]}
    task = sky.Task.from_yaml_config(yaml.safe_load(open(path)), **given)
    resources = list(task.resources)
    found[path] = {
        "name": task.name, "envs": task.envs, "recovery": [one.job_recovery for one in resources], "run": task.run,
        "secrets": {name: value.get_secret_value() for name, value in task.secrets.items()},
        "must_be_given": [ref.name for ref in task.managed_secret_refs],
        "pod": utils.resolve_effective_pod_config(resources[0].cluster_config_overrides),
    }
print(json.dumps(found))
"""


@pytest.mark.xdist_group("sky")
def test_skypilot_takes_them(tmp_path: Path, sky_says: RealSky) -> None:
    found = sky_says.json(tmp_path, READ, *(str(path) for path in sorted(TASKS.glob("*.yaml"))))
    train = found[str(TASKS / "train.yaml")]
    assert train["envs"]["SPOTUNE_BUCKET"] == "s3://bucket/x"
    assert all(recovery["recover_on_exit_codes"] == [75] for recovery in train["recovery"])
    assert "python" in train["run"]
    for task in found.values():
        assert task["secrets"] == {"HF_TOKEN": "hf_value"}
        assert not task["must_be_given"]
    for name in ("train.yaml", "train-multinode.yaml"):
        assert found[str(TASKS / name)]["pod"] == {"spec": {"terminationGracePeriodSeconds": 60}}


def test_each_names_its_own_command_first() -> None:
    for path in TASKS.glob("*.yaml"):
        comment = path.read_text().split("\n\n", 1)[0]
        assert f"tasks/{path.name}" in comment
        assert "sky " in comment
