"""What a run takes from elsewhere, as ``train``, ``train --from`` and ``resume`` show it, and when they ask."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from spotune import cli
from spotune.core.keys import Keys
from spotune.core.records import RunRecord
from spotune.launch import origins
from tests.unit.project import CONFIG, Project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(tmp_path / "project", monkeypatch)


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def plan_of(project: Project, *arguments: str) -> list[str]:
    result = project.run("train", *(arguments or ("run.yaml",)), "--dryrun")
    assert result.exit_code == 0, result.stderr
    return lines_of(result.stdout)


def revised_by_eva(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """run-a of ada, stopped, with another learning rate by eva, stopped again."""
    project.submit()
    with monkeypatch.context() as eva:
        project.run("cancel", "run-a", "-y")
        eva.setenv("SPOTUNE_USER", "eva")
        done = project.run("resume", "run-a", "--set", "learning_rate=2e-3", "--allow-config-change")
        assert done.exit_code == 0, done.stderr
        project.run("cancel", "run-a", "-y")
    project.infra.calls.clear()


def test_overrides_env_and_remote_code_are_listed_and_secrets_hidden(project: Project) -> None:
    config = CONFIG + "trust_remote_code: true\nenv: {NCCL_DEBUG: INFO, MY_TOKEN: abc, LD_PRELOAD: a.so}\n"
    project.write("run.yaml", config)
    arguments = ("run.yaml", "--set", "learning_rate=1e-4", "--allow-env", "LD_PRELOAD")
    plan = plan_of(project, *arguments)
    assert "override learning_rate=1e-4" in plan
    assert "env NCCL_DEBUG=INFO" in plan
    assert "env MY_TOKEN=(hidden)" in plan
    assert "env LD_PRELOAD=a.so (--allow-env: it decides what the loader loads)" in plan
    assert "remote code trust_remote_code: Python files that come with ./model run on the machine" in plan
    takes = project.json("train", *arguments, "--dryrun")["takes"]
    assert {"kind": "env", "what": "NCCL_DEBUG=INFO", "by": "", "at": 0.0} in takes
    refused = project.run("train", "run.yaml", "--dryrun")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "run.yaml: env.LD_PRELOAD: decides what the loader loads" in refused.stderr


@pytest.mark.parametrize(
    ("written", "shown"),
    {
        "attn_implementation: org/kernel@v1": "remote code attn_implementation: the kernel org/kernel@v1 of the hub",
        "attn_implementation: paged|org/kernel:f": "remote code attn_implementation: the kernel paged|org/kernel:f of",
        "model_init_kwargs: {attn_implementation: {text_config: a/b}}": "remote code model_init_kwargs.attn_",
        "model_init_kwargs: '{\"use_kernels\": true}'": "remote code model_init_kwargs.use_kernels: kernels",
        "model_init_kwargs: {kernel_config: {a: b}}": "remote code model_init_kwargs.kernel_config: kernels of the hub",
        "model_init_kwargs: {revision: v2}": "takes from model_init_kwargs.revision=v2: model",
        "model_init_kwargs: {adapter_kwargs: {revision: v3}}": "model_init_kwargs.adapter_kwargs.revision=v3: model",
    }.items(),
)
def test_kernels_and_revisions_are_listed(project: Project, written: str, shown: str) -> None:
    project.write("run.yaml", f"{CONFIG}{written}\n")
    assert shown in "\n".join(plan_of(project))


def test_attention_without_a_kernel_of_the_hub_is_not_listed(project: Project) -> None:
    project.write("run.yaml", CONFIG + "attn_implementation: sdpa\nmodel_init_kwargs: {use_kernels: false}\n")
    assert project.json("train", "run.yaml", "--dryrun")["takes"] == []


def test_a_run_of_ones_own_takes_nothing(project: Project) -> None:
    kinds = {line.split()[0] for line in plan_of(project) if line}
    assert not kinds & {"override", "env", "remote", "takes", "revision"}
    assert project.json("train", "run.yaml", "--dryrun")["takes"] == []


def test_a_model_of_the_hub_is_its_organisations(project: Project) -> None:
    project.write("run.yaml", CONFIG.replace("./model", "org/name"))
    assert "takes from hf://org/name@main by org: model" in plan_of(project)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_files_of_another_user_are_named(project: Project) -> None:
    os.chown(project.folder / "data.jsonl", 54321, 54321)
    os.chown(project.folder / "model/config.json", 54321, 54321)
    project.write("theirs/config.json", "{}")
    os.chown(project.folder / "theirs", 54321, 54321)
    project.write("model/adapter_config.json", '{"base_model_name_or_path": "theirs"}')
    keys = ("deepspeed", "fsdp_config", "accelerator_config")
    for key in keys:
        os.chown(project.write(f"{key}.json", "{}"), 54321, 54321)
    project.write("run.yaml", CONFIG + "".join(f"{key}: {key}.json\n" for key in keys))
    plan = plan_of(project)
    assert [f"takes from {key}.json by user 54321: {key}" in plan for key in keys] == [True] * 3
    assert "takes from ./model by user 54321: model" in plan
    assert "takes from theirs by user 54321: base model" in plan
    assert "takes from data.jsonl by user 54321: data" in plan


def test_what_lies_in_another_users_home_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eva").mkdir()
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada/link").symlink_to(tmp_path / "eva")
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    monkeypatch.setattr(origins, "_homes", lambda: iter([str(tmp_path / "ada"), str(tmp_path / "eva")]))
    assert [origins.owner_of(tmp_path / name) for name in ("eva", "ada/link", "ada", "gone")] == ["eva", "eva", "", ""]


def test_the_result_of_another_users_run_is_theirs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as eva:
        eva.setenv("SPOTUNE_USER", "eva")
        project.submit("run-b")
    output = project.home / "bucket/runs/run-b/output"
    output.mkdir()
    (output / "config.json").write_text("{}")
    project.write("run.yaml", CONFIG.replace("./model", str(output)))
    assert "takes from run-b by eva: model" in plan_of(project)


def test_a_mates_folder_is_neither_waited_for_nor_read_without_end(project: Project, tmp_path: Path) -> None:
    project.submit()
    project.run("cancel", "run-a", "-y")
    model = project.folder / "model"
    os.mkfifo(model / "adapter_config.json")
    for verb in (("train", "run.yaml", "--dryrun"), ("resume", "run-a", "-y"), ("check", "run.yaml")):
        refused = project.run(*verb)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), verb
        assert "adapter_config.json: is a FIFO" in refused.stderr
    (model / "adapter_config.json").unlink()
    mates = tmp_path / "bucket/runs/run-z/export"
    mates.parent.mkdir(parents=True)
    model.rename(mates)
    project.write("run.yaml", CONFIG.replace("./model", str(mates)))
    record = mates.parent / "run.json"
    os.mkfifo(record)
    assert "run.json: is a FIFO" in project.run("train", "run.yaml", "--dryrun").stderr
    record.unlink()
    record.symlink_to("/dev/zero")
    assert "run.json: is a device" in project.run("train", "run.yaml", "--dryrun").stderr
    record.unlink()
    record.write_text("[" * 100_000)
    assert "run.json: cannot be read: not JSON" in project.run("train", "run.yaml", "--dryrun").stderr


def test_a_run_that_another_user_revised_is_resumed_only_when_agreed(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    revised_by_eva(project, monkeypatch)
    refused = project.run("resume", "run-a")
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith("run-a: was revised by eva: revision 1 by eva, ")
    assert refused.stderr.endswith("learning_rate: 1e-3 -> 2e-3 (add -y to go on with it)\n")
    assert project.store.exists(Keys("run-a").cancelled)
    assert project.infra.calls == []
    monkeypatch.setattr(cli, "can_ask", lambda: True)
    asked = project.run("resume", "run-a", input="n\n")
    assert asked.exit_code == 1
    assert project.infra.calls == []
    said = lines_of(asked.stderr)
    assert any(line.startswith("revision 1 by eva, ") and "learning_rate: 1e-3 -> 2e-3" in line for line in said)
    assert said[-1] == "Go on with run-a as eva revised it. Proceed? [Y/n]"
    assert project.run("resume", "run-a", input="y\n").exit_code == 0
    assert ("resume", "run-a") in project.infra.calls


def test_yes_or_a_word_of_ones_own_since_is_enough(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    revised_by_eva(project, monkeypatch)
    done = project.run("resume", "run-a", "-y", "--set", "max_steps=40")
    assert done.exit_code == 0, done.stderr
    assert any(line.startswith("revision 1 by eva") for line in lines_of(done.stderr))
    project.run("cancel", "run-a", "-y")
    again = project.run("resume", "run-a")  # ada has revised it since: what eva did was seen then
    assert again.exit_code == 0, again.stderr


def test_resume_of_another_users_run_says_whose_it_is(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.submit()
    project.run("cancel", "run-a", "-y")
    monkeypatch.setenv("SPOTUNE_USER", "eva")
    done = project.run("resume", "run-a")
    assert done.exit_code == 0, done.stderr
    assert "takes from run-a by ada: its config, data, model and checkpoints" in lines_of(done.stderr)


@pytest.mark.parametrize("train", [("run.yaml", "--name", "run-a", "--set", "max_steps=40")])
def test_train_goes_on_with_what_another_user_revised_only_when_agreed(
    project: Project, monkeypatch: pytest.MonkeyPatch, train: tuple[str, ...]
) -> None:
    revised_by_eva(project, monkeypatch)
    project.write("run.yaml", CONFIG.replace("1e-3", "2e-3"))
    plan = plan_of(project, *train)
    assert any(line.startswith("revision 1 by eva, ") for line in plan)
    refused = project.run("train", *train, "-d")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr == "run-a: goes on from what eva revised (look with --dryrun, then add -y)\n"
    assert project.run("train", *train, "-d", "-y").exit_code == 0


def test_from_shows_the_run_and_its_revision(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (("init", "-q"), ("add", "run.yaml"), ("commit", "-qm", "one")):
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@y", *words]
        subprocess.run(git, cwd=project.folder, check=True)
    with monkeypatch.context() as eva:
        eva.setenv("SPOTUNE_USER", "eva")
        project.submit()
        project.run("cancel", "run-a", "-y")
        project.run("resume", "run-a", "--set", "max_steps=40")
    plan = plan_of(project, "--from", "run-a")
    assert "takes from run-a by eva: its config, overrides, data and model" in plan
    assert any(line.startswith("revision 1 by eva, ") and line.endswith("max_steps: 9 -> 40") for line in plan)
    assert "override max_steps=40" in plan
    refused = project.run("train", "--from", "run-a", "-d")
    assert "goes on from what eva revised" in refused.stderr


def test_a_machine_is_not_given_another_name_to_allow(project: Project) -> None:
    project.submit()
    project.run("cancel", "run-a", "-y")
    project.write("run.yaml", CONFIG + "env: {LD_PRELOAD: a.so}\n")
    words = ("--name", "run-a", "-y", "-d", "--allow-config-change", "--allow-env", "LD_PRELOAD")
    refused = project.run("train", "run.yaml", *words)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("--allow-env: run-a was submitted without LD_PRELOAD")
    project.submit("run-b", "--allow-env", "LD_PRELOAD")
    assert project.infra.submissions["run-b"].task["envs"]["SPOTUNE_ALLOW_ENV"] == "LD_PRELOAD"
    project.run("cancel", "run-b", "-y")
    assert project.run("resume", "run-b", "--set", "max_steps=40").exit_code == 0


def test_a_revision_made_while_the_user_reads_is_not_gone_on_with(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    revised_by_eva(project, monkeypatch)
    keys = Keys("run-a")

    def answer(question: str, yes: bool) -> None:
        record = RunRecord.from_bytes(project.store.read(keys.revision(1)) or b"")
        project.store.create(keys.revision(2), replace(record, revision=2).to_bytes())

    monkeypatch.setattr(cli, "can_ask", lambda: True)
    monkeypatch.setattr(cli, "agree", answer)
    refused = project.run("resume", "run-a")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1] == "run-a: was changed by somebody else just now (try again)"
    assert project.infra.calls == []


def test_a_revision_hides_no_earlier_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    revised_by_eva(project, monkeypatch)
    keys = Keys("run-a")
    record = RunRecord.from_bytes(project.store.read(keys.revision(1)) or b"")
    config = {**record.config, "push_to_hub": True, "hub_model_id": "eva/theirs", "output_dir": "/home/ada/model"}
    project.store.create(keys.revision(2), replace(record, revision=2, config=config).to_bytes())
    then = replace(record, revision=3, config=config | {"weight_decay": 0.1}, revised_by="bob")
    project.store.create(keys.revision(3), then.to_bytes())
    refused = project.run("resume", "run-a")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith("run-a: was revised by eva and bob: revision 1 to 3 by eva and bob, ")
    for change in ("learning_rate: 1e-3 -> 2e-3", "weight_decay: 0.0 -> 0.1", "push_to_hub: false -> true"):
        assert change in refused.stderr
    done = project.run("resume", "run-a", "-y", "--set", "output_dir=mine")
    assert done.exit_code == 0, done.stderr
    said = [line for line in lines_of(done.stderr) if line.startswith("goes to")]
    assert said == ["goes to the hub by eva: push_to_hub", "goes to eva/theirs by eva: hub_model_id"]
    project.run("cancel", "run-a", "-y")
    again = project.run("resume", "run-a")  # ada has seen it
    assert "goes to" not in again.stderr
    assert any(line.startswith("revision 4 by ada, ") for line in lines_of(again.stderr))
