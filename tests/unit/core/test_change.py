"""What differs between two records of a run, and what of it may change by itself."""

from typing import Any

import pytest

from spotune.core.config_keys import schema
from spotune.core.errors import InputError
from spotune.core.records import RunRecord
from spotune.core.revisions import EVALUATION, FREE, Change, KeyChange, admit, compare, compare_configs, few

BEST = {"load_best_model_at_end": True}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau"}
# name: (config before, after, what is said, what of it is bound)
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str], list[str]]] = {
    "nothing": ({"seed": 1}, {"seed": 1}, [], []),
    "a default, written out": ({}, {"packing": False, "learning_rate": 2e-5, "eval_packing": None}, [], []),
    "YAML reads 1e-3 as text": ({"learning_rate": "1e-3"}, {"learning_rate": 0.001}, [], []),
    "a whole number as a decimal": ({"max_steps": 9}, {"max_steps": 9.0}, [], []),
    "yes is true": ({"packing": "yes"}, {"packing": True}, [], []),
    "true is not 1": ({"fsdp": True}, {"fsdp": 1}, ["fsdp: true -> 1"], ["fsdp"]),
    "longer": ({"max_steps": 9}, {"max_steps": 40}, ["max_steps: 9 -> 40"], []),
    "by epochs instead": (
        {"max_steps": 9},
        {"num_train_epochs": 2},
        ["max_steps: 9 -> -1", "num_train_epochs: 3.0 -> 2"],
        [],
    ),
    "logging": ({"report_to": "wandb"}, {"report_to": ["trackio"]}, ['report_to: wandb -> ["trackio"]'], []),
    "saving": ({"save_steps": 5}, {"save_strategy": "epoch"}, ["save_steps: 5 -> 500", "save_strategy: steps -> epoch"],
               []),
    "where it goes": ({"output_dir": "a"}, {}, ["output_dir: a -> not set"], []),
    "a pass for the hub": ({}, {"hub_token": "hf_abc"}, ["hub_token: not set -> (hidden)"], []),
    "machines": ({"num_processes": 2}, {"num_processes": 4}, ["num_processes: 2 -> 4"], []),
    "what is not followed": ({}, {"save_only_model": True}, ["save_only_model: false -> true"], []),
    "evaluation that looks": ({}, {"eval_strategy": "steps", "eval_steps": 5},
                              ["eval_steps: not set -> 5", "eval_strategy: no -> steps"], []),
    "evaluation that chooses": ({"eval_steps": 5, **BEST}, {"eval_steps": 6, **BEST}, ["eval_steps: 5 -> 6"],
                                ["eval_steps"]),
    "evaluation that is to choose": ({}, {"eval_steps": 6, **BEST},
                                     ["eval_steps: not set -> 6", "load_best_model_at_end: false -> true"],
                                     ["eval_steps", "load_best_model_at_end"]),
    "evaluation that steers": ({"eval_steps": 5, **PLATEAU}, {"eval_steps": 6, **PLATEAU}, ["eval_steps: 5 -> 6"],
                               ["eval_steps"]),
    "the learning rate": ({"learning_rate": "1e-3"}, {"learning_rate": 2e-3}, ["learning_rate: 1e-3 -> 0.002"],
                          ["learning_rate"]),
    "a seed": ({}, {"seed": 7}, ["seed: 42 -> 7"], ["seed"]),
    "the batch": ({"gradient_accumulation_steps": 2}, {}, ["gradient_accumulation_steps: 2 -> 1"],
                  ["gradient_accumulation_steps"]),
    "more than one, free ones too": ({"max_steps": 9}, {"max_steps": 40, "lora_r": 8},
                                     ["lora_r: 16 -> 8", "max_steps: 9 -> 40"], ["lora_r"]),
    "a weight in the data": (
        {"data": [{"source": "a", "weight": 1}, {"source": "b"}]},
        {"data": [{"source": "a", "weight": 2}]},
        ["data[0].weight: 1 -> 2", "data[1].source: b -> not set"],
        ["data[0].weight", "data[1].source"],
    ),
    "a secret in env": (
        {"env": {"HF_TOKEN": "one", "NCCL_DEBUG": "INFO"}},
        {"env": {"HF_TOKEN": "two", "NCCL_DEBUG": "WARN"}},
        ["env.HF_TOKEN: (hidden) -> (hidden)", "env.NCCL_DEBUG: INFO -> WARN"],
        ["env.HF_TOKEN", "env.NCCL_DEBUG"],
    ),
    "a token that is none": ({"eos_token": "a"}, {"eos_token": "b"}, ["eos_token: a -> b"], ["eos_token"]),
    "a file that becomes settings": (
        {"fsdp_config": "f.json"},
        {"fsdp_config": {"x": 1}},
        ["fsdp_config: f.json -> not set", "fsdp_config.x: not set -> 1"],
        ["fsdp_config", "fsdp_config.x"],
    ),
    "a key's new name": ({"gradient_checkpointing": False}, {"activation_checkpointing": False}, [], []),
    "the default under either name": ({"gradient_checkpointing": True}, {"activation_checkpointing": "yes"}, [], []),
    "another value under the new name": (
        {"gradient_checkpointing": False},
        {"activation_checkpointing": True},
        ["activation_checkpointing: false -> true"],
        ["activation_checkpointing"],
    ),
    "off, and not set": (
        {"activation_checkpointing": False},
        {},
        ["activation_checkpointing: false -> true"],
        ["activation_checkpointing"],
    ),
    "a long value": ({}, {"pad_token": "x" * 99}, [f"pad_token: not set -> {'x' * 59}…"], ["pad_token"]),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "said", "bound"), CONFIGS.values(), ids=CONFIGS)
def test_configs(before: dict[str, Any], after: dict[str, Any], said: list[str], bound: list[str]) -> None:
    found = Change(compare_configs(before, after))
    assert [str(change) for change in found.keys] == said
    assert found.bound == bound
    assert bool(found) == bool(said)


def test_a_change_back_is_the_same_change() -> None:
    for before, after, said, bound in CONFIGS.values():
        there, back = compare_configs(before, after), compare_configs(after, before)
        assert [change.key for change in there] == [change.key for change in back]
        assert [(change.before, change.after) for change in there] == [(change.after, change.before) for change in back]
        assert len(there) == len(said)
        assert [change.key for change in back if not change.is_free] == bound


def test_the_free_keys_are_keys() -> None:
    ours = {"save_every", "stall_after", "budget"}  # of the command line
    assert set(schema()["properties"]) >= (FREE | EVALUATION) - ours
    assert not FREE & EVALUATION


def record(config: dict[str, Any] | None = None, **facts: Any) -> RunRecord:
    base: dict[str, Any] = {"run_id": "run-a", "created_at": 0.0, "user": "ada", "config_path": "run.yaml"}
    base |= {"config_sha256": "c", "data_sha256": "d", "model_sha256": "m"}
    return RunRecord(**base | {"config": config or {}} | facts)


def files(**contents: str) -> list[dict[str, Any]]:
    return [{"url": name, "name": name, "size": 1, "sha256": sha} for name, sha in contents.items()]


def test_files() -> None:
    before = record(data_files=files(a="1", b="2", c="3"), model_files=files(weights="1", config="2"))
    after = record(
        data_sha256="D",
        data_files=files(a="1", b="X", d="4"),
        model_sha256="M",
        model_files=files(weights="2", config="2"),
    )
    change = compare(before, after)
    assert str(change) == "data: b, d (added), c (gone); model: weights"
    assert change.bound == ["data", "model"]
    assert change.as_followed().endswith("goes on at the same step and position, now in the new data")


def test_files_of_another_source_are_not_listed_too() -> None:
    before = record({"data": [{"source": "a"}], "model_name_or_path": "x"}, data_files=files(a="1"))
    after = record({"data": [{"source": "b"}], "model_name_or_path": "y"}, data_sha256="D", model_sha256="M")
    change = compare(before, after)
    assert str(change) == "data[0].source: a -> b; model_name_or_path: x -> y"
    assert change.as_followed().endswith("now in the new data")


def test_a_record_of_last_week_has_no_model() -> None:
    assert not compare(record(model_sha256=""), record(model_sha256="m", model_files=files(weights="1")))


def test_save_every_is_a_setting_like_others() -> None:
    change = compare(record(save_every="5m"), record(save_every="50"))
    assert (str(change), change.bound) == ("save_every: 5m -> 50", [])


def test_a_bound_change_is_admitted_or_refused_whole() -> None:
    change = Change((KeyChange("lora_r", "8", "16", False), KeyChange("max_steps", "1", "2", True)), ("a.jsonl",))
    assert admit(change, True, "run-a", "differs by", "do not") == ["lora_r", "data"]
    with pytest.raises(
        InputError, match=r"^run-a: differs by another config: lora_r: 8 -> 16; max_steps: 1 -> 2; data: a.jsonl \(do"
    ):
        admit(change, False, "run-a", "differs by", "do not")
    assert admit(Change(change.keys[1:]), False, "run-a", "differs by", "do not") == []


def test_few() -> None:
    assert few(("a", "b")) == "a, b"
    assert few(("a", "b", "c", "d", "e", "f")) == "a, b, c, d and 2 more"
