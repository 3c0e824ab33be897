"""Files of other tools that are given as CONFIG by mistake: each is named, with what to do about it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spotune.contracts.errors import InputError
from spotune.contracts.userfiles import read_user_file

_START = "a config starts with model_name_or_path: …"


class _Kind(NamedTuple):
    """A kind of file: what it is called, the keys of which it has at least ``least``, and what to do."""

    name: str
    keys: frozenset[str]
    least: int
    remedy: str


def _kind(name: str, keys: str, remedy: str, least: int = 1) -> _Kind:
    return _Kind(name, frozenset(keys.split()), least, remedy)


_TASK = _kind(
    "a SkyPilot task",
    "run setup resources file_mounts workdir service",
    f"spotune takes the task from tasks/train.yaml of the project; {_START}",
)
_KINDS = (
    _TASK,
    _kind(
        "an Axolotl config",
        "base_model sequence_len micro_batch_size adapter val_set_size dataset_prepared_path lora_target_linear"
        " sample_packing pad_to_sequence_len train_on_inputs special_tokens num_epochs flash_attention",
        "base_model is model_name_or_path, sequence_len max_length, micro_batch_size per_device_train_batch_size,"
        " num_epochs num_train_epochs, adapter: lora use_peft: true,"
        " datasets: [{path: …, type: …}] data: [{source: …}]",
        least=2,
    ),
    _kind(
        "a LLaMA-Factory config",
        "stage finetuning_type template cutoff_len dataset_dir lora_target lora_rank overwrite_cache plot_loss"
        " preprocessing_num_workers val_size max_samples",
        "finetuning_type: lora is use_peft: true, lora_rank lora_r, lora_target lora_target_modules, cutoff_len"
        " max_length, val_size split in data, dataset: name data: [{source: …}]",
        least=2,
    ),
    _kind("a DeepSpeed config", "zero_optimization train_micro_batch_size_per_gpu", "name it with deepspeed: FILE"),
    _kind("an accelerate config", "compute_environment distributed_type", "spotune starts the ranks itself; use fsdp:"),
    _kind(
        "a model's config.json",
        "architectures model_type transformers_version vocab_size hidden_size",
        "name the model's folder with model_name_or_path:",
        least=2,
    ),
    _kind("an adapter's config", "peft_type", "write use_peft: true, lora_r: … and lora_alpha: … instead"),
    _kind("the record of a run", "run_id config_sha256", "spotune show RUN; spotune train --from RUN", least=2),
    _kind("a Kubernetes manifest", "apiVersion kind", _START, least=2),
    _kind(
        "spotune's settings", "infra bucket team local slurm budgets", f"they are read from where they are; {_START}"
    ),
)
_OWN = "model_name_or_path"


def foreign_data(data: Mapping[str, Any], path: object) -> InputError | None:
    """An error that names the tool whose file this is; None for what may be a config."""
    if any(isinstance(value, dict) and "_component_" in value for value in data.values()):
        return _error("a torchtune config", path, f"model and tokenizer are model_name_or_path; {_START}")
    for kind in _KINDS:
        is_ours = _OWN in data and kind.name != "a LLaMA-Factory config"  # that tool has the key too
        if len(kind.keys & data.keys()) >= kind.least and not is_ours:
            return _error(kind.name, path, kind.remedy)
    return None


def foreign_text(path: str | Path) -> InputError | None:
    """The same for a file that is not one YAML mapping: several documents, rows of data, JSON with tabs."""
    try:
        text = read_user_file(path)
    except InputError:
        return None
    if _is_rows(text):
        return _error("rows of data", path, "name the file in a config: data: [{source: FILE}]")
    documents = list(_documents(text))
    tasks = sum(bool(_TASK.keys & document.keys()) for document in documents)
    if len(documents) > 1 and tasks:
        return _error(f"a SkyPilot pipeline of {tasks} tasks", path, _TASK.remedy)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    known = foreign_data(data, path) if isinstance(data, dict) else None
    return known or (InputError(path, "JSON that is not YAML", remedy="indent with spaces") if "\t" in text else None)


def _error(name: str, path: object, remedy: str) -> InputError:
    return InputError(path, f"is {name}, not a run config", remedy=remedy)


def _is_rows(text: str) -> bool:
    """Whether the first lines are JSON objects of their own, or the whole is a list of them."""
    lines = [line for line in text[:100_000].splitlines()[:3] if line.strip()]
    try:
        if len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines):
            return True
        whole = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return False
    return isinstance(whole, list) and bool(whole) and all(isinstance(row, dict) for row in whole)


def _documents(text: str) -> Iterator[dict[str, Any]]:
    """The mappings among a file's YAML documents, up to the first that is not YAML."""
    import yaml

    try:
        yield from (document for document in yaml.safe_load_all(text) if isinstance(document, dict))
    except (yaml.YAMLError, ValueError, RecursionError):
        return
