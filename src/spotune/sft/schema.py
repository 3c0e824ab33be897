"""``python -m spotune.sft.schema`` writes core/schema.json from the pinned TRL's dataclasses.

JSON Schema draft-07: editors complete and check configs with it, the launcher refuses typos with it
without importing TRL. A test keeps the file true to the TRL that is installed.
"""

import dataclasses
import inspect
import json
import re
import types
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import spotune.core
from spotune.core.config_rules import FORMATS

Schema = dict[str, Any]
_KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}

# Keys whose annotation is narrower or wider than what TRL really takes from YAML.
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
    # TRL's parser reads every text here as yes or no, so that `all` and `non_padding` cannot be given
    "include_num_input_tokens_seen": {"type": "boolean", "default": False},
    "gradient_checkpointing": {"type": ["boolean", "null"]},
    "trackio_static_space_id": {"type": ["boolean", "string", "null"]},  # false, or a name
    "parallelism_config": {"type": "null"},  # no text or mapping becomes accelerate's class
}
_AT_LEAST_ONE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("lora_r", "lora_alpha", "max_length", "dataset_num_proc", "torch_empty_cache_steps"),
    *("eval_accumulation_steps", "dataloader_prefetch_factor", "ddp_timeout", "ddp_bucket_cap_mb"),
)
_AT_LEAST_ZERO = (
    *("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"),
    *("dataloader_num_workers", "eval_delay"),
)
_ABOVE_ZERO = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "test_split_size")
_SHARES = ("lora_dropout", "label_smoothing_factor")
_BETAS = ("adam_beta1", "adam_beta2")
_SEEDS = ("seed", "data_seed")  # numpy takes 32 bits
_LIMITS: dict[str, Schema] = {
    **{key: {"minimum": 1} for key in _AT_LEAST_ONE},
    **{key: {"minimum": 0} for key in _AT_LEAST_ZERO},
    **{key: {"exclusiveMinimum": 0} for key in _ABOVE_ZERO},
    **{key: {"minimum": 0, "maximum": 1} for key in _SHARES},
    **{key: {"minimum": 0, "exclusiveMaximum": 1} for key in _BETAS},
    **{key: {"minimum": 0, "maximum": 2**32 - 1} for key in _SEEDS},
}
_CHOICES: dict[str, list[str]] = {
    "packing_strategy": ["bfd", "bfd_split", "bfd-requeue", "wrapped"],
    "truncation_mode": ["keep_start", "keep_end"],
    "loss_type": ["nll", "dft", "chunked_nll"],
    "bnb_4bit_quant_storage": ["uint8", "int8", "float16", "bfloat16", "float32", "float64"],
    "torch_compile_mode": ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
}


def build() -> Schema:
    """The schema of a config: TRL's keys and ours."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    properties: Schema = {}
    for dataclass in (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig):
        hints = get_type_hints(dataclass)
        for entry in dataclasses.fields(dataclass):
            if entry.init:
                properties[entry.name] = _property(entry, hints[entry.name])
    properties["datasets"]["items"] = _dataset_item()
    properties["report_to"]["items"] = {"type": "string", "enum": _trackers()}
    properties["accelerator_config"]["properties"] = _accelerator_keys()
    properties["torch_compile_backend"]["enum"] = _compilers()
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


def _trackers() -> list[str]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return ["none", "all", *sorted(INTEGRATION_TO_CALLBACK)]


def _accelerator_keys() -> Schema:
    from transformers.trainer_pt_utils import AcceleratorConfig

    return {entry.name: {} for entry in dataclasses.fields(AcceleratorConfig)}


def _compilers() -> list[str | None]:
    """The backends of torch.compile, which accelerate takes in either case."""
    from accelerate.utils import DynamoBackend

    names = sorted(str(member.value) for member in DynamoBackend)
    return [*(name.lower() for name in names), *names, None]


def _scheduler_kwargs() -> Schema:
    """For each schedule the names that ``lr_scheduler_kwargs`` may have, and those that it needs."""
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


def _property(entry: Any, hint: Any) -> Schema:
    found = dict(_TYPES.get(entry.name) or _type(hint))
    choices = _CHOICES.get(entry.name) or list(entry.metadata.get("choices") or [])
    if choices:
        found["enum"] = [*choices, *([None] if "null" in _as_list(found.get("type")) else [])]
    found.update(_LIMITS.get(entry.name, {}))
    default = _default(entry)
    if default is not None and "default" not in found:
        found["default"] = default
    if help := _first_sentence(entry.metadata.get("help", "")):
        found["description"] = help
    return found


def _type(hint: Any) -> Schema:
    """A type hint as a schema."""
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
    if isinstance(default, Enum):
        default = default.value
    return default if isinstance(default, (str, int, float, bool)) else None


def _first_sentence(help: str) -> str:
    text = " ".join(str(help).split())
    first = re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"(])", text, maxsplit=1)[0]
    return first if len(first) <= 240 else first[:237].rsplit(" ", 1)[0] + " …"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _dataset_item() -> Schema:
    from trl.scripts.utils import DatasetConfig

    hints = get_type_hints(DatasetConfig)
    keys = {entry.name: _property(entry, hints[entry.name]) for entry in dataclasses.fields(DatasetConfig)}
    return {"type": "object", "additionalProperties": False, "required": ["path"], "properties": keys}


def _own_keys() -> Schema:
    profile = {"type": "object", "description": "Keys that this profile overlays."}
    return {
        "data": _key(
            ["array", "null"], "What to train on, mixed by weight; instead of TRL's datasets.", items=_source()
        ),
        "data_limit": _key(["integer", "null"], "At most so many training rows, and held-out rows.", minimum=1),
        "profiles": _key("object", "Overlays by name: dev and prod differ here.", additionalProperties=profile),
        "env": _key(["object", "null"], "Environment variables to set before anything is loaded."),
        "num_processes": _key(["integer", "null"], "Ranks on one machine; default one per GPU.", minimum=1),
        "keep_every": _key(["integer", "null"], "Keep every so many-th checkpoint for good.", minimum=1),
        "merge_adapter": _key(["boolean", "null"], "Also leave the adapter merged into its base, below merged/."),
    }


def _source() -> Schema:
    """An entry of ``data``."""
    keys = {
        "source": _key("string", "Path, glob, folder or URL: hf://org/name[@rev], s3://, gs://, https://."),
        "weight": _key("number", "Share of the mixture, in proportion to the other weights.", exclusiveMinimum=0),
        "format": _key("string", "Told from the columns when not given.", enum=list(FORMATS)),
        "columns": _key("object", "Our column names to the file's, e.g. {prompt: question, completion: answer}."),
        "limit": _key("integer", "Use the first so many rows only.", minimum=1),
        "split": _key("number", "Held out for evaluation: a share below 1, or a number of rows.", exclusiveMinimum=0),
        "dataset_config": _key("string", "hf:// only: the data set's configuration."),
        "dataset_split": _key("string", "hf:// only: the data set's split, default train."),
    }
    return {"type": "object", "additionalProperties": False, "required": ["source"], "properties": keys}


def _key(type: str | list[str], description: str, **rules: Any) -> Schema:
    return {"type": type, "description": description, **rules}


def path() -> Path:
    return Path(spotune.core.__file__).with_name("schema.json")


def main() -> None:
    path().write_text(json.dumps(build(), indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
