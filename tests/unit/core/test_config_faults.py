"""Everything that is wrong with a config is reported at once, with what to write instead."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotune.core.config import check_local_files, load_config, parse_flags
from spotune.core.config_keys import LEFT_OUT, REPLACED, advice, key_faults, schema
from spotune.core.errors import Faults, InputError

RIGHT: dict[str, Any] = {"model_name_or_path": "org/model", "dataset_name": "org/rows"}


def lines(
    tmp_path: Path, config: dict[str, Any] | str, profile: str = "", overrides: tuple[str, ...] = ()
) -> list[str]:
    """What is wrong with a config, without the file's name; empty when it is in order."""
    path = tmp_path / "c.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump({**RIGHT, **config}))
    try:
        load_config(path, profile, overrides)
    except InputError as error:
        return [line.replace(f"{path}: ", "") for line in error.lines]
    return []


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    wrong = {
        "torch_dtype": "bfloat16",
        "max_steps": "1e1",
        "seed": 2**32,
        "logging_steps": 1.5,
        "learning_rat": 1,
        "profiles": {"dev": {"warmup_ratio": 0.1}, "prod": {"packing": "maybe"}},
    }
    assert lines(tmp_path, wrong, "prod", ("data_seed=-1",)) == [
        "learning_rat: unknown key (did you mean learning_rate?)",
        "max_steps: '1e1' is not a whole number (write max_steps: 10)",
        "seed: 4294967296 is too large (at most 4294967295)",
        "torch_dtype: unknown key (renamed; write dtype: bfloat16)",
        "profiles.prod: packing: 'maybe' is not true or false",
        "data_seed: -1 is too small (at least 0)",
        "logging_steps: 1.5 is not a whole number (write logging_steps: 1, or a share of all steps below 1)",
        "profiles.dev: warmup_ratio: unknown key (renamed; write warmup_steps: 0.1)",
    ]


def test_one_fault_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**RIGHT, "seed": -1}))
    with pytest.raises(InputError) as raised:
        load_config(tmp_path / "c.yaml")
    assert not isinstance(raised.value, Faults)
    assert raised.value.lines == [str(raised.value)]


@pytest.mark.parametrize("text", ["1", "y", "T", "yes", "on", "'true'", "'1'"])
def test_every_word_for_yes(tmp_path: Path, text: str) -> None:
    assert not lines(tmp_path, yaml.safe_dump(RIGHT) + f"packing: {text}\n")


# what does not go together, or is not taken: (the config, the one line)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tracker": ({"report_to": None}, "report_to: null is not text or a list (write report_to: none)"),
    "an unknown tracker": ({"report_to": "wandbb"}, "report_to: 'wandbb' is not known (did you mean wandb?)"),
    "null": ({"max_steps": None}, "max_steps: null is not a whole number (leave the key out for -1)"),
    "a seed of more than 32 bits": ({"data_seed": 2**40}, "data_seed: 1099511627776 is too large (at most 4294967295)"),
    "strategies that differ": (
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "steps"},
        "save_strategy: load_best_model_at_end needs it to match eval_strategy: epoch, and it is steps"
        " (write save_strategy: epoch)",
    ),
    "no multiple": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 20, "save_steps": 50},
        "save_steps: load_best_model_at_end needs a multiple of eval_steps: 20, not 50 (write save_steps: 20)",
    ),
    "no such metric": (
        {"eval_strategy": "steps", "metric_for_best_model": "rouge"},
        "metric_for_best_model: an evaluation does not report 'rouge' (one of loss, mean_token_accuracy, entropy,"
        " num_tokens, aux_loss, runtime, samples_per_second, steps_per_second, model_preparation_time)",
    ),
    "half a step": (
        {"save_steps": 2.5},
        "save_steps: 2.5 is not a whole number (write save_steps: 2, or a share of all steps below 1)",
    ),
    "packing without a length": (
        {"packing": True, "max_length": None},
        "max_length: packing needs a length (write max_length: 1024)",
    ),
    "two precisions": ({"bf16": True, "fp16": True}, "fp16: bf16 is true as well (keep one of them)"),
    "a schedule without its end": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "lr_scheduler_kwargs: cosine_with_min_lr needs min_lr or min_lr_rate (write lr_scheduler_kwargs:"
        " {min_lr_rate: 0.1})",
    ),
    "nothing held out": (
        {"dataset_name": None, "data": [{"source": "a.jsonl"}], "eval_strategy": "steps"},
        "eval_strategy: there are no held-out rows to evaluate on (split: 0.05 on an entry of data, or"
        ' eval_strategy: "no")',
    ),
    "a stream without an end": (
        {"dataset_streaming": True},
        "max_steps: missing: with dataset_streaming nobody knows where training ends (write max_steps: 1000)",
    ),
    "a date": ({"run_name": "DATE"}, "run_name: '2026-11-30' is read as a date (quote it)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path: Path, kind: str) -> None:
    config, line = REFUSED[kind]
    text = yaml.safe_dump({**RIGHT, **config}).replace("DATE", "2026-11-30")
    assert lines(tmp_path, text) == [line]


INSIDE = "model_init_kwargs"


@pytest.mark.parametrize("name", "trust_remote_code weights_only token use_auth_token proxies cache_dir".split())
@pytest.mark.parametrize("where", [INSIDE, f"{INSIDE}.adapter_kwargs", "text"])
def test_code_and_tokens_are_not_let_in_by_keywords_of_the_model(tmp_path: Path, name: str, where: str) -> None:
    given: Any = {name: True}
    given = {"adapter_kwargs": given} if where.endswith("adapter_kwargs") else given
    (line,) = lines(tmp_path, {INSIDE: json.dumps(given) if where == "text" else given})
    assert line.startswith(f"{INSIDE if where == 'text' else where}.{name}: is not taken here (")
    assert not lines(tmp_path, {INSIDE: {"dtype": "bfloat16", "rope_scaling": {"factor": 2.0}, "device_map": None}})


def test_a_rule_is_silent_where_a_key_of_its_own_is_wrong(tmp_path: Path) -> None:
    config = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "sometimes"}
    assert [line.partition(":")[0] for line in lines(tmp_path, config)] == ["save_strategy"]


def test_what_is_written_stays_as_it_is_but_for_what_no_reader_takes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**RIGHT, "learning_rate": "1e-3", "data_limit": "5", "save_total_limit": "None"}))
    loaded = load_config(path, overrides=["run_name=12"])
    assert loaded == {**RIGHT, "learning_rate": "1e-3", "data_limit": 5, "save_total_limit": None, "run_name": "12"}


VALUES = {"torch_dtype": "bfloat16", "dataset_mixture": {"datasets": [{"id": "a/b", "config": "c"}]}}
RECIPES = (  # what the public SFT recipes of alignment-handbook, open-r1 and TRL have, and TRL has no more
    *("torch_dtype", "max_seq_length", "overwrite_output_dir", "warmup_ratio", "dataset_mixture", "dataset_mixer"),
    *("chat_template", "evaluation_strategy", "dataset_splits", "dataset_configs", "preprocessing_num_workers"),
    *("logging_dir", "group_by_length", "use_liger", "save_safetensors", "no_cuda", "per_gpu_train_batch_size"),
    *("wandb_entity", "wandb_project", "system_prompt", "callbacks", "benchmarks", "hub_model_revision"),
    *("include_inputs_for_metrics", "push_to_hub_model_id", "push_to_hub_token", "tokenizer_name_or_path"),
    *("num_of_sequences", "dataset_batch_size", "use_flash_attention_2", "fsdp_transformer_layer_cls_to_wrap"),
)


@pytest.mark.parametrize("key", RECIPES)
def test_a_recipes_old_key_has_advice(key: str) -> None:
    ((name, what, remedy),) = key_faults({key: VALUES.get(key, True)})
    assert (name, what) == (key, "unknown key")
    assert "write " in remedy or "leave it out" in remedy or "put " in remedy, remedy


OLD_KEYS = [*REPLACED, *LEFT_OUT]


@pytest.mark.parametrize("key", OLD_KEYS)
def test_old_keys_lead_to_keys_that_exist(key: str) -> None:
    known = schema()["properties"]
    assert key not in known
    assert key in LEFT_OUT or REPLACED[key][0] in known
    assert advice(key, None)
    assert advice(key, "x")


def test_the_new_key_gets_the_users_own_value_where_it_takes_it() -> None:
    told = {
        ("max_seq_length", 2048): "renamed; write max_length: 2048",
        ("max_seq_length", "long"): "renamed; write max_length: …",
        ("evaluation_strategy", "no"): "renamed; write eval_strategy: 'no'",
        ("group_by_length", True): "renamed; write train_sampling_strategy: group_by_length",
        ("logging_dir", "logs"): "renamed; write env: {TENSORBOARD_LOGGING_DIR: logs}",
        ("wandb_project", None): "leave it out: its new name is env",
    }
    for (key, value), remedy in told.items():
        assert [fault.remedy for fault in key_faults({key: value})] == [remedy]
    (fault,) = key_faults({"dtype": "float16", "torch_dtype": "bfloat16"})
    assert fault.remedy == "leave it out, since dtype is given"
    (fault,) = key_faults({"env": {"A": "1"}, "wandb_project": "x"})
    assert fault.remedy == "put WANDB_PROJECT into env"
    (fault,) = key_faults({"training": {"max_steps": 1, "seed": 2}})
    assert fault.remedy == "keys are flat: write max_steps, seed without training"


# another tool's file: (its text, what it is)
FOREIGN = {
    "a task": ("resources: {accelerators: L4}\nrun: python train.py\n", "is a SkyPilot task, not a run config"),
    "a task that has a model": ("name: x\nsetup: pip install\nnum_nodes: 2\n", "is a SkyPilot task"),
    "a pipeline": ("name: x\n---\nrun: a\n---\nrun: b\n", "is a SkyPilot pipeline of 2 tasks, not a run config"),
    "several documents": ("seed: 1\n---\nseed: 2\n", "several documents (one file for each)"),
    "Axolotl": (
        "base_model: a/b\ndatasets: [{path: c, type: alpaca}]\nadapter: lora\nsequence_len: 9\nmicro_batch_size: 1\n",
        "is an Axolotl config, not a run config (base_model is model_name_or_path, ",
    ),
    "LLaMA-Factory": (
        "model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ntemplate: qwen\ncutoff_len: 9\ndataset: x\n",
        "is a LLaMA-Factory config, not a run config (finetuning_type: lora is use_peft: true, ",
    ),
    "torchtune": ("model: {_component_: torchtune.models.x}\n", "is a torchtune config"),
    "DeepSpeed": ('{\n\t"zero_optimization": {"stage": 2}\n}\n', "is a DeepSpeed config"),
    "accelerate": ("compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\n", "is an accelerate config"),
    "a model's own": ('{"architectures": ["A"], "model_type": "llama"}', "is a model's config.json"),
    "JSONL": ('{"text": "a"}\n{"text": "b"}\n', "is rows of data, not a run config"),
    "a JSON list": ('[{"text": "a"}]', "is rows of data, not a run config"),
    "JSON with tabs": ('{\n\t"seed": 1\n}\n', "JSON that is not YAML (indent with spaces)"),
    "settings": ("infra: local\nteam: x\n", "is spotune's settings"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_tools_file_is_recognised(tmp_path: Path, kind: str) -> None:
    text, line = FOREIGN[kind]
    (found,) = lines(tmp_path, text)
    assert found.startswith(line)


def test_a_json_config_is_a_config(tmp_path: Path) -> None:
    assert not lines(tmp_path, '{\n  "model_name_or_path": "a/b",\n  "dataset_name": "x/y",\n  "packing": true\n}\n')


KEYS = [*schema()["properties"], *OLD_KEYS, "nonsense", "profiles"]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(),
    st.sampled_from(["", "1e1", "no", "steps", "epoch", "best", "{", "{}", '{"a": 1}', "hf://", "none", "auto", "a/b"]),
    st.text(max_size=3),
    st.dates(),
    st.binary(max_size=2),
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["source", "path", "datasets", "split", "a", "dev", "seed"]), inner, max_size=3
        ),
        st.dictionaries(st.integers(0, 1), inner, max_size=1),
    ),
    max_leaves=5,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(config=st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=6))
def test_whatever_a_config_says_it_is_taken_or_refused_by_line(tmp_path: Path, config: dict[str, Any]) -> None:
    for line in lines(tmp_path, {**RIGHT, **config}):
        assert not any(unicodedata.category(one) == "Cc" for one in line)


def test_flags_of_several_values_are_lists() -> None:
    flags = "--lora_modules_to_save a b --label_names c --lora_target_modules all-linear --fsdp --seed 3"
    assert parse_flags(flags.split()) == [
        "lora_modules_to_save=[a, b]",
        "label_names=[c]",
        "lora_target_modules=all-linear",
        "fsdp=true",
        "seed=3",
    ]
    assert parse_flags("--lora_target_modules q_proj v_proj".split()) == ["lora_target_modules=[q_proj, v_proj]"]


def test_files_that_are_not_here_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text("{}")
    config = {
        "chat_template_path": "chat.jinja",
        "deepspeed": "ds.json",
        "fsdp_config": "fsdp.json",
        "accelerator_config": '{"split_batches": true}',
        "datasets": [
            {"path": "json", "data_files": {"train": "rows.jsonl"}},
            {"path": "org/rows", "data_files": "a.jsonl"},
            {"path": "json", "data_files": ["s3://b/a.jsonl", "*.jsonl"]},
        ],
    }
    with pytest.raises(InputError) as raised:
        check_local_files(config, "c.yaml")
    assert raised.value.lines == [
        "c.yaml: datasets[0].data_files: no such file: rows.jsonl",
        "c.yaml: chat_template_path: no such file: chat.jinja",
        "c.yaml: fsdp_config: no such file: fsdp.json",
    ]
