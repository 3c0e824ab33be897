"""``spotune dev``: its help is light, and what is wrong is one line before SkyPilot is asked."""

import subprocess
import sys

import pytest

from spotune.cli.dev import VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_light(verb: str) -> None:
    script = (
        "import sys\nfrom spotune.cli import main\n"
        f"try:\n main(['dev', '{verb}', '--help'])\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.__stderr__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    loaded = set(done.stderr.split())
    assert not loaded & {"sky", "rich", "spotune.launch.skypilot.client"}
    assert {name for name in loaded if name.startswith("spotune.cli.dev.")} <= {
        f"spotune.cli.dev.{verb}",
        "spotune.cli.dev",
    }


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["up", "-i", "1"], "--idle-minutes-to-autostop: 1 is too short"),
        (["up", "--infra", "awss"], "--infra: 'awss' is not a known infrastructure (did you mean aws?)"),
        (["up", "--infra", "local"], "--infra: local is this machine"),
        (["up", "--secret", "NOT_SET_HERE"], "--secret: NOT_SET_HERE is not set here (export NOT_SET_HERE=… first)"),
        (["run", "config/runs/demo.yaml", "-c", "dev", "--secret", "K=V"], "--secret: takes a name, not a value"),
        (["run", "config/runs/demo.yaml", "-c", "dev", "--infra", "local"], "--infra: local is this machine"),
        (["run", "config/runs/demo.yaml", "-c", "dev", "--gpus", "L4:3", "--share", "0.5"], "--share: 0.5 of L4:3 is"),
        (["up", "--env", "nonsense"], "--env: 'nonsense' is not NAME=value"),
        (["run", "config/runs/demo.yaml", "--share", "0.5"], "--share: runs here share a GPU without it"),
        (["run", "config/runs/demo.yaml", "-c", "dev", "--name", "X"], "--name: 'X' is not a run id"),
        (["run", "config/runs/demo.yaml", "-c", "dev", "--save-every", "abc"], "--save-every: 'abc' is neither steps"),
        (["run", "config/runs/demo.yaml", "-c", "dev", "--gpus", "L4:y"], "--gpus: 'L4:y' is not an accelerator"),
        (
            ["run", "config/runs/demo.yaml", "-c", "dev", "--set", "model_name_or_path=./nope"],
            "config/runs/demo.yaml: model_name_or_path: no such folder ./nope",
        ),
        (["notebook", "--port", "0"], "Invalid value for '--port'"),
        (["notebook", "--port", "99999999"], "Invalid value for '--port'"),
        (["notebook", "--env", "x"], "--env: 'x' is not NAME=value"),
        (["up", "--gpus", "L4:x"], "--gpus: 'L4:x' is not an accelerator (L4:1)"),
        (["up", "--cpus", "abc"], "--cpus: 'abc' is not an amount (4, or 4+)"),
        (["up", "--memory", "-1"], "--memory: '-1' is not an amount"),
        (["up", "--name", "../x"], "--name: '../x' is not a valid cluster name"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from spotune.cli import main; main()", "dev", *argv],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
