"""The keys of a config: known or not, and what to write instead of those of other versions and tools."""

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from spotune.core.config_values import Fault, bool_of, one_of, read_value, value_faults
from spotune.core.errors import refuse

# Keys that other versions and other tools have, and what to write instead.
#
# From the public SFT recipes of alignment-handbook, open-r1 and TRL, what transformers 4.40 to 5 and TRL 0.8 to 1
# renamed or removed, and the names that Axolotl, LLaMA-Factory, Unsloth and plain scripts give to the same thing.
# A test holds every new name to the schema.

# What has another name, and takes the same value.
_RENAMED = {
    "dtype": "torch_dtype bnb_4bit_compute_dtype compute_dtype model_dtype",
    "max_length": "max_seq_length max_seq_len max_sequence_length model_max_length sequence_len seq_length block_size"
    " cutoff_len context_length",
    "eval_strategy": "evaluation_strategy do_eval_strategy",
    "use_liger_kernel": "use_liger liger_kernel enable_liger_kernel",
    "model_name_or_path": "model_name model_id model model_path base_model base_model_name_or_path pretrained_model"
    " model_name_or_id",
    "model_revision": "revision model_code_revision revision_of_model",
    "use_cpu": "no_cuda",
    "hub_model_id": "push_to_hub_model_id repo_id",
    "hub_revision": "hub_model_revision",
    "per_device_train_batch_size": "per_gpu_train_batch_size train_batch_size batch_size micro_batch_size"
    " per_device_batch_size",
    "per_device_eval_batch_size": "per_gpu_eval_batch_size eval_batch_size",
    "gradient_accumulation_steps": "grad_accumulation_steps gradient_accumulation grad_accum_steps",
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "num_train_epochs": "epochs num_epochs n_epochs",
    "max_grad_norm": "gradient_clip_norm clip_grad_norm",
    "warmup_steps": "num_warmup_steps warmup_ratio warm_up_ratio",  # a warm-up below 1 is a share of all steps
    "optim": "optimizer optimizer_type",
    "use_peft": "use_lora",
    "lora_r": "lora_rank peft_lora_r lora_dim r",
    "lora_alpha": "peft_lora_alpha",
    "lora_dropout": "peft_lora_dropout",
    "lora_target_modules": "target_modules lora_target peft_target_modules",
    "lora_modules_to_save": "modules_to_save additional_target",
    "load_in_4bit": "load_4bit use_4bit",
    "load_in_8bit": "load_8bit use_8bit",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant use_double_quant use_nested_quant double_quantization",
    "attn_implementation": "attn_impl attention_implementation",
    "dataset_num_proc": "preprocessing_num_workers num_proc dataset_processes",
    "dataset_text_field": "text_column text_field",
    "dataset_train_split": "train_split dataset_split train_split_name dataset_train_name",
    "dataset_test_split": "test_split eval_split dataset_eval_split dataset_test_name",
    "dataset_config": "dataset_config_name dataset_subset",
    "dataset_name": "dataset_id dataset_name_or_path",
    "dataset_streaming": "stream_dataset",
    "test_split_size": "val_set_size val_size test_size validation_split eval_size",
    "data_limit": "max_samples max_train_samples",
    "packing": "sample_packing use_packing",
    "eval_packing": "eval_sample_packing",
    "shuffle_dataset": "dataset_shuffle shuffle",
    "report_to": "log_with",
    "run_name": "wandb_run_name wandb_name experiment_name",
    "save_total_limit": "max_checkpoints_to_keep",
    "save_steps": "checkpoint_every",
    "eval_steps": "eval_every",
    "logging_steps": "log_every log_interval",
    "ddp_backend": "xpu_backend",
    "dataloader_num_workers": "num_workers",
    "torch_compile_backend": "torchdynamo",
    "neftune_noise_alpha": "noise_alpha",
    "deepspeed": "deepspeed_config",
    "resume_from_checkpoint": "resume_from",
    "seed": "random_seed",
}
_NEW_NAMES = {old: new for new, olds in _RENAMED.items() for old in olds.split()}

# What becomes another key with a value of its own: old key -> (new key, the new value from the old one).
_REWRITTEN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "group_by_length": ("train_sampling_strategy", lambda on: "group_by_length" if on else "random"),
    "include_inputs_for_metrics": ("include_for_metrics", lambda on: ["inputs"] if on else []),
    "adafactor": ("optim", lambda on: "adafactor" if on else "adamw_torch_fused"),
    "use_flash_attention_2": ("attn_implementation", lambda on: "flash_attention_2" if on else "sdpa"),
    "use_flash_attn": ("attn_implementation", lambda on: "flash_attention_2" if on else "sdpa"),
    "use_flash_attention": ("attn_implementation", lambda on: "flash_attention_2" if on else "sdpa"),
    "flash_attention": ("attn_implementation", lambda on: "flash_attention_2" if on else "sdpa"),
    "flash_attn": (
        "attn_implementation",
        lambda on: "sdpa" if on in (False, "sdpa", "disabled") else "flash_attention_2",
    ),
    "gradient_checkpointing_use_reentrant": ("gradient_checkpointing_kwargs", lambda on: {"use_reentrant": on}),
    "use_reentrant": ("gradient_checkpointing_kwargs", lambda on: {"use_reentrant": on}),
    "fsdp_min_num_params": ("fsdp_config", lambda count: {"min_num_params": count}),
    "fsdp_transformer_layer_cls_to_wrap": ("fsdp_config", lambda name: {"transformer_layer_cls_to_wrap": name}),
    "dispatch_batches": ("accelerator_config", lambda on: {"dispatch_batches": on}),
    "split_batches": ("accelerator_config", lambda on: {"split_batches": on}),
    "train_on_inputs": ("completion_only_loss", lambda on: not on),
    "train_on_prompt": ("completion_only_loss", lambda on: not on),
    "train_on_responses_only": ("assistant_only_loss", lambda on: on),
    "use_kernels": ("model_init_kwargs", lambda on: {"use_kernels": on}),
    "rope_scaling": ("model_init_kwargs", lambda how: {"rope_scaling": how}),
    "device_map": ("model_init_kwargs", lambda how: {"device_map": how}),
    "wandb_project": ("env", lambda name: {"WANDB_PROJECT": name}),
    "wandb_entity": ("env", lambda name: {"WANDB_ENTITY": name}),
    "wandb_run_group": ("env", lambda name: {"WANDB_RUN_GROUP": name}),
    "wandb_watch": ("env", lambda name: {"WANDB_WATCH": name}),
    "wandb_log_model": ("env", lambda name: {"WANDB_LOG_MODEL": name}),
    "logging_dir": ("env", lambda folder: {"TENSORBOARD_LOGGING_DIR": folder}),
    "adapter": ("use_peft", lambda kind: kind in ("lora", "qlora")),
    "finetuning_type": ("use_peft", lambda kind: kind in ("lora", "qlora")),
    "lora_target_linear": ("lora_target_modules", lambda on: "all-linear" if on else None),
    "dataset": ("data", lambda name: [{"source": f"hf://{name}"}]),
    "train_file": ("data", lambda file: [{"source": file}]),
    "train_files": ("data", lambda files: [{"source": file} for file in _listed(files)]),
    "data_files": ("data", lambda files: [{"source": file} for file in _listed(files)]),
    "data_path": ("data", lambda file: [{"source": file}]),
    "dataset_path": ("data", lambda file: [{"source": file}]),
    "train_dataset": ("data", lambda name: [{"source": name}]),
    "dataset_mixture": ("datasets", lambda mixture: _mixture(mixture)),
    "dataset_mixer": ("datasets", lambda mixture: _mixture(mixture)),
}

# What is to be left out, and why.
_LEAVE_OUT = {
    "every run keeps its checkpoints in the bucket, and overwrites none": "overwrite_output_dir",
    "weights are always written as safetensors": "save_safetensors",
    "bf16 and fp16 say it all": "half_precision_backend fp16_backend fp16_opt_level use_amp apex",
    "the tokenizer is the model's": "tokenizer_name tokenizer_name_or_path tokenizer_revision tokenizer tokenizer_type"
    " use_fast_tokenizer tokenizer_use_fast",
    "give --secret HF_TOKEN": "push_to_hub_token use_auth_token hf_token token",
    "give --secret WANDB_API_KEY": "wandb_api_key wandb_key",
    "write hub_model_id: org/name": "push_to_hub_organization hub_organization",
    "packing needs max_length alone now": "num_of_sequences chars_per_token infinite",
    "the data set is prepared in batches of TRL's choice": "dataset_batch_size preprocessing_batch_size",
    "put it into datasets: [{path: …, name: …, split: …}]": "dataset_splits dataset_configs dataset_mixture_splits",
    "a system message belongs into the rows, or into the chat template": "auto_insert_empty_system_msg"
    " system_prompt default_system",
    "write completion_only_loss: true or assistant_only_loss: true": "instruction_template response_template"
    " roles_to_train train_on_eos",
    "transformers has no such setting any more": "jit_mode_eval use_ipex past_index mp_parameters tpu_num_cores"
    " tpu_metrics_debug ray_scope use_mps_device use_legacy_prediction_loop include_tokens_per_second"
    "",
    "write fsdp: true": "sharded_ddp fairscale",
    "write bf16: true, or fp16: true": "mixed_precision precision",
    "write load_in_4bit: true, or load_in_8bit: true": "quantization_bit bits",
    "it is of generation, and training generates nothing": "predict_with_generate generation_max_length"
    " generation_num_beams generation_config sortish_sampler num_completions_to_print num_return_sequences",
    "it is of preference or reward training, and spotune runs TRL's SFT alone": "beta max_prompt_length"
    " max_completion_length max_target_length num_generations reward_funcs reward_weights reward_model_path use_vllm"
    " vllm_mode vllm_gpu_memory_utilization vllm_server_host desirable_weight undesirable_weight"
    " precompute_ref_log_probs ref_model model_adapter_name ref_adapter_name sync_ref_model"
    " cosine_min_value_wrong cosine_max_value_wrong"
    " cosine_min_value_correct cosine_max_value_correct cosine_max_len repetition_n_grams repetition_max_penalty"
    " code_language temperature top_p top_k rpo_alpha simpo_gamma cpo_alpha is_encoder_decoder"
    " scale_rewards log_completions wandb_log_unique_prompts truncate_prompt",
    "spotune runs no benchmarks and no callbacks of the recipe's": "benchmarks callbacks push_to_hub_revision"
    " overwrite_hub_revision",
    "TRL's script has no such setting": "sanity_check gradient_checkpointing_offload use_unsloth use_unsloth_gc"
    " do_sample strict pad_to_sequence_len special_tokens sample_packing_eff_est dataset_prepared_path plugins"
    " overwrite_cache dataset_dir plot_loss stage template lora_bias bias lora_fan_in_fan_out is_llama_derived_model"
    " group_by_length_column xformers_attention s2_attention trl",
    "it is an option of spotune train": "num_nodes gpus infra budget use_spot save_every stall_after",
}
_REASONS = {old: reason for reason, olds in _LEAVE_OUT.items() for old in olds.split()}


def advice(key: str, value: Any) -> tuple[str, Any, str] | None:
    """(new key, its value, why) for a key that is known from elsewhere; the new key is empty for one to leave out."""
    if key == "chat_template":
        return ("", None, "put the template into a file and write chat_template_path: chat_template.jinja")
    if reason := _REASONS.get(key):
        return ("", None, reason if reason.startswith(("write", "put")) else f"leave it out: {reason}")
    if value is None and new_name(key):
        return ("", None, f"leave it out: its new name is {new_name(key)}")
    if key in _NEW_NAMES:
        return (_NEW_NAMES[key], value, "renamed")
    if key in _REWRITTEN:
        name, convert = _REWRITTEN[key]
        return (name, convert(value), f"renamed{_left_over(key, value)}")
    return None


def new_name(key: str) -> str:
    """Today's name of an old key; empty for one that is not known, or has no successor."""
    return _NEW_NAMES.get(key) or (_REWRITTEN[key][0] if key in _REWRITTEN else "")


def old_names() -> Iterable[str]:
    """All keys that ``advice`` knows."""
    return ["chat_template", *_NEW_NAMES, *_REWRITTEN, *_REASONS]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _left_over(key: str, value: Any) -> str:
    """What of a mixture goes elsewhere."""
    if not key.startswith("dataset_mix") or not isinstance(value, dict):
        return ""
    entries = value.get("datasets")
    shares = [entry.get("weight") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    shares = shares or list(value.values())
    found = "; test_split_size goes beside it" if value.get("test_split_size") else ""
    if any(isinstance(share, float) and share != 1 for share in shares):
        found += "; for a part of a data set give data with limit"
    return found


def _mixture(mixture: Any) -> list[dict[str, Any]]:
    """A mixture of the handbook's or open-r1's, ``{datasets: [{id, …}]}`` or ``{id: share}``, as TRL's ``datasets``."""
    if not isinstance(mixture, dict):
        return []
    entries = mixture.get("datasets")
    if not isinstance(entries, list):
        return [{"path": name} for name in mixture]
    names = {"id": "path", "config": "name", "split": "split", "columns": "columns"}
    return [
        {new: entry[old] for old, new in names.items() if entry.get(old) is not None}
        for entry in entries
        if isinstance(entry, dict)
    ]


# The keys of a config: known or not, of the right kind or not, as ``schema.json`` says.

_OWN = ("data_limit", "num_processes", "keep_every")  # numbers that no library reads


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a config, as editors use it too."""
    found: dict[str, Any] = json.loads(resources.files("spotune.core").joinpath("schema.json").read_bytes())
    return found


def check_keys(config: Mapping[str, Any], where: object) -> None:
    """Raises InputError for all unknown keys and all values of the wrong kind."""
    refuse(where, key_faults(config))


def key_faults(config: Mapping[str, Any]) -> Iterator[Fault]:
    """Unknown keys, with what to write instead, and values of the wrong kind."""
    known = schema()["properties"]
    for key, value in config.items():
        if key not in known:
            yield Fault(key, "unknown key", _instead(key, value, config))
            continue
        faults = list(value_faults(key, value, known[key]))
        yield from faults
        if key == "datasets" and isinstance(value, list) and not faults:
            yield from _dataset_faults(value, known[key]["items"])


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with each value as the kind that TRL reads from it: ``"1e-4"`` is 0.0001, ``y`` is true."""
    known = schema()["properties"]
    return {key: read_value(value, known[key]) if key in known else value for key, value in config.items()}


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config for the record: as it is written, but for values that readers other than TRL could not take.

    Spotune's own keys are numbers, ``none`` for an open number is null, and the number of a text key is text.
    """
    read = settled(config)
    return {
        key: read[key] if key in _OWN or read[key] is None or isinstance(read[key], (str, list)) else value
        for key, value in config.items()
    }


def _instead(key: str, value: Any, config: Mapping[str, Any]) -> str:
    """The remedy for an unknown key."""
    known = schema()["properties"]
    old = advice(key, value)
    if old:
        return _of_old_key(old, config)
    if isinstance(value, dict) and any(inner in known for inner in value):
        return f"keys are flat: write {', '.join(map(str, value))} without {key}"
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]}?" if near else "see docs/reference/config.md"


def _of_old_key(old: tuple[str, Any, str], config: Mapping[str, Any]) -> str:
    """What to write for an old key, with the user's own value where the new key takes it."""
    name, value, text = old
    if not name:
        return text
    if name in config and isinstance(value, dict):
        return f"put {', '.join(map(str, value))} into {name}"
    if config.get(name):
        return f"leave it out, since {name} is given"
    is_taken = not list(key_faults({name: value}))
    return f"{text}; write {name}: {_as_yaml(value) if is_taken else '…'}"


def _as_yaml(value: Any) -> str:
    """A value as it is written in one line of YAML."""
    import yaml

    if isinstance(value, list) and len(value) > 1 and all(isinstance(entry, dict) for entry in value):
        return f"[{_as_yaml(value[0])}, …]"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _dataset_faults(entries: list[Any], rule: Mapping[str, Any]) -> Iterator[Fault]:
    for index, entry in enumerate(entries):
        row = f"datasets[{index}]"
        if not isinstance(entry, dict) or not entry.get("path"):
            yield Fault(row, "needs a path", "{path: json, data_files: rows.jsonl}")
            continue
        for key, value in entry.items():
            if key not in rule["properties"]:
                yield Fault(f"{row}.{key}", "unknown key", one_of(rule["properties"]))
            else:
                yield from value_faults(f"{row}.{key}", value, rule["properties"][key])


def is_on(config: Mapping[str, Any], key: str) -> bool:
    """Whether a true-or-false key is true; YAML gives some as text."""
    value = config.get(key)
    answer = bool_of(value)
    return bool(value) if answer is None else answer
