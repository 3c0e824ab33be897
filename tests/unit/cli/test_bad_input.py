"""Every kind of bad input on the launcher's side: one clear line on stderr, nothing on stdout, exit code 2."""

import errno
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from spotune.core import config
from spotune.core.environment import RunEnvironment
from tests.unit.project import Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path / "project", monkeypatch)


TRAIN = ["train", "run.yaml", "-y", "-d"]
COMMAND_LINES = {
    "no verb of that name": (["trian", "x"], "No such command 'trian'. (did you mean train?)\n"),
    "nothing like a verb": (["zzz"], "No such command 'zzz'. (spotune --help)\n"),
    "no run": (["logs"], "Missing argument 'RUN'. (spotune logs --help)\n"),
    "a word too many": (["queue", "x"], "Got unexpected extra argument (x) (spotune queue --help)\n"),
    "unknown option": (["train", "run.yaml", "--spot"], "--spot"),
    "no config": (["train", "-y"], "needs a config"),
    "config and --from": ([*TRAIN, "--from", "x"], "not both"),
    "no such config": (["train", "nothing.yaml", "-y"], "nothing.yaml: no such file"),
    "unknown profile": ([*TRAIN, "--profile", "prd"], "profiles: no profile 'prd' (one of dev, prod)"),
    "--set without =": ([*TRAIN, "--set", "max_steps"], "--set: 'max_steps' is not key=value"),
    "--set of an unknown key": ([*TRAIN, "--set", "max_step=3"], "max_step: unknown key (did you mean max_steps?)"),
    "--set of the wrong kind": ([*TRAIN, "--set", "max_steps=many"], "max_steps: 'many' is not a whole number"),
    "a secret in the config": ([*TRAIN, "--set", "hub_token=hf_x"], "hub_token: a secret would be written to run.json"),
    "no adapter to merge": ([*TRAIN, "--set", "merge_adapter=true"], "merge_adapter: this config trains no adapter"),
    "no name on the hub": ([*TRAIN, "--set", "hub_model_id=a/b/c"], "hub_model_id: 'a/b/c' is no name on the hub"),
    "bad name": ([*TRAIN, "--name", "Not_An_Id"], "--name: 'Not_An_Id' is not a run id"),
    "name too long": ([*TRAIN, "--name", "a" * 26], "--name:"),
    "unknown infra": ([*TRAIN, "--infra", "moon"], "--infra: 'moon' is not a known infrastructure"),
    "an infra that does not see the bucket": ([*TRAIN, "--infra", "aws"], "SPOTUNE_BUCKET: machines of aws cannot see"),
    "bad --gpus": ([*TRAIN, "--gpus", "4x"], "--gpus: '4x' is not an accelerator (L4:1)"),
    "--gpus without end": ([*TRAIN, "--gpus", f"L4:{'9' * 5000}"], "--gpus: 'L4:999"),
    "--gpus of none": ([*TRAIN, "--gpus", "L4:00"], "--gpus: 'L4:00' is not an accelerator (L4:1)"),
    "priority out of range": ([*TRAIN, "--priority", "1001"], "--priority: 1001 is out of range"),
    "priority not a number": ([*TRAIN, "--priority", "high"], "--priority"),
    "two machines": ([*TRAIN, "--num-nodes", "2"], "--num-nodes: local is one machine"),
    "no machine": ([*TRAIN, "--num-nodes", "0"], "--num-nodes: 0 is not a number of machines"),
    "bad --stall-after": ([*TRAIN, "--stall-after", "never"], "--stall-after: 'never' is not a duration"),
    "bad --save-every": ([*TRAIN, "--save-every", "often"], "--save-every: 'often' is neither"),
    "bad --env": ([*TRAIN, "--env", "HOME"], "--env: 'HOME' is not NAME=value"),
    "--env of ours": ([*TRAIN, "--env", "SPOTUNE_RUN_ID=x"], "--env: SPOTUNE_RUN_ID is for spotune to set"),
    "--env that reads the config again": (
        [*TRAIN, "--env", "SPOTUNE_ALLOW_CONFIG_CHANGE=1"],
        "--env: SPOTUNE_ALLOW_CONFIG_CHANGE is for spotune to set",
    ),
    "--env of ours on a cluster": (
        ["dev", "run", "run.yaml", "--cluster", "dev", "--env", "SPOTUNE_RUN_ID=x"],
        "--env: SPOTUNE_RUN_ID is for spotune to set",
    ),
    "unset secret": ([*TRAIN, "--secret", "NO_SUCH_TOKEN"], "--secret: NO_SUCH_TOKEN is not set here"),
    "secret with a value": ([*TRAIN, "--secret", "TOKEN=x"], "--secret: takes a name"),
    "--save-every of a superscript": ([*TRAIN, "--save-every", "²"], "--save-every: '²' is neither"),
    "--save-every without end": ([*TRAIN, "--save-every", "9" * 5000], "--save-every: '999"),
    "a budget without end": ([*TRAIN, "--budget", "1e308"], "--budget: '1e308' is no amount"),
    "a seed without end": ([*TRAIN, "--set", f"seed={'9' * 400}"], "seed: 999"),
    "--cpus of no number": ([*TRAIN, "--cpus", "abc"], "--cpus: 'abc' is not an amount (4, or 4+)"),
    "--cpus below zero": ([*TRAIN, "--cpus=-4"], "--cpus: '-4' is not an amount"),
    "--memory of no number": ([*TRAIN, "--memory", "nan"], "--memory: 'nan' is not an amount"),
    "no such preemptions": ([*TRAIN, "--preemptions", "none.jsonl"], "none.jsonl: no such file"),
    "unknown run to promote": (["train", "--from", "nobody", "-y"], "nobody: no such run"),
    "unknown run to cancel": (["cancel", "nobody", "-y"], "nobody: no such run"),
    "unknown run to resume": (["resume", "nobody"], "nobody: no such run"),
    "unknown run to resume with a change": (["resume", "nobody", "--set", "max_steps=3"], "nobody: no such run"),
    "unknown run to preempt": (["preempt", "nobody", "--no-notice"], "nobody: no such run"),
    "unknown run's logs": (["logs", "nobody"], "nobody: no such run"),
    "preempt without a choice": (["preempt", "x"], "--notice 30s or --no-notice"),
    "bad notice": (["preempt", "x", "--notice", "soon"], "--notice: 'soon' is not a duration"),
    "unknown format": (["queue", "--format", "xml"], "'xml' is not one of"),
    "check of a profile of nothing": (["check", "--profile", "x"], "--profile and --set need a CONFIG"),
    "check of a change of nothing": (["check", "--set", "a"], "--profile and --set need a CONFIG"),
    "check of nothing": (["check", "nothing.yaml"], "nothing.yaml: no such file"),
    "dev run of nothing": (["dev", "run", "nothing.yaml"], "nothing.yaml: no such file"),
}


@pytest.mark.parametrize(("arguments", "says"), COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_command_lines(project: Project, arguments: list[str], says: str) -> None:
    assert_one_line(project, arguments, says)


FILES = {
    "not YAML": ("run.yaml", "a: [1", "run.yaml: line"),
    "not a mapping": ("run.yaml", "- a\n", "run.yaml: must be a mapping"),
    "empty": ("run.yaml", "", "run.yaml: must be a mapping"),
    "a key twice": ("run.yaml", "model_name_or_path: a\nmodel_name_or_path: b\n", "given twice"),
    "no model": ("run.yaml", "data: [{source: data.jsonl}]\n", "run.yaml: model_name_or_path: missing"),
    "no data": ("run.yaml", "model_name_or_path: ./model\n", "run.yaml: data: no training data"),
    "data twice": ("run.yaml", "model_name_or_path: a/b\ndata: [{source: x}]\ndataset_name: y\n", "both data and"),
    "data that is not there": (
        "run.yaml",
        "model_name_or_path: a/b\ndata: [{source: x.jsonl}]\n",
        "data[0].source: no file",
    ),
    "unknown key of data": ("run.yaml", "model_name_or_path: a/b\ndata: [{sorce: x}]\n", "data[0]"),
    "a typo": (
        "run.yaml",
        "model_name_or_path: a/b\nlearning_rat: 1\n",
        "learning_rat: unknown key (did you mean learning_rate?)",
    ),
    "a typo in a profile": (
        "run.yaml",
        "model_name_or_path: a/b\nprofiles: {prod: {max_step: 1}}\n",
        "profiles.prod: max_step",
    ),
    "no such model": (
        "run.yaml",
        "model_name_or_path: ./none\ndata: [{source: data.jsonl}]\n",
        "no such folder ./none",
    ),
    "an empty model": (
        "run.yaml",
        "model_name_or_path: ./home\ndata: [{source: data.jsonl}]\n",
        "./home holds no model",
    ),
    "settings: unknown key": (
        "config/spotune.yaml",
        "infr: local\n",
        "config/spotune.yaml: infr: unknown key (did you mean infra?)",
    ),
    "settings: slots": ("config/spotune.yaml", "local: {slots: 0}\n", "local.slots: 0 is not a number of jobs"),
    "settings: price": ("config/spotune.yaml", "local: {prices: {cpu: {spot: 1}}}\n", "local.prices.cpu.on_demand"),
    "settings: nice": ("config/spotune.yaml", "slurm: {nice: -1}\n", "slurm.nice: -1 is not a number from 0 on"),
    "settings: month": ("config/spotune.yaml", "budgets: {users: {ana: x}}\n", "budgets.users.ana: 'x' is not dollars"),
    "own settings": ("home/config.yaml", "bucket: here\n", "home/config.yaml: bucket: 'here' is not a bucket"),
    "own settings: infra": (
        "home/config.yaml",
        "infra: nope\n",
        "home/config.yaml: infra: 'nope' is not a known infra",
    ),
    "own settings: a list": (
        "home/config.yaml",
        "- a\n",
        "home/config.yaml: must be a mapping of keys to values (infra:",
    ),
    "settings: no end of slots": ("config/spotune.yaml", "local: {slots: 99999999999999999999}\n", "local.slots: 9999"),
    "a value of any length": (
        "run.yaml",
        f"model_name_or_path: a/b\nseed: [{'1, ' * 9000}]\n",
        "seed: [1, 1, 1, 1, 1, 1, ...] is not a whole",
    ),
    "a value of more digits than Python writes": (
        "run.yaml",
        f"model_name_or_path: a/b\nenv: {{A: 0x{'f' * 9000}}}\n",
        "run.yaml: env.A: a number of thousands of digits is too large",
    ),
    "a key of any length": ("run.yaml", f"{'k' * 900}: 1\n", "kkk: unknown key"),
    "aliases of aliases": (
        "run.yaml",
        "model_name_or_path: a/b\n"
        + "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9)),
        "k5: more than 100,000 values (fewer aliases of aliases)",
    ),
    "data that holds itself": ("run.yaml", "model_name_or_path: a/b\nenv: &e {A: *e}\n", "env.A: holds itself"),
    "an environment of ours": (
        "run.yaml",
        "model_name_or_path: a/b\ndata: [{source: data.jsonl}]\nenv: {SPOTUNE_HOME: x}\n",
        "env.SPOTUNE_HOME: is for spotune to set",
    ),
    "an environment of lists": (
        "run.yaml",
        "model_name_or_path: a/b\ndata: [{source: data.jsonl}]\nenv: {A: [1]}\n",
        "run.yaml: env.A: [1] is not text",
    ),
    "no name of the environment": (
        "run.yaml",
        "model_name_or_path: a/b\ndata: [{source: data.jsonl}]\nenv: {'A B': x}\n",
        "env.A B: is not the name of an environment variable",
    ),
    "a weight without end": (
        "run.yaml",
        f"model_name_or_path: a/b\ndata: [{{source: data.jsonl, weight: {'9' * 400}}}]\n",
        "data[0].weight: 999",
    ),
    "a source that is too long": (
        "run.yaml",
        f"model_name_or_path: a/b\ndata: [{{source: {'x' * 5000}}}]\n",
        "run.yaml: data[0].source: no file matches xxx",
    ),
    "a model that is too long": (
        "run.yaml",
        f"model_name_or_path: {'x' * 300}\ndata: [{{source: data.jsonl}}]\n",
        "run.yaml: model_name_or_path: 'xxx",
    ),
    "task without run": ("tasks/train.yaml", "name: x\n", "tasks/train.yaml: run: a task needs commands"),
    "task: accelerators": (
        "tasks/train.yaml",
        "run: x\nresources: {accelerators: '4'}\n",
        "resources.accelerators: '4'",
    ),
    "task: accelerators without end": (
        "tasks/train.yaml",
        f"run: x\nresources: {{accelerators: 'L4:{'9' * 5000}'}}\n",
        "resources.accelerators: 'L4:999",
    ),
    "task: empty": ("tasks/train.yaml", "", "train.yaml: must be a mapping of keys to values (run: "),
    **{
        f"task: {text}": ("tasks/train.yaml", f"run: x\n{text}\n", f"tasks/train.yaml: {says}")
        for text, says in (
            ("resources: {accelerators: {L4: x}}", "resources.accelerators.L4: 'x' is not a whole number"),
            ("resources: {accelerators: 'L4:00'}", "resources.accelerators: 'L4:00' is not an accelerator (L4:1)"),
            ("resources: {accelerators: {L4: 0}}", "resources.accelerators: 'L4:0' is not an accelerator (L4:1)"),
            ("resources: {accelerators: {L4: [1]}}", "resources.accelerators.L4: [1] is not"),
            ("resources: {accelerators: {L4: .inf}}", "resources.accelerators.L4: inf is not"),
            ("resources: {any_of: 5}", "resources.any_of: must be a list"),
            ("resources: {ordered: [x]}", "resources.ordered: must be a list"),
            ("resources: {priority: .inf}", "resources.priority: inf is not"),
            ("num_nodes: .inf", "num_nodes: inf is not"),
            ("num_nodes: x", "num_nodes: 'x' is not a whole number"),
            (
                "resources: {job_recovery: {recover_on_exit_codes: [.inf]}}",
                "resources.job_recovery.recover_on_exit_codes: inf",
            ),
            ("foo: 2026-01-01", "foo: '2026-01-01' is read as a date (quote it)"),
            ("config: &c {a: [*c]}", "config.a[0]: holds itself"),
        )
    },
    "task: not a mapping": ("tasks/train.yaml", "run: x\nenvs: [a]\n", "tasks/train.yaml: envs: must be a mapping"),
}


@pytest.mark.parametrize(("name", "text", "says"), FILES.values(), ids=FILES)
def test_files(project: Project, name: str, text: str, says: str) -> None:
    project.home.mkdir(exist_ok=True)
    project.write(name, text)
    assert_one_line(project, TRAIN, says)


@pytest.mark.parametrize("verb", [["check"], ["queue"], ["cost"], ["train", "run.yaml", "--dryrun"]], ids=" ".join)
def test_a_home_that_is_a_file(project: Project, monkeypatch: pytest.MonkeyPatch, verb: list[str]) -> None:
    for below in ("", "/below/it"):
        monkeypatch.setenv("SPOTUNE_HOME", f"{project.folder}/run.yaml{below}")
        assert_one_line(project, verb, f"SPOTUNE_HOME: {project.folder}/run.yaml is a file (name a folder")


PREEMPTIONS = {
    "not JSON": "at 20 s",
    "neither": '{"notice_s": 3}',
    "both": '{"after_s": 1, "at_step": 1}',
    "negative": '{"after_s": -1}',
    "not a number": '{"at_step": "ten"}',
    "unknown key": '{"after_s": 1, "notice": 3}',
    "not an object": "[20]",
    "brackets without end": "[" * 100_000,
    "a number without end": f'{{"after_s": {"9" * 400}}}',
}


@pytest.mark.parametrize("line", PREEMPTIONS.values(), ids=PREEMPTIONS)
def test_preemptions(project: Project, line: str) -> None:
    project.write("plan.jsonl", '{"after_s": 20, "notice_s": 0}\n' + line + "\n")
    assert_one_line(project, [*TRAIN, "--preemptions", "plan.jsonl"], "plan.jsonl: line 2: ")


def test_a_model_that_is_here_and_no_folder_is_not_of_the_hub(project: Project) -> None:
    os.mkfifo(project.folder / "pipe.jsonl")
    (project.folder / "loop").symlink_to("loop")
    for name in ("pipe.jsonl", "loop"):
        arguments = [*TRAIN, "--set", f"model_name_or_path={name}"]
        assert_one_line(project, arguments, f"model_name_or_path: {name} is not a folder (a hub id or a folder)")


def test_a_disk_that_fails_is_the_machines(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, **_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(config, "read_yaml", read)
    result = project.run("check", "run.yaml")
    assert (result.exit_code, result.stderr) == (3, "run.yaml: Input/output error\n")


def test_environment(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for bucket in ("here", "file://relative/path", "ftp://x/y", "s3://"):
        monkeypatch.setenv("SPOTUNE_BUCKET", bucket)
        assert_one_line(project, TRAIN, "SPOTUNE_BUCKET: ")


def test_a_home_that_cannot_be(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTUNE_HOME", f"/{'h' * 300}")
    assert_one_line(project, TRAIN, "SPOTUNE_HOME: ")


@pytest.mark.parametrize("text", ["", "\n", "# budgets: see the wiki\n"])
def test_settings_may_say_nothing(project: Project, text: str) -> None:
    project.home.mkdir(exist_ok=True)
    project.write("config/spotune.yaml", text)
    project.write("home/config.yaml", text)
    result = project.run("queue")
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ["config/spotune.yaml", "home/config.yaml"])
def test_settings_that_cannot_be_read(project: Project, name: str) -> None:
    path = project.folder / name
    path.mkdir(parents=True)
    assert_one_line(project, TRAIN, f"{name}: is a folder (name a plain file)")
    path.rmdir()
    path.symlink_to("nowhere")
    assert_one_line(project, TRAIN, f"{name}: no such file")


def test_an_attempt_that_is_no_number() -> None:
    assert RunEnvironment.read({"SPOTUNE_ATTEMPT": "²"}).attempt == 1


def test_a_store_that_is_away(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infrastructure, no bad input: a machine on which it is met makes room for another one."""

    def info(self: object, path: str, **_: object) -> dict[str, Any]:
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.info", info)
    project.write("run.yaml", "model_name_or_path: ./model\ndata: [{source: memory://b/x.jsonl}]\n")
    result = project.run(*TRAIN)
    assert (result.exit_code, result.stdout) == (3, "")
    says = "run.yaml: data[0].source: cannot reach memory://b/x.jsonl: nobody listens ("
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("source", ["away://b/x.jsonl", "away://b/*.jsonl"])
def test_a_store_that_cannot_be_reached(project: Project, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotune.core.fingerprint.PROTOCOLS", ("away",))

    class NoCredentialsError(Exception):
        """As of botocore: neither OSError nor ValueError."""

    class Away(fsspec.AbstractFileSystem):
        protocol = "away"

        def info(self, path: str, **_: object) -> dict[str, Any]:
            raise NoCredentialsError("Unable to locate credentials")

    fsspec.register_implementation("away", Away, clobber=True)
    project.write("run.yaml", f"model_name_or_path: ./model\ndata: [{{source: '{source}'}}]\n")
    says = f"run.yaml: data[0].source: cannot reach {source}: Unable to locate credentials (is the name right"
    assert_one_line(project, TRAIN, says)


CHANGES = {
    "without =": ("max_steps", "--set: 'max_steps' is not key=value"),
    "an unknown key": ("max_step=3", "run-a: max_step: unknown key (did you mean max_steps?)"),
    "the wrong kind": ("max_steps=many", "run-a: max_steps: 'many' is not a whole number"),
    "no steps": ("max_steps=0", "run-a: max_steps: 0 steps train nothing"),
    "no model": ("model_name_or_path=./none", "no such folder ./none"),
    "no data": ("data=[{source: none.jsonl}]", "data[0].source: no file matches none.jsonl"),
    "both kinds of data": ("dataset_name=x", "run-a: data: both data and dataset_name are given"),
}


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_changes_of_a_run(project: Project, change: str, says: str) -> None:
    project.submit()
    project.run("cancel", "run-a", "-y")
    project.infra.submissions.clear()
    assert_one_line(project, ["resume", "run-a", "--set", change, "--allow-config-change"], says)
    assert not project.store.keys("runs/run-a/revisions")


def assert_one_line(project: Project, arguments: list[str], says: str) -> None:
    result = project.run(*arguments)
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert not project.infra.submissions
