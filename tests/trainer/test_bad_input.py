"""Bad input, kind by kind: one clear line, the right exit code, nothing half-done.

Three doors: ``train`` (the launcher), ``script`` (the guard) and ``worker`` (what only the machine can know).
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from spotune.cli import main as cli
from spotune.core.environment import RunEnvironment
from spotune.core.keys import Keys
from spotune.core.protocol import Outcome
from spotune.core.store import Store
from spotune.guard.claim import RunRequest, read_or_create_run
from spotune.guard.leaving import Notices
from spotune.guard.main import main as script
from tests.commands import cli_runner
from tests.ranks import Nursery, make_folder
from tests.tiny import make_model, rows, write_jsonl

Edit = dict[str, Any] | str | bytes | None


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    make_model(folder / "model")
    make_model(folder / "mute", chat_template=None)
    make_model(folder / "unmarked", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "hollow").mkdir()
    write_jsonl(folder / "good.jsonl", rows(8))
    (folder / "empty.jsonl").write_text("")
    (folder / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    write_jsonl(folder / "nameless.jsonl", [{"title": "a"}, {"title": "b"}])
    write_jsonl(folder / "shapeless.jsonl", [*rows(1), {"messages": [{"role": "user"}]}])
    return folder


def config(material: Path, edit: Edit) -> bytes:
    if isinstance(edit, bytes):
        return edit
    if isinstance(edit, str):
        return edit.encode()
    base = {
        "model_name_or_path": str(material / "model"),
        "data": [{"source": str(material / "good.jsonl")}],
        "max_steps": 1,
        "bf16": False,
    }
    merged = {key: value for key, value in {**base, **(edit or {})}.items() if value != "DROP"}
    return yaml.safe_dump(merged).replace("MATERIAL", str(material)).replace("DATE", "2026-13-45").encode()


# what is wrong: (the config's edit, the one line)
IN_CONFIG: dict[str, tuple[Edit, str]] = {
    "not YAML": ("model: [", r"run\.yaml: line \d+: not YAML: .*"),
    "not text": (b"\xff\xfe\x00", r"run\.yaml: cannot be read: .*"),
    "empty file": ("", r"run\.yaml: must be a mapping of keys to values \(.*\)"),
    "a list": ("- a\n- b", r"run\.yaml: must be a mapping of keys to values \(.*\)"),
    "key twice": ("max_steps: 1\nmax_steps: 2", r"run\.yaml: line 2: not YAML: key 'max_steps' given twice"),
    "typo": ({"learning_rat": 1.0}, r"run\.yaml: learning_rat: unknown key \(did you mean learning_rate\?\)"),
    "removed key": ({"max_seq_length": 9}, r"run\.yaml: max_seq_length: unknown key \(.*\)"),
    "typo in a profile": (
        {"profiles": {"dev": {"max_step": 1}}},
        r"run\.yaml: profiles\.dev: max_step: unknown key \(did you mean max_steps\?\)",
    ),
    "profiles not a mapping": ({"profiles": ["dev"]}, r"run\.yaml: profiles: must map names to settings \(.*\)"),
    "not a number": ({"max_steps": "many"}, r"run\.yaml: max_steps: 'many' is not a whole number"),
    "not true or false": ({"packing": "maybe"}, r"run\.yaml: packing: 'maybe' is not true or false"),
    "a date that is none": ({"seed": "DATE"}, r"run\.yaml: not YAML: month must be in 1\.\.12"),
    "brackets without end": ("[" * 3000, r"run\.yaml: not YAML: .*recursion.*"),
    "a profile without a name": ({"profiles": {1: {"seed": 3}}}, r"run\.yaml: profiles: the name 1 is not text \(.*\)"),
    "a profile in a profile": ({"profiles": {"a": {"profiles": {}}}}, r"run\.yaml: profiles\.a\.profiles: .*"),
    "no end": ({"learning_rate": float("inf")}, r"run\.yaml: learning_rate: inf is not a number"),
    "no steps": ({"max_steps": 0}, r"run\.yaml: max_steps: 0 steps train nothing \(.*\)"),
    "a weight without end": (
        {"data": [{"source": "MATERIAL/good.jsonl", "weight": float("inf")}]},
        r"run\.yaml: data\[0\]\.weight: inf is not a number above 0",
    ),
    "a source without a name": (
        {"data": [{"source": "hf://"}]},
        r"run\.yaml: data\[0\]\.source: 'hf://' names .* \(.*\)",
    ),
    "nobody's home": (
        {"data": [{"source": "~no-such-user/x.jsonl"}]},
        r"run\.yaml: data\[0\]\.source: ~no-such-user/.*",
    ),
    "typo in columns": (
        {"data": [{"source": "MATERIAL/good.jsonl", "columns": {"mesages": "a"}}]},
        r"run\.yaml: data\[0\]\.columns\.mesages: unknown key \(one of .*\)",
    ),
    "no choice": ({"lr_scheduler_type": "saw"}, r"run\.yaml: lr_scheduler_type: 'saw' is not known \(.*linear.*\)"),
    "too small": ({"per_device_train_batch_size": 0}, r"run\.yaml: per_device_train_batch_size: 0 is too small \(.*\)"),
    "no model": ({"model_name_or_path": "DROP"}, r"run\.yaml: model_name_or_path: missing \(.*\)"),
    "no data": ({"data": "DROP"}, r"run\.yaml: data: no training data \(.*\)"),
    "data twice": ({"dataset_name": "x"}, r"run\.yaml: data: both data and dataset_name are given \(.*\)"),
    "data is text": ({"data": "good.jsonl"}, r"run\.yaml: data: 'good\.jsonl' is not a list"),
    "source missing": ({"data": [{"weight": 1}]}, r"run\.yaml: data\[0\]: needs a source \(.*\)"),
    "typo in a source": (
        {"data": [{"source": "MATERIAL/good.jsonl", "wieght": 1}]},
        r"run\.yaml: data\[0\]\.wieght: unknown key \(did you mean weight\?\)",
    ),
    "weight below zero": (
        {"data": [{"source": "MATERIAL/good.jsonl", "weight": -1}]},
        r"run\.yaml: data\[0\]\.weight: -1 is not a number above 0",
    ),
    "no such format": (
        {"data": [{"source": "MATERIAL/good.jsonl", "format": "alpaca"}]},
        r"run\.yaml: data\[0\]\.format: 'alpaca' is no format \(.*\)",
    ),
    "half a row": (
        {"data": [{"source": "MATERIAL/good.jsonl", "limit": 1.5}]},
        r"run\.yaml: data\[0\]\.limit: 1\.5 is not a whole number",
    ),
    "columns not a mapping": (
        {"data": [{"source": "MATERIAL/good.jsonl", "columns": ["a"]}]},
        r"run\.yaml: data\[0\]\.columns: must map our names to the file's \(.*\)",
    ),
    "no such file": (
        {"data": [{"source": "MATERIAL/none.jsonl"}]},
        r"run\.yaml: data\[0\]\.source: no file matches .*none\.jsonl \(.*\)",
    ),
    "nothing matches": (
        {"data": [{"source": "MATERIAL/*.parquet"}]},
        r"run\.yaml: data\[0\]\.source: no file matches .*\*\.parquet \(.*\)",
    ),
}


@pytest.mark.parametrize("kind", IN_CONFIG)
@pytest.mark.parametrize("door", ["train", "script"])
def test_in_the_config(
    door: str, kind: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    edit, line = IN_CONFIG[kind]
    (tmp_path / "run.yaml").write_bytes(config(material, edit))
    monkeypatch.chdir(tmp_path)
    expect_refusal(door, ["run.yaml"], line, monkeypatch, capsys)
    assert not list((tmp_path / "home").rglob("*.json"))


# what is wrong: (door, arguments, environment, the one line)
ELSEWHERE: dict[str, tuple[str, list[str], dict[str, str], str]] = {
    "no such config": ("train", ["none.yaml"], {}, r"none\.yaml: no such file.*"),
    "no such config, script": ("script", ["none.yaml"], {}, r"none\.yaml: no such file"),
    "no config at all": ("script", [], {}, r"command line: no config \(.*\)"),
    "no such profile": (
        "train",
        ["run.yaml", "--profile", "p"],
        {},
        r"run\.yaml: profiles: no profile 'p' \(it has none\)",
    ),
    "set without a value": ("script", ["run.yaml", "--set", "a"], {}, r"--set: 'a' is not key=value \(.*\)"),
    "set of an unknown key": ("train", ["run.yaml", "--set", "stepz=1"], {}, r"run\.yaml: stepz: unknown key \(.*\)"),
    "unknown TRL flag": ("script", ["run.yaml", "--stepz", "1"], {}, r"run\.yaml: stepz: unknown key \(.*\)"),
    "two configs": ("script", ["run.yaml", "b.yaml"], {}, r"command line: unexpected 'b\.yaml' \(.*\)"),
    "save every what": (
        "train",
        ["run.yaml", "--save-every", "soon"],
        {},
        r"--save-every: 'soon' is neither .* \(.*\)",
    ),
    "no run id": ("train", ["run.yaml", "--name", "My Run"], {}, r"--name: 'My Run' is not a run id \(.*\)"),
    "no run id, script": (
        "script",
        ["run.yaml"],
        {"SPOTUNE_RUN_ID": "X"},
        r"SPOTUNE_RUN_ID: 'X' is not a run id \(.*\)",
    ),
    "no bucket": (
        "train",
        ["run.yaml"],
        {"SPOTUNE_BUCKET": "ftp://x/y"},
        r"SPOTUNE_BUCKET: 'ftp://x/y' is not a bucket \(.*\)",
    ),
    "no bucket, script": (
        "script",
        ["run.yaml"],
        {"SPOTUNE_BUCKET": "x"},
        r"SPOTUNE_BUCKET: 'x' is not a bucket \(.*\)",
    ),
    "a bucket that is a file": ("train", ["run.yaml"], {"SPOTUNE_BUCKET": "file:///etc/hosts"}, r"SPOTUNE_BUCKET: .*"),
    "a bucket that is a file, script": (
        "script",
        ["run.yaml"],
        {"SPOTUNE_BUCKET": "file:///etc/hosts"},
        r"SPOTUNE_BUCKET: .*",
    ),
    "a bucket where none can be": ("script", ["run.yaml"], {"SPOTUNE_BUCKET": "file:///proc/x"}, r"SPOTUNE_BUCKET: .*"),
    "a home where none can be": ("train", ["run.yaml"], {"SPOTUNE_HOME": "/proc/x"}, r"SPOTUNE_(HOME|BUCKET): .*"),
    "priority": ("train", ["run.yaml", "--priority", "9999"], {}, r".*priority.*9999.*"),
    "infrastructure": ("train", ["run.yaml", "--infra", "moon"], {}, r"--infra: .*moon.*"),
    "GPUs that are not here": ("train", ["run.yaml", "--gpus", "L4:1"], {"CUDA_VISIBLE_DEVICES": ""}, r"--gpus: .*"),
    "secret not set": ("train", ["run.yaml", "--secret", "NOT_SET"], {}, r"--secret: .*NOT_SET.*"),
    "preemption schedule": ("train", ["run.yaml", "--preemptions", "bad.jsonl"], {}, r"bad\.jsonl: line 2: .*"),
    "an environment that is the launcher's": (
        "train",
        ["run.yaml", "--env", "SPOTUNE_ALLOW_CONFIG_CHANGE=1"],
        {},
        r"--env: SPOTUNE_ALLOW_CONFIG_CHANGE is for spotune to set.*",
    ),
    "a change without a config": ("script", ["--allow-config-change"], {}, r"command line: no config \(.*\)"),
    "uneven ranks": (
        "script",
        ["run.yaml", "--num_processes", "3"],
        {"SKYPILOT_NUM_NODES": "2"},
        r"num_processes: 3 ranks do not spread over 2 machines evenly",
    ),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_elsewhere(kind: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    door, arguments, environment, line = ELSEWHERE[kind]
    (tmp_path / "run.yaml").write_bytes(config(material, None))
    (tmp_path / "bad.jsonl").write_text('{"after_s": 1, "notice_s": 0}\n{"after": 1}\n')
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expect_refusal(door, arguments, line, monkeypatch, capsys)


FLAG = r"\(--allow-config-change to go on with it, or choose another --name\)"
BACK = r"\(put it back, or spotune resume a-run --allow-config-change\)"
# what has changed since the run began: (door, a file that is edited, arguments, the one line)
CHANGED: dict[str, tuple[str, str, list[str], str]] = {
    "the config": (
        "train",
        "",
        ["--set", "seed=1"],
        rf"--name: a-run exists with another config: seed: 42 -> 1 {FLAG}",
    ),
    "a free key beside it": (
        "train",
        "",
        ["--set", "seed=1", "--set", "max_steps=3"],
        rf"--name: a-run exists with another config: max_steps: 1 -> 3; seed: 42 -> 1 {FLAG}",
    ),
    "the data": ("train", "good.jsonl", [], rf"--name: a-run exists with other data: .*good\.jsonl {FLAG}"),
    "the weights": (
        "train",
        "model/model.safetensors",
        [],
        rf"--name: a-run exists with another model: model\.safetensors {FLAG}",
    ),
    "the data, script": (
        "script",
        "good.jsonl",
        [],
        rf"run\.yaml: data: training data changed since the run began: .*good\.jsonl {BACK}",
    ),
    "the weights, script": (
        "script",
        "model/model.safetensors",
        [],
        rf"run\.yaml: model_name_or_path: model changed since the run began: model\.safetensors {BACK}",
    ),
    "the tokenizer, script": (
        "script",
        "model/tokenizer_config.json",
        [],
        rf"run\.yaml: model_name_or_path: model changed since the run began: tokenizer_config\.json {BACK}",
    ),
    "the config, to a wrong one": (
        "script",
        "",
        ["--allow-config-change", "--set", "stepz=1"],
        r"run\.yaml: stepz: unknown key .*",
    ),
    "all data, gone": ("script", "", ["--allow-config-change", "--set", "data=[{source: x.jsonl}]"], r".*no file .*"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_changed_since_the_run_began(
    kind: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    door, edited, arguments, line = CHANGED[kind]
    own = shutil.copytree(material, tmp_path / "own")
    (tmp_path / "run.yaml").write_bytes(config(own, None))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPOTUNE_RUN_ID", "a-run")
    env = RunEnvironment.read(os.environ)
    read_or_create_run(Store(env.bucket), Keys("a-run"), env, RunRequest("run.yaml", "", ()))
    if edited:
        (own / edited).write_bytes((own / edited).read_bytes() + b"\n")
    if door == "train":
        arguments = ["--name", "a-run", *arguments]
    expect_refusal(door, ["run.yaml", *arguments], line, monkeypatch, capsys)
    assert not Store(env.bucket).keys("runs/a-run/revisions")


def expect_refusal(door: str, arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Exit code 2, nothing on stdout, one line on stderr."""
    if door == "script":
        monkeypatch.setattr(Notices, "install", lambda self: self)
        code = script(arguments)
        out, err = capsys.readouterr()
    else:
        result = cli_runner().invoke(cli, ["train", "--infra", "local", "-y", "-d", *arguments])
        code, out, err = result.exit_code, result.stdout, result.stderr
    assert (code, out) == (2, ""), err
    assert re.fullmatch(line, err.rstrip("\n")), err


# what is wrong: (the config's edit, the one line)
ON_THE_MACHINE: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"data": [{"source": "MATERIAL/empty.jsonl"}]}, r".*empty\.jsonl.*"),
    "a line that is cut": ({"data": [{"source": "MATERIAL/cut.jsonl"}]}, r".*cut\.jsonl: (row|line) 2: .*"),
    "a missing column": ({"data": [{"source": "MATERIAL/nameless.jsonl"}]}, r".*nameless\.jsonl.*"),
    "a message without content": ({"data": [{"source": "MATERIAL/shapeless.jsonl"}]}, r".*shapeless\.jsonl: row 2: .*"),
    "a folder without a model": (
        {"model_name_or_path": "MATERIAL/hollow"},
        r"config\.yaml: model_name_or_path: .*hollow.*",
    ),
    "a model that is nowhere": (
        {"model_name_or_path": "no-org/no-model"},
        r"config\.yaml: model_name_or_path: .*no-model.*",
    ),
    "QLoRA without a GPU": ({"load_in_4bit": True, "use_peft": True}, r"config\.yaml: load_in_4bit: .*\(.*\)"),
    "Liger without a GPU": ({"use_liger_kernel": True}, r"config\.yaml: use_liger_kernel: .*\(.*\)"),
    "half precision on a CPU": ({"fp16": True}, r"config\.yaml: fp16: .*\(.*\)"),
    "flash attention without a GPU": (
        {"attn_implementation": "flash_attention_2"},
        r"config\.yaml: attn_implementation: .*\(.*\)",
    ),
    "sharding without a GPU": ({"fsdp": True}, r"config\.yaml: fsdp: .*\(.*\)"),
    "conversations without a template": ({"model_name_or_path": "MATERIAL/mute"}, r"config\.yaml: .*template.*"),
    "nothing to evaluate on": ({"eval_strategy": "steps"}, r"config\.yaml: eval_strategy: .*\(.*\)"),
    "no marks of what the assistant says": (
        {"model_name_or_path": "MATERIAL/unmarked", "assistant_only_loss": True},
        r"config\.yaml: .*",
    ),
}


@pytest.mark.parametrize("kind", ON_THE_MACHINE)
def test_on_the_machine(kind: str, material: Path, tmp_path: Path, ranks: Nursery) -> None:
    edit, line = ON_THE_MACHINE[kind]
    folder = make_folder(tmp_path / "job", yaml.safe_load(config(material, edit)))
    (outcome,) = (Outcome(**found) for found in ranks.run(folder))
    assert outcome.how == "bad_input", outcome
    assert re.fullmatch(line, outcome.message), outcome.message


def test_there_are_more_than_thirty_kinds() -> None:
    assert len(IN_CONFIG) + len(ELSEWHERE) + len(ON_THE_MACHINE) + len(CHANGED) > 30
