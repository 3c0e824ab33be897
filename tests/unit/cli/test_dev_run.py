"""``spotune dev run`` on a cluster: where it runs, and what ends it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest

from spotune.cli import main
from spotune.launch.skypilot import jobs
from tests.commands import cli_runner
from tests.unit.launch.skypilot.fake_sky import FakeSky, sky

__all__ = ["sky"]
ROOT = Path(__file__).parents[3]
CONFIG = "config/runs/demo.yaml"


@pytest.fixture
def dev_run(sky: FakeSky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., click.testing.Result]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SPOTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPOTUNE_USER", "ada")
    monkeypatch.delenv("SPOTUNE_BUCKET", raising=False)
    monkeypatch.setattr(jobs, "WAITS_S", (0, 0))
    monkeypatch.setattr("spotune.launch.skypilot.clusters.book_names", lambda *_: None)

    def run(*words: str) -> click.testing.Result:
        return cli_runner().invoke(main, ["dev", "run", CONFIG, *words])

    return run


def raises(error: BaseException) -> Callable[[Any], int]:
    def look(_: Any) -> int:
        raise error

    return look


def test_trouble_with_the_log_ends_no_run(sky: FakeSky, dev_run: Callable[..., click.testing.Result]) -> None:
    sky.add("dev")
    sky.tells = [raises(OSError("reset"))] * 3
    done = dev_run("-c", "dev")
    assert done.exit_code == 3
    assert "may go on" in done.stderr
    assert sky.asked("cancel") == []


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 1)])
def test_ctrl_c_ends_it(
    sky: FakeSky, dev_run: Callable[..., click.testing.Result], error: BaseException, code: int
) -> None:
    sky.add("dev")
    sky.tells = [raises(error)]
    done = dev_run("-c", "dev", "--name", "mine")
    assert (done.exit_code, sky.asked("cancel")) == (code, [([1],)])
    assert "mine: stopped" in done.stderr


def test_ctrl_c_while_it_is_handed_in(
    sky: FakeSky, dev_run: Callable[..., click.testing.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    sky.add("dev")
    sky.add_job("mine", "FAILED")
    get = sky.get

    def interrupted(answer: Any) -> Any:
        if answer == (2, None):  # what `exec` answers: the job is in the queue
            sky.jobs[-1].status.value = "PENDING"
            raise KeyboardInterrupt
        return get(answer)

    monkeypatch.setattr(sky, "get", interrupted)
    assert dev_run("-c", "dev", "--name", "mine").exit_code == 130
    assert sky.asked("api_cancel") == [()]
    assert sky.asked("cancel") == [([2],)]


def test_a_cluster_elsewhere(sky: FakeSky, dev_run: Callable[..., click.testing.Result]) -> None:
    sky.add("dev-ada", cloud="GCP")
    done = dev_run("--infra", "aws")
    assert (done.exit_code, sky.calls) == (2, [])
    says = "--infra: dev-ada is on gcp/somewhere, not on aws (another -c NAME, or spotune dev down dev-ada)\n"
    assert done.stderr == says
    assert dev_run("--infra", "gcp").exit_code == 0
    assert dev_run("--infra", "any").exit_code == 0


def test_the_settings_place_is_no_command(
    sky: FakeSky, dev_run: Callable[..., click.testing.Result], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.yaml").write_text("infra: aws\n")
    sky.add("dev-ada", cloud="GCP")
    done = dev_run()
    assert done.exit_code == 0
    assert "dev-ada is on gcp/somewhere, not on aws\n" in done.stderr


def test_one_that_is_not_there_is_brought_up(
    sky: FakeSky, dev_run: Callable[..., click.testing.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf")
    done = dev_run("--infra", "any", "--gpus", "L4:1", "--share", "0.5", "--secret", "HF_TOKEN")
    assert done.exit_code == 0, done.stderr
    ((launched, _),) = sky.asked("launch")
    assert launched["resources"]["accelerators"] == "L4:1", "a cluster's GPUs are whole"
    assert "infra" not in launched["resources"]
    _, run = (task for (task,) in sky.asked("exec"))
    assert run["resources"]["accelerators"] == "L4:0.5"
    assert launched["secrets"] == run["secrets"] == {"HF_TOKEN": "hf"}
    assert "hf" not in run["envs"].values()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--infra", "slurm/lab", "--gpus", "L4:1", "--share", "0.5"], "--share: Slurm hands out whole GPUs"),
        (["--infra", "awss"], "--infra: 'awss' is not a known infrastructure (did you mean aws?)"),
        (["--infra", "any"], "SPOTUNE_BUCKET: machines of any cannot see file:///nowhere"),
    ],
)
def test_nothing_is_paid_for_what_cannot_run(
    sky: FakeSky,
    dev_run: Callable[..., click.testing.Result],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    says: str,
) -> None:
    monkeypatch.setenv("SPOTUNE_BUCKET", "file:///nowhere")
    done = dev_run(*words)
    assert (done.exit_code, done.stderr.startswith(says), sky.calls) == (2, True, []), done.stderr
