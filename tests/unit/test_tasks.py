"""Task YAMLs are plain SkyPilot tasks: SkyPilot itself reads them, in a process of its own (it imports for seconds)."""

import json
import subprocess
import sys
from pathlib import Path

TASKS = Path(__file__).parents[2] / "tasks"
READ = """
import json, sys, yaml, sky
found = {}
for path in sys.argv[1:]:
    config = yaml.safe_load(open(path))
    task = sky.Task.from_yaml_config(config, env_overrides=[("SPOTUNE_BUCKET", "s3://bucket/x")])
    recovery = [resources.job_recovery for resources in task.resources]
    found[path] = {"name": task.name, "envs": task.envs, "recovery": recovery, "run": task.run}
print(json.dumps(found))
"""


def test_skypilot_takes_them(tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(TASKS.glob("*.yaml"))]
    environ = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths], env=environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    train = found[str(TASKS / "train.yaml")]
    assert train["envs"]["SPOTUNE_BUCKET"] == "s3://bucket/x"
    assert all(recovery["recover_on_exit_codes"] == [75] for recovery in train["recovery"])
    assert "python" in train["run"]


def test_each_names_its_own_command_first() -> None:
    for path in TASKS.glob("*.yaml"):
        comment = path.read_text().split("\n\n", 1)[0]
        assert f"tasks/{path.name}" in comment
        assert "sky " in comment
