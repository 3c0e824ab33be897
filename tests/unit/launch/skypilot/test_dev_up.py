"""``dev up``: where a cluster comes to, whose it is, what is said of one that is there."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from spotune.core.errors import InfraError, InputError
from spotune.launch.settings import Workspace
from spotune.launch.skypilot import clusters, dev
from spotune.launch.skypilot.clusters import Cluster
from spotune.launch.skypilot.dev import DevOptions, differences, up
from tests.unit.launch.skypilot.fake_sky import FakeSky, sky

__all__ = ["sky"]
ROOT = Path(__file__).parents[4]


@pytest.fixture
def there(tmp_path: Path) -> Workspace:
    return Workspace.open({"SPOTUNE_HOME": str(tmp_path / "home")}, ROOT)


def test_a_place_that_skypilot_chose_and_that_cannot_stop(sky: FakeSky, there: Workspace) -> None:
    sky.cloud = "RunPod"
    done = up(DevOptions("dev"), there)
    ((_, down),) = sky.asked("launch")
    assert down, "autostop=stop would be refused only after the launch, and stay on a cluster that cannot stop"
    assert sky.asked("autostop") == [(2, True)]
    assert done.down
    assert done.notes == (
        "runpod/somewhere cannot stop this cluster: it is taken down when it is idle (as with --down)",
    )


def test_a_place_that_can_stop_does(sky: FakeSky, there: Workspace) -> None:
    done = up(DevOptions("dev"), there)
    assert sky.asked("autostop") == [(2, False)]
    assert (done.down, done.notes, done.is_new) == (False, (), True)


def test_a_machine_that_cannot_stop_where_others_can(sky: FakeSky, there: Workspace) -> None:
    sky.cannot_stop = ("AWS",)  # a spot machine, say
    done = up(DevOptions("dev"), there)
    assert sky.asked("autostop") == [(2, False), (2, True)]
    assert done.down
    assert "aws/somewhere cannot stop this cluster" in done.notes[0]


def test_a_stopped_one_stops_again(sky: FakeSky, there: Workspace) -> None:
    sky.add("dev", status=SimpleNamespace(value="STOPPED"))
    up(DevOptions("dev"), there)
    assert [down for _, down in sky.asked("launch")] == [False]


def test_what_is_launched(sky: FakeSky, there: Workspace) -> None:
    up(DevOptions("dev", "slurm/lab", "L4:1", cpus="4", secrets={"HF_TOKEN": "hf"}), there)
    ((task, _),) = sky.asked("launch")
    assert task["secrets"] == {"HF_TOKEN": "hf"}
    asked = {name: task["resources"].get(name) for name in ("infra", "accelerators", "cpus", "use_spot", "autostop")}
    assert asked == {
        "infra": "slurm/lab",
        "accelerators": "L4:1",
        "cpus": "4",
        "use_spot": None,
        "autostop": None,
    }


def test_anothers_cluster_is_refused(sky: FakeSky, there: Workspace) -> None:
    sky.add("dev-ubuntu", user="ben")
    says = (
        r"dev-ubuntu: is the cluster of another SkyPilot user, ben \(ben-hash\) \(another name: spotune dev up --name"
    )
    with pytest.raises(InputError, match=says):
        up(DevOptions("dev-ubuntu"), there)
    with pytest.raises(InputError, match="another SkyPilot user"):
        clusters.find_cluster("dev-ubuntu")
    assert not sky.calls


def test_nothing_is_launched_from_a_folder_without_the_project(sky: FakeSky, tmp_path: Path) -> None:
    elsewhere = Workspace.open({"SPOTUNE_HOME": str(tmp_path / "home")}, tmp_path)
    for envs in ({}, {"SPOTUNE_PYTHON": "/opt/python"}):
        with pytest.raises(InputError, match="has no .*src/spotune/idle.py"):
            up(DevOptions("dev", envs=envs), elsewhere)
    assert not sky.calls


@pytest.mark.parametrize("left", ["FAILED_SETUP", "CANCELLED", None])
def test_a_setup_that_failed_or_was_stopped_is_done_again(sky: FakeSky, there: Workspace, left: str | None) -> None:
    sky.add("dev")
    if left:
        sky.add_job("dev", left)
    done = up(DevOptions("dev", gpus="L4:2", envs={"A": "1"}), there)
    setup, watcher = (task for (task,) in sky.asked("exec"))
    assert (setup["name"], setup["resources"], setup["envs"]["A"]) == ("dev", {"cpus": "1+"}, "1")
    assert "tasks/setup.sh" in setup["run"]
    assert "setup" not in setup
    assert watcher["name"] == "watcher"
    assert (done.is_new, done.notes) == (False, ("dev has L4:1, not L4:2 (another --name, or dev down first)",))


def test_a_setup_under_way_is_waited_for(sky: FakeSky, there: Workspace) -> None:
    sky.add("dev")
    job = sky.add_job("dev", "SETTING_UP")
    up(DevOptions("dev"), there)
    assert sky.asked("tail_logs") == [(job,)]
    assert [task["name"] for (task,) in sky.asked("exec")] == ["watcher"]


def test_a_setup_that_fails_says_what_to_do(sky: FakeSky, there: Workspace) -> None:
    sky.tells = [lambda _: 100]
    with pytest.raises(InfraError, match="dev: its setup failed .mend it, then spotune dev up again"):
        up(DevOptions("dev"), there)


def test_one_that_is_up_and_held_is_left_alone(sky: FakeSky, there: Workspace) -> None:
    sky.add("dev")
    sky.add_job("dev")
    sky.add_job("watcher", "RUNNING")
    done = up(DevOptions("dev", gpus="L4:4"), there)
    assert not sky.calls
    assert (done.is_new, done.idle_minutes) == (False, None)
    assert done.notes == ("dev has L4:1, not L4:4 (another --name, or dev down first)",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (DevOptions("dev", gpus="l4"), []),
        (DevOptions("dev", gpus="A10G:1"), ["has L4:1, not A10G:1"]),
        (DevOptions("dev", dev.place("aws/us-east-1")), []),
        (DevOptions("dev", "aws/us-east-10"), ["is on aws/us-east-1/us-east-1a, not on aws/us-east-10"]),
        (DevOptions("dev", cpus="4+", memory="16"), []),
        (DevOptions("dev", cpus="8+", memory="32"), ["has 4 CPUs, not 8+", "has 16.0 GB of memory, not 32"]),
        (DevOptions("dev", envs={"A": "1"}), ["was set up before, without this --env"]),
        (DevOptions("dev", secrets={"A": "1"}), ["was set up before, without this --secret"]),
    ],
)
def test_what_a_cluster_that_is_there_does_not_have(options: DevOptions, says: list[str]) -> None:
    found = Cluster("dev", "UP", "aws/us-east-1/us-east-1a", {"L4": 1}, 1, 0.0, 2, True, cpus="4", memory="16.0")
    assert differences(options, found) == [f"dev {what} (another --name, or dev down first)" for what in says]


def test_kubernetes_has_two_names() -> None:
    found = Cluster("dev", "UP", "kubernetes/ctx", {}, 1, 0.0, 2, True)
    assert differences(DevOptions("dev", dev.place("k8s/ctx")), found) == []
