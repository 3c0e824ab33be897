"""Dev clusters, as far as SkyPilot is not asked: tests/lab does that."""

from dataclasses import replace
from pathlib import Path

import pytest

from spotune.core.errors import InputError
from spotune.core.keys import Keys
from spotune.launch.settings import Workspace
from spotune.launch.skypilot import clusters, dev
from spotune.launch.skypilot.clusters import Cluster, can_stop, check_can_stop, default_name
from spotune.launch.skypilot.dev import shared
from tests.unit.cost.cases import run

ROOT = Path(__file__).parents[4]


def workspace(tmp_path: Path, **environ: str) -> Workspace:
    return Workspace.open({"SPOTUNE_HOME": str(tmp_path / "home"), **environ}, ROOT)


def cluster(infra: str = "aws/us-east-1", gpus: int = 1) -> Cluster:
    return Cluster("dev", "UP", infra, {"L4": gpus}, 1, 0.0, 2, True)


@pytest.mark.parametrize(
    ("user", "name"), [("ada", "dev-ada"), ("Ada.Love@x", "dev-ada-love-x"), ("a" * 60, "dev-" + 26 * "a")]
)
def test_a_name_for_each_user(user: str, name: str) -> None:
    assert default_name(user) == name


def test_a_run_on_a_cluster_is_a_bare_launch(tmp_path: Path) -> None:
    options = dev.DevRunOptions(overrides=("max_steps=3", "seed=1"), save_every="5")
    task = dev.run_task("config/runs/demo.yaml", "demo-1", cluster(gpus=2), options, workspace(tmp_path))
    assert task["envs"]["SPOTUNE_PROFILE"] == "dev"
    assert task["envs"]["SPOTUNE_SAVE_EVERY"] == "5"
    assert "SPOTUNE_BUCKET" not in task["envs"]
    assert (task["envs"]["SPOTUNE_GPU_SHARE"], task["envs"]["SPOTUNE_KIND"]) == ("2", "dev")
    assert task["run"].endswith('-m spotune.sft "$SPOTUNE_CONFIG" --set max_steps=3 --set seed=1\n')
    assert "tasks/setup.sh" in task["run"]
    assert task["resources"] == {"cpus": "1+", "accelerators": "L4:2"}


def test_a_bucket_that_is_named_goes_along(tmp_path: Path) -> None:
    there = workspace(tmp_path, SPOTUNE_BUCKET="s3://bucket/x")
    task = dev.run_task("config/runs/demo.yaml", "demo-1", cluster(), dev.DevRunOptions(share=0.5), there)
    assert task["envs"]["SPOTUNE_BUCKET"] == "s3://bucket/x"
    assert task["resources"] == {"cpus": "1+", "accelerators": "L4:0.5"}
    assert task["envs"]["SPOTUNE_GPU_SHARE"] == "0.5"
    cpu = dev.run_task(
        "config/runs/demo.yaml", "demo-1", replace(cluster(), accelerators={}), dev.DevRunOptions(), there
    )
    assert "SPOTUNE_GPU_SHARE" not in cpu["envs"]


def test_a_notebook_asks_the_queue_for_no_gpu(tmp_path: Path) -> None:
    task = dev.notebook_task(20001, "t0k", {}, {"HF_TOKEN": "hf"}, workspace(tmp_path))
    assert task["name"] == "notebook"
    assert task["resources"] == {"cpus": "1+"}
    assert "setup" not in task
    assert task["run"].index("tasks/setup.sh") < task["run"].index("jupyterlab --no-browser")
    assert task["envs"]["NOTEBOOK_PORT"] == "20001"
    assert task["secrets"] == {"HF_TOKEN": "hf", "JUPYTER_TOKEN": "t0k"}
    assert "t0k" not in str(task["envs"])


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0, float("nan")])
def test_what_is_no_share(share: float) -> None:
    with pytest.raises(InputError, match="not a share of a GPU"):
        dev.DevRunOptions(share=share)


def test_slurm_shares_no_gpu() -> None:
    with pytest.raises(InputError, match="--share: Slurm hands out whole GPUs"):
        dev.run_task("c", "demo", cluster("slurm/lab/spot"), dev.DevRunOptions(share=0.5), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gpus", "share", "asked"), [("L4:1", 0.25, "L4:0.25"), ("L4:4", 0.5, "L4:2"), ("L4:2", 0.25, "L4:0.5")]
)
def test_a_share_is_of_one_gpu_or_of_whole_ones(gpus: str, share: float, asked: str) -> None:
    assert shared(gpus, share) == asked


@pytest.mark.parametrize(
    ("gpus", "says"),
    [
        ("L4:3", r"0.5 of L4:3 is 1.5 GPUs.*\(--gpus L4:1 --share 0.5, or --gpus L4:2\)"),
        ("", "there is no GPU to share"),
        ("L4:0.5", "'L4:0.5' is not an accelerator"),
    ],
)
def test_a_share_that_is_not_to_be_had(gpus: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        shared(gpus, 0.5)


def test_secrets_are_no_environment_and_shown_nowhere(tmp_path: Path) -> None:
    options = dev.DevRunOptions(secrets={"HF_TOKEN": "hf_value"})
    task = dev.run_task("config/runs/demo.yaml", "demo-1", cluster(), options, workspace(tmp_path))
    assert task["secrets"] == {"HF_TOKEN": "hf_value"}
    assert "hf_value" not in str(task["envs"]) + repr(options) + repr(dev.DevOptions("dev", secrets=options.secrets))


def test_a_bucket_that_the_cluster_cannot_see(tmp_path: Path) -> None:
    there = workspace(tmp_path, SPOTUNE_BUCKET=f"file://{tmp_path}/bucket")
    with pytest.raises(InputError, match="machines of aws/us-east-1 cannot see file://"):
        dev.run_task("config/runs/demo.yaml", "demo-1", cluster(), dev.DevRunOptions(), there)


def test_a_folder_that_no_machine_could_work_in(tmp_path: Path) -> None:
    elsewhere = Workspace.open({"SPOTUNE_HOME": str(tmp_path / "home")}, tmp_path)
    lacks = "tasks/setup.sh, Makefile, pyproject.toml, requirements-trainer.lock, src/spotune"
    says = rf"is what the machine would get, and has no {lacks} \(cd to"
    with pytest.raises(InputError, match=says):
        dev.run_task("demo.yaml", "demo-1", cluster(), dev.DevRunOptions(), elsewhere)
    with pytest.raises(InputError, match=says):
        dev.notebook_task(20001, "t0k", {}, {}, elsewhere)
    there_already = dev.DevRunOptions(envs={"SPOTUNE_PYTHON": "/opt/python"})
    assert dev.run_task("demo.yaml", "demo-1", cluster(), there_already, elsewhere)["workdir"] == str(tmp_path)


@pytest.mark.parametrize(
    ("infra", "there"), [("any", ""), ("K8s/My/Ctx", "kubernetes/My/Ctx"), ("slurm/lab", "slurm/lab")]
)
def test_a_place_is_spelt_as_skypilot_does(infra: str, there: str) -> None:
    assert dev.place(infra) == there


@pytest.mark.parametrize(("infra", "says"), [("awss", "did you mean aws"), ("local", "needs no cluster")])
def test_a_place_that_is_none(infra: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        dev.place(infra)


def test_an_idle_time_that_skypilot_cannot_count() -> None:
    with pytest.raises(InputError, match="1 is too short"):
        dev.DevOptions(name="dev", idle_minutes=1)


def test_who_can_stop() -> None:
    assert can_stop("aws/us-east-1")
    assert not can_stop("slurm/lab/spot")
    with pytest.raises(
        InputError, match=r"dev: slurm/lab cannot stop a cluster, only take it down \(spotune dev down dev\)"
    ):
        check_can_stop("slurm/lab", "spotune dev down dev", "dev")


def test_what_is_checked_before_a_run_goes_to_a_cluster(tmp_path: Path) -> None:
    there = workspace(tmp_path)
    assert dev.check_run("config/runs/demo.yaml", "mine", dev.DevRunOptions(), there) == "mine"
    outside = tmp_path / "other.yaml"
    outside.write_text((ROOT / "config/runs/demo.yaml").read_text())
    with pytest.raises(InputError, match="is not below"):
        dev.check_run(str(outside), "mine", dev.DevRunOptions(), there)
    with pytest.raises(InputError, match="notebook"):
        dev.check_run("config/runs/demo.yaml", "notebook", dev.DevRunOptions(), there)
    with pytest.raises(InputError, match="learning_rat"):
        dev.check_run("config/runs/demo.yaml", "mine", dev.DevRunOptions(overrides=("learning_rat=1",)), there)


def test_a_production_runs_name_is_none_for_a_run_on_a_cluster(tmp_path: Path) -> None:
    there = workspace(tmp_path, SPOTUNE_BUCKET=f"file://{tmp_path}/bucket")
    for kind in ("prod", "dev"):
        there.store().create(Keys(kind).run, run(run_id=kind, kind=kind).to_bytes())
    assert dev.check_run("config/runs/demo.yaml", "dev", dev.DevRunOptions(), there) == "dev"
    with pytest.raises(InputError, match=r"^--name: prod is a production run \(another --name\)$"):
        dev.check_run("config/runs/demo.yaml", "prod", dev.DevRunOptions(), there)


def test_ssh_names_its_files_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="no such cluster"):
        clusters.ssh_command("dev")
    config = tmp_path / ".sky" / "generated" / "ssh" / "dev"
    config.parent.mkdir(parents=True)
    config.write_text("Host dev\n  HostName 10.0.0.1\n  IdentityFile ~/.sky/generated/ssh-keys/dev.key\n")
    key = tmp_path / ".sky" / "generated" / "ssh-keys" / "dev.key"
    ours = ["-F", str(config), "-i", str(key), "-o", "LogLevel=ERROR"]
    assert clusters.ssh_command("dev", "-N") == ["ssh", *ours, "-N", "dev"]
