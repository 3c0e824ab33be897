"""Builds TRL's arguments from a config, and the JSON schema that configs are checked against.

``python -m spotune.sft.arguments`` writes core/schema.json.
"""

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import spotune.core
from spotune.core.config_keys import is_on, settled
from spotune.core.config_rules import FORMATS
from spotune.core.errors import InputError
from spotune.core.protocol import TRAINER, WorkerJob, wandb_mode
from spotune.core.store.faults import is_machine_fault
from spotune.sft.extras import doubts

OURS = ("data", "data_limit", "profiles", "num_processes", "keep_every", "merge_adapter")
# The modules of trackers that have another name; one of them is enough.
_TRACKER_MODULES = {
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}


@dataclass(frozen=True)
class Arguments:
    """The four dataclasses of TRL's script."""

    script: Any
    training: Any
    model: Any
    datasets: Any


def parse(job: WorkerJob, folder: Path, rank: int) -> Arguments:
    """Reads the config as ``trl sft --config`` does, without the keys that the guard handles. Raises InputError."""
    import torch
    import yaml
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:  # argparse would print a usage of 500 lines and exit
            raise InputError(job.config_path, message)

    path = folder / f"config-{rank}.yaml"
    path.write_text(yaml.safe_dump(effective(job, folder), sort_keys=False))
    parser = Parser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig), prog="spotune")
    try:
        found = Arguments(*parser.parse_args_and_config(["--config", str(path)]))
    except InputError:
        raise
    except Exception as error:  # the config alone decides what these classes accept
        if is_machine_fault(error):
            raise
        raise InputError(job.config_path, str(error) or type(error).__name__) from error
    training = found.training
    if not all(isinstance(name, str) for name in training.report_to):
        raise InputError(job.config_path, "null does not name a tracker", key="report_to", remedy="report_to: none")
    if training.gradient_accumulation_steps < 1:
        raise InputError(job.config_path, "must be at least 1", key="gradient_accumulation_steps")
    training.report_to = usable_trackers(training.report_to, os.environ)
    if training.device.type == "cpu":  # transformers leaves this open on a machine without an accelerator
        training.dataloader_pin_memory = False  # there is nothing to pin it for, and torch warns about it
        if training.world_size > 1:
            # Accelerate numbers the CPU of a distributed run. torch.load does not know "cpu:0": no resume would work.
            training.distributed_state.device = torch.device("cpu")
            training.__dict__["_setup_devices"] = torch.device("cpu")  # the cached value of the property ``device``
    _keep_global_batch(training, job)
    return found


def _keep_global_batch(training: Any, job: WorkerJob) -> None:
    """Keeps the rows of a step when the number of ranks changes. Raises InputError if that is impossible."""
    at_once = training.per_device_train_batch_size * training.world_size
    rows = job.global_batch
    if not rows or rows == at_once * training.gradient_accumulation_steps:
        return
    if rows % at_once:
        what = f"a step of this run takes {rows} rows, which {training.world_size} ranks cannot divide into batches"
        what += f" of {training.per_device_train_batch_size}"
        remedy = "a number of ranks that divides it, as before"
        raise InputError(job.config_path, what, key="per_device_train_batch_size", remedy=remedy)
    training.gradient_accumulation_steps = rows // at_once
    print(
        f"[spotune] the run now has {training.world_size} ranks: gradient_accumulation_steps is"
        f" {training.gradient_accumulation_steps}, so that a step still takes {rows} rows",
        file=sys.stderr,
    )


def effective(job: WorkerJob, folder: Path) -> dict[str, Any]:
    """Returns the config as TRL gets it."""
    config = {key: value for key, value in settled(job.config).items() if key not in OURS}
    config |= {"output_dir": str(folder / TRAINER), "save_total_limit": None, "resume_from_checkpoint": None}
    config |= {"push_to_hub": False, "enable_jit_checkpoint": False, "save_only_model": False}
    if "disable_tqdm" not in config and not sys.stdout.isatty():
        config["disable_tqdm"] = True
    config.setdefault("logging_nan_inf_filter", False)  # it shows the mean of other steps in place of a NaN
    if config.get("env") is None:
        config.pop("env", None)
    return config


def notices(config: Mapping[str, Any]) -> list[str]:
    """Returns one line for each key of the config that is not followed."""
    lines = []
    if is_on(config, "push_to_hub"):
        if config.get("hub_strategy") not in (None, "end") or is_on(config, "hub_always_push"):
            lines.append("hub_strategy: not followed; the result is pushed once, when it is certified")
        lines += doubts()
    if config.get("save_only_model"):
        lines.append("save_only_model: not followed, since a run could not be continued from such a checkpoint")
    if config.get("resume_from_checkpoint"):
        lines.append("resume_from_checkpoint: not followed; a run continues from its own newest checkpoint")
    return lines


def usable_trackers(wanted: list[str], environ: Mapping[str, str]) -> list[str]:
    """Returns the trackers that work here: installed, and wandb only if it can reach its server.

    A kill loses wandb's offline files, and a resume doubles their steps; these runs are rebuilt from our own events.
    """
    usable = []
    for name in wanted:
        modules = _TRACKER_MODULES.get(name, (name,))
        if name != "codecarbon" and not any(importlib.util.find_spec(module) for module in modules):
            print(f"report_to: {name} is not installed, left out", file=sys.stderr)
        elif name == "wandb" and wandb_mode({"report_to": "wandb"}, environ) != "live":
            why = "no WANDB_API_KEY, or WANDB_MODE is not online"
            print(f"report_to: wandb is written at the end ({why})", file=sys.stderr)
        else:
            usable.append(name)
    return usable


# The schema, from the pinned TRL's dataclasses. Editors complete and check configs with it, and the launcher refuses
# typos with it and does not import TRL. A test compares the file with the installed TRL.

Schema = dict[str, Any]
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}

# Keys whose annotation is narrower or wider than what TRL takes from YAML.
_TYPES: Schema = {
    "max_steps": {"type": "integer"},
    "report_to": {"type": ["string", "array"]},
    "fsdp": {"type": ["boolean", "string", "array", "null"]},
    "debug": {
        "type": ["string", "array", "null"],
        "items": {"type": "string", "enum": ["underflow_overflow", "tpu_metrics_debug"]},
    },
    "lora_target_modules": {"type": ["string", "array", "null"], "items": {"type": "string"}},
    "accelerator_config": {"type": ["object", "string", "null"]},
    "resume_from_checkpoint": {"type": ["boolean", "string", "null"]},
    # TRL's parser reads every text here as yes or no, so `all` and `non_padding` cannot be given
    "include_num_input_tokens_seen": {"type": "boolean", "default": False},
    "gradient_checkpointing": {"type": ["boolean", "null"]},
    "trackio_static_space_id": {"type": ["boolean", "string", "null"]},  # false, or a name
    "parallelism_config": {"type": "null"},  # no text or mapping becomes accelerate's class
}
_AT_LEAST_ONE = (
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps lora_r lora_alpha max_length"
    " dataset_num_proc torch_empty_cache_steps eval_accumulation_steps dataloader_prefetch_factor ddp_timeout"
    " ddp_bucket_cap_mb"
)
_AT_LEAST_ZERO = "learning_rate weight_decay warmup_steps max_grad_norm adam_epsilon dataloader_num_workers eval_delay"
_ABOVE_ZERO = "num_train_epochs logging_steps save_steps eval_steps test_split_size"
_LIMITS: dict[str, Schema] = {
    **{key: {"minimum": 1} for key in _AT_LEAST_ONE.split()},
    **{key: {"minimum": 0} for key in _AT_LEAST_ZERO.split()},
    **{key: {"exclusiveMinimum": 0} for key in _ABOVE_ZERO.split()},
    **{key: {"minimum": 0, "maximum": 1} for key in ("lora_dropout", "label_smoothing_factor")},
    **{key: {"minimum": 0, "exclusiveMaximum": 1} for key in ("adam_beta1", "adam_beta2")},
    **{key: {"minimum": 0, "maximum": 2**32 - 1} for key in ("seed", "data_seed")},  # numpy takes 32 bits
}
_CHOICES: dict[str, list[str]] = {
    "packing_strategy": ["bfd", "bfd_split", "bfd-requeue", "wrapped"],
    "truncation_mode": ["keep_start", "keep_end"],
    "loss_type": ["nll", "dft", "chunked_nll"],
    "bnb_4bit_quant_storage": ["uint8", "int8", "float16", "bfloat16", "float32", "float64"],
    "torch_compile_mode": ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
}


def build() -> Schema:
    """Returns the schema of a config: TRL's keys and ours."""
    from accelerate.utils import DynamoBackend
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_pt_utils import AcceleratorConfig
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig
    from trl.scripts.utils import DatasetConfig

    properties: Schema = {}
    for kind in (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig):
        properties |= _properties(kind)
    properties["datasets"]["items"] = _object(_properties(DatasetConfig), "path")
    properties["report_to"]["items"] = {"type": "string", "enum": ["none", "all", *sorted(INTEGRATION_TO_CALLBACK)]}
    properties["accelerator_config"]["properties"] = {entry.name: {} for entry in dataclasses.fields(AcceleratorConfig)}
    compilers = sorted(str(member.value) for member in DynamoBackend)  # accelerate takes them in either case
    properties["torch_compile_backend"]["enum"] = [*(name.lower() for name in compilers), *compilers, None]
    properties.update(_own_keys())
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "spotune run config",
        "description": "Keys of `trl sft --config`, and spotune's own (data, profiles, ...).",
        "type": "object",
        "additionalProperties": False,
        "properties": dict(sorted(properties.items())),
        "x-scheduler-kwargs": _scheduler_kwargs(),
    }


def _scheduler_kwargs() -> Schema:
    """Returns, for each schedule, the names that ``lr_scheduler_kwargs`` may have and those that it needs."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    given = {"optimizer", "num_warmup_steps", "num_training_steps"}  # by Trainer itself
    found: Schema = {}
    for name, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        parameters = inspect.signature(function).parameters.values()
        named = [one for one in parameters if one.name not in given and one.kind is not one.VAR_KEYWORD]
        needed = [one.name for one in named if one.default is one.empty]
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
        found[str(name.value)] = {"names": [one.name for one in named], "needed": needed, "any": takes_any}
    return dict(sorted(found.items()))


def _properties(kind: type) -> Schema:
    hints = get_type_hints(kind)
    return {entry.name: _property(entry, hints[entry.name]) for entry in dataclasses.fields(kind) if entry.init}


def _property(entry: Any, hint: Any) -> Schema:
    found = dict(_TYPES.get(entry.name) or _type(hint))
    choices = _CHOICES.get(entry.name) or list(entry.metadata.get("choices") or [])
    if choices:
        found["enum"] = [*choices, *([None] if "null" in _as_list(found.get("type")) else [])]
    found.update(_LIMITS.get(entry.name, {}))
    default = _default(entry)
    if default is not None and "default" not in found:
        found["default"] = default
    text = " ".join(str(entry.metadata.get("help", "")).split())
    if help := re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"(])", text, maxsplit=1)[0]:  # its first sentence
        found["description"] = help if len(help) <= 240 else help[:237].rsplit(" ", 1)[0] + " …"
    return found


def _type(hint: Any) -> Schema:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        parts = [_type(part) for part in get_args(hint) if part is not type(None)]
        kinds = [kind for part in parts for kind in _as_list(part.get("type"))]
        if not kinds:
            return {}
        merged: Schema = {"type": list(dict.fromkeys(kinds))}
        merged |= next(({"items": part["items"]} for part in parts if "items" in part), {})
        enums = [part["enum"] for part in parts if "enum" in part]
        if enums and merged["type"] == ["string"]:  # `Enum | str`: the text is one of the enum's all the same
            merged["enum"] = enums[0]
        if type(None) in get_args(hint):
            merged["type"].append("null")
            if "enum" in merged:
                merged["enum"] = [*merged["enum"], None]
        merged["type"] = merged["type"][0] if len(merged["type"]) == 1 else merged["type"]
        return merged
    if origin is Literal:
        return {"type": "string", "enum": list(get_args(hint))}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"type": "string", "enum": sorted(member.value for member in hint)}
    kind = _KINDS.get(origin or hint)
    if kind == "array" and get_args(hint) == (str,):
        return {"type": kind, "items": {"type": "string"}}
    return {"type": kind} if kind else {}


def _default(entry: Any) -> Any:
    default = entry.default
    if default is dataclasses.MISSING:
        default = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else None
    default = default.value if isinstance(default, Enum) else default
    return default if isinstance(default, (str, int, float, bool)) else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _own_keys() -> Schema:
    profile = _key("object", "Keys that this profile overlays.")
    source = {
        "source": _key("string", "Path, glob, folder or URL: hf://org/name[@rev], s3://, gs://, https://."),
        "weight": _key("number", "Share of the mixture, in proportion to the other weights.", exclusiveMinimum=0),
        "format": _key("string", "Told from the columns when not given.", enum=list(FORMATS)),
        "columns": _key("object", "Our column names to the file's, e.g. {prompt: question, completion: answer}."),
        "limit": _key("integer", "Use the first so many rows only.", minimum=1),
        "split": _key("number", "Held out for evaluation: a share below 1, or a number of rows.", exclusiveMinimum=0),
        "dataset_config": _key("string", "hf:// only: the data set's configuration."),
        "dataset_split": _key("string", "hf:// only: the data set's split, default train."),
    }
    entry = _object(source, "source")
    return {
        "data": _key(["array", "null"], "What to train on, mixed by weight; instead of TRL's datasets.", items=entry),
        "data_limit": _key(["integer", "null"], "At most so many training rows, and held-out rows.", minimum=1),
        "profiles": _key("object", "Overlays by name: dev and prod differ here.", additionalProperties=profile),
        "env": _key(["object", "null"], "Environment variables to set before anything is loaded."),
        "num_processes": _key(["integer", "null"], "Ranks on one machine; default one per GPU.", minimum=1),
        "keep_every": _key(["integer", "null"], "Keep every so many-th checkpoint for good.", minimum=1),
        "merge_adapter": _key(["boolean", "null"], "Also leave the adapter merged into its base, below merged/."),
    }


def _object(keys: Schema, required: str) -> Schema:
    return {"type": "object", "additionalProperties": False, "required": [required], "properties": keys}


def _key(type: str | list[str], description: str, **rules: Any) -> Schema:
    return {"type": type, "description": description, **rules}


def path() -> Path:
    return Path(spotune.core.__file__).with_name("schema.json")


if __name__ == "__main__":
    path().write_text(json.dumps(build(), indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
