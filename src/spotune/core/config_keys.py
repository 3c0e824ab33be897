"""The keys of a config: the type and the limits of each value, names that ``env:`` may set, and keys of other tools."""

import difflib
import json
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from spotune.core.errors import refuse, shown

# One value of a config, read as TRL's parser reads it from YAML.
#
# TRL gives YAML's own numbers, booleans and lists to its dataclasses as they are, and converts text to the key's type:
# ``int``, ``float``, or one of ten words for yes and no. YAML 1.1 decides what is text: ``1e1`` and ``1e-4`` are,
# ``yes`` and ``off`` are not, ``y`` and ``t`` are. What TRL accepts unchecked and fails on later is refused here.

_BOOLS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}
_KINDS: dict[str, tuple[type, str]] = {
    **{"integer": (int, "a whole number"), "number": (float, "a number"), "boolean": (bool, "true or false")},
    **{"string": (str, "text"), "array": (list, "a list"), "object": (dict, "a mapping")},
}
# limit in the schema -> (when a number is beyond it, what the number is then, words before the limit)
_LIMITS: dict[str, tuple[Callable[[float, float], bool], str, str]] = {
    "minimum": (operator.lt, "too small", "at least"),
    "exclusiveMinimum": (operator.le, "too small", "above"),
    "maximum": (operator.gt, "too large", "at most"),
    "exclusiveMaximum": (operator.ge, "too large", "below"),
}


class ConfigFault(NamedTuple):
    """What is wrong with a key, and what to write instead."""

    key: str
    what: str
    remedy: str = ""


def value_faults(key: str, value: Any, rule: Mapping[str, Any]) -> Iterator[ConfigFault]:
    """Compares a value with its rule in the schema: kind, choices, limits, and the values inside it."""
    kinds = kinds_of(rule)
    read = read_value(value, rule)
    if read is None:
        if value is None and kinds and "null" not in kinds:
            yield ConfigFault(key, f"null is not {_spell(kinds)}", _instead_of_null(key, rule))
        return
    if kinds and not any(_is_kind(read, kind) for kind in kinds):
        yield ConfigFault(key, f"{shown(value)} is not {_spell(kinds)}", _remedy(key, value, rule, kinds))
        return
    choices = rule.get("enum") or (rule.get("items", {}).get("enum") if isinstance(read, str) else None)
    if choices and read not in choices:
        near = difflib.get_close_matches(str(read), map(str, choices), n=1)
        named = one_of(str(choice) for choice in choices if choice)
        yield ConfigFault(key, f"{shown(value)} is not known", f"did you mean {near[0]}?" if near else named)
        return
    number = number_of(read)
    for name, (is_beyond, what, words) in _LIMITS.items():
        if number is not None and name in rule and is_beyond(number, rule[name]):
            yield ConfigFault(key, f"{shown(value)} is {what}", f"{words} {rule[name]}")
    if isinstance(read, list) and "items" in rule and rule["items"].get("type") != "object":
        for index, inner in enumerate(read):
            yield from value_faults(f"{key}[{index}]", inner, rule["items"])
    if "properties" in rule:
        for name in mapping_of(read):
            if name not in rule["properties"]:
                yield ConfigFault(f"{key}.{name}", "unknown key", one_of(rule["properties"]))


def read_value(value: Any, rule: Mapping[str, Any]) -> Any:
    """Returns the value converted to a kind that the rule names; a value that fits none of them stays as it is."""
    kinds = kinds_of(rule)
    if "boolean" in kinds and (isinstance(value, (bool, int)) or "string" not in kinds):
        answer = bool_of(value)
        return value if answer is None else answer
    if "integer" in kinds or "number" in kinds:
        return _read_number(value, kinds)
    if "string" in kinds and "object" not in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and "items" in rule and rule["items"].get("type") != "object":
        return [read_value(inner, rule["items"]) for inner in value]
    return value


def _read_number(value: Any, kinds: set[str]) -> Any:
    """Returns a number from a number or from text; other text stays text. TRL reads "none" and "null" as null."""
    if isinstance(value, str) and "string" not in kinds:
        if "null" in kinds and value.lower() in ("none", "null"):
            return None
        try:
            return int(value) if "number" not in kinds else float(value)
        except ValueError:
            return value
    if isinstance(value, float) and "number" not in kinds and value.is_integer():
        return int(value)
    return value


def bool_of(value: Any) -> bool | None:
    """Returns the boolean that one of TRL's words, or 1 or 0, stands for; None for anything else."""
    if isinstance(value, str):
        return _BOOLS.get(value.lower())
    return bool(value) if isinstance(value, (bool, int)) and value in (0, 1) else None


def is_on(config: Mapping[str, Any], key: str) -> bool:
    """Returns whether a boolean key is true; YAML reads some booleans as text."""
    value = config.get(key)
    answer = bool_of(value)
    return bool(value) if answer is None else answer


def number_of(value: Any) -> float | None:
    """Returns a number, also from text as YAML 1.1 leaves it, infinite beyond a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf if isinstance(value, int) and value > 0 else -math.inf


def mapping_of(value: Any) -> dict[str, Any]:
    """Returns a mapping, also from its JSON text; empty for anything else."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return value if isinstance(value, dict) else {}


def kinds_of(rule: Mapping[str, Any]) -> set[str]:
    """Returns the JSON types that a rule names; empty if it accepts any."""
    kinds = rule.get("type") or ()
    return {kinds} if isinstance(kinds, str) else set(kinds)


def one_of(names: Iterable[str]) -> str:
    """Returns a remedy that lists the known names; empty if there are none."""
    listed = ", ".join(names)
    return f"one of {listed}" if listed else ""


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "number":
        number = None if isinstance(value, str) else number_of(value)
        return number is not None and math.isfinite(number)
    is_type = kind in _KINDS and isinstance(value, _KINDS[kind][0])
    return is_type and (kind == "boolean" or not isinstance(value, bool))


def _remedy(key: str, value: Any, rule: Mapping[str, Any], kinds: set[str]) -> str:
    """Returns what the user probably meant; empty if that is not clear."""
    if isinstance(value, bool) and "string" in kinds:
        meant = "no" if value is False and "no" in rule.get("enum", ("no",)) else "yes"  # YAML 1.1 reads a bare no
        return f'write it in quotes: "{meant}"' if meant in rule.get("enum", (meant,)) else ""
    number = number_of(value)
    if "integer" in kinds and isinstance(value, str) and number is not None and number.is_integer():
        return f"write {key}: {int(number)}"
    if "array" in kinds and isinstance(value, str) and value and rule.get("items", {}).get("type") == "string":
        return f"write {key}: [{value}]"
    return ""


def _instead_of_null(key: str, rule: Mapping[str, Any]) -> str:
    """Returns the remedy for a key that does not accept null: the word "none", or no key, for the default."""
    default = rule.get("default")
    if default == "none":
        return f"write {key}: none"
    return "leave the key out" + ("" if default is None else f" for {json.dumps(default)}")


def _spell(kinds: set[str]) -> str:
    return " or ".join(words for kind, (_, words) in _KINDS.items() if kind in kinds) or "anything but null"


# Names that a config's ``env:`` may set. The launcher and the guard apply the same rule.
#
# Somebody else may have written the config or the record in the bucket. A name that decides which code runs, or where
# a token is sent, is refused unless the user allows it by name with ``--allow-env``.

FLAG = "--allow-env"
# These names decide neither code nor a host, although a pattern below matches them.
HARMLESS = frozenset(
    "PYTHONDONTWRITEBYTECODE PYTHONFAULTHANDLER PYTHONHASHSEED PYTHONIOENCODING PYTHONNOUSERSITE PYTHONSAFEPATH"
    " PYTHONTRACEMALLOC PYTHONUNBUFFERED PYTHONUTF8 ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH"
    " ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH".split()
)
# reason -> patterns of names, upper case. Whole families, since a library unknown to us names its plugins alike.
_PATTERNS = {
    "decides what the loader loads": "LD_* DYLD_* GLIBC_TUNABLES GCONV_PATH GETCONF_DIR LOCPATH NLSPATH MALLOC_TRACE"
    " *_PRELOAD *LIBRARY_PATH *_PROVIDER_PATH *_INJECTION*_PATH *_MODULE*_PATH *_TOOL*_PATH LIBRARY_PATH SASL_PATH"
    " HSA_TOOLS_LIB NIS_PATH *PLUGIN* *_MODULE_DIR* *_LIB *_LIBS *_LIBRARY *_LIBRARIES *_LIBDIR *_LIB*_DIR *_SO *_DLL"
    " OMP_TOOL* NCCL_CONF_FILE OPENSSL_* LIBPATH SHLIB_PATH OCL_ICD_* VK_* KRB5_* OMPI_* OPAL_* PMIX_* PRTE_*"
    " NVSHMEM_* RDMAV_DRIVERS IBV_DRIVERS HADOOP_* ODBC* TVM_* DEEPSPEED_*_LIB* UCX_*MODULE* INTEL_*",
    "decides which programs and modules run": "PYTHON* PATH HOME USER LOGNAME SHELL BASH* ENV IFS CDPATH PS4 ZDOTDIR"
    " PROMPT_COMMAND SHELLOPTS PERL* RUBY* GEM_* NODE_* LUA_* JAVA_* _JAVA_* JDK_* CLASSPATH VIRTUAL_ENV CONDA_* PIP_*"
    " UV_* GIT_* SSH_* BROWSER EDITOR VISUAL PAGER MANPAGER LESSOPEN LESSCLOSE XDG_* *_EXECUTABLE *_COMMAND *_CMD"
    " COVERAGE_* PYDEVD* DEBUGPY* IPYTHON* JUPYTER* MPLBACKEND MPLCONFIGDIR MATPLOTLIBRC HF_MODULES_CACHE"
    " *TRUST_REMOTE_CODE *_CODE_EVAL TRANSFORMERS_TEST_* TORCH_HOME TORCH_HUB* TORCH_PYTHON_NATIVE_* SM_FRAMEWORK_*"
    " OTEL_* *NO_WEIGHTS_ONLY* WANDB__EXECUTABLE WANDB_DOCKER",
    "decides which compiler or compiled code runs": "*_INCLUDE_PATH COMPILER_PATH CUDA_PATH ROCM_PATH CUDA_CACHE_PATH"
    " CC CXX CPP CFLAGS CXXFLAGS CPPFLAGS LDFLAGS CPATH *_COMPILER CUDACXX GCC_EXEC_PREFIX CUDA_HOME CUDA_ROOT"
    " ROCM_HOME NVCC_* ONEAPI_ROOT CUDNN_* HALIDE_* TRITON_*PATH* TRITON_*CACHE* TRITON_*DIR TRITON_*HOME"
    " TRITON_*OVERRIDE* TRITON_*BACKEND* TRITON_*HOST* TRITON_*REDIS* TRITON_*HOOK* TORCHINDUCTOR_*DIR"
    " TORCHINDUCTOR_*REDIS* TORCHINDUCTOR_CXX TORCHINDUCTOR_CPP_MARCH TORCH_EXTENSIONS_DIR PYTORCH_NVCC CMAKE_*"
    " LOCAL_KERNELS KERNELS_* USE_HUB_KERNELS NUMBA_CACHE_* QUACK_CACHE_* TILELANG_* CUDAHOSTCXX FLASHINFER_* CUPY_*"
    " CUTE_DSL_* DS_BUILD_*",
    "decides where traffic and tokens go": "*_PROXY *_PROXIES SSL_* SSLKEYLOGFILE *_CA_BUNDLE *_CA_CERTS *_CA_CERT"
    " *_ENDPOINT *_ENDPOINTS *_ENDPOINT_* *_URL *_URLS *_URL_* *_URI *_HOST *_HOSTS *_ADDR *_ADDRESS *_SERVER"
    " *_GATEWAY *_CONNECTION_STRING NCCL_COMM_ID HUGGINGFACE_CO_* HOSTALIASES LOCALDOMAIN RES_OPTIONS RESOLV_HOST_CONF"
    " *_METADATA_* GCE_METADATA* FSSPEC_* *_UNIVERSE_DOMAIN HF_OIDC_* HF_DEVICE_CODE_* TRACKIO_S* CLEARML_CONFIG_*"
    " *_DSN COMET_CONFIG* WANDB_IDENTITY_*",
    "decides whose credentials are used": "AWS_CONFIG_FILE AWS_SHARED_CREDENTIALS_FILE AWS_PROFILE AWS_WEB_IDENTITY_*"
    " AWS_CONTAINER_* AWS_ROLE_* BOTO_* GOOGLE_APPLICATION_* GOOGLE_AUTH_* CLOUDSDK_* AZURE_CONFIG_DIR AZURE_CLIENT_*"
    " AZURE_STORAGE_* KUBECONFIG DOCKER_CONFIG NETRC CURL_HOME HF_HOME HF_TOKEN_PATH WANDB_CONFIG_DIR",
}


def why_refused(name: str) -> str:
    """Returns what the name decides, if a config may not set it without the flag; empty for any other name."""
    upper = name.upper()
    if upper in HARMLESS:
        return ""
    return next((why for why, patterns in _PATTERNS.items() if _matches(upper, patterns)), "")


def env_faults(env: Any, allowed: Collection[str] = ()) -> Iterator[ConfigFault]:
    """Yields what is wrong with a config's ``env``. ``allowed``: refused names that the user allowed."""
    if not isinstance(env, Mapping):
        yield ConfigFault("env", f"{shown(env)} is not a mapping", "env: {NCCL_DEBUG: INFO}")
        return
    for name, value in env.items():
        key = f"env.{name}"
        if not isinstance(name, str) or not name.isidentifier():
            yield ConfigFault(key, "is not the name of an environment variable", "env: {NCCL_DEBUG: INFO}")
        elif _matches(name.upper(), "SPOTUNE_* SKYPILOT_*"):
            yield ConfigFault(key, "is for spotune to set", "leave it out")
        elif name not in allowed and (why := why_refused(name)):
            yield ConfigFault(key, why, f"leave it out, or allow it: {FLAG} {name}")
        elif not isinstance(value, (str, int, float)) or (isinstance(value, str) and "\0" in value):
            yield ConfigFault(key, f"{shown(value)} is not text", f'{name}: "1"')


def check_env(config: Mapping[str, Any], where: object, allowed: Collection[str]) -> None:
    """Raises InputError for a name that a record's config sets and that is not allowed on this machine."""
    refuse(where, env_faults(config.get("env") or {}, allowed))


def allowed_in(config: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """Returns the names that the config's ``env`` sets because the user allowed them, sorted."""
    env = config.get("env")
    return sorted(name for name in set(allowed) if isinstance(env, Mapping) and name in env and why_refused(name))


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


# Keys of other versions and other tools, and what to write instead.
#
# They come from the public SFT recipes of alignment-handbook, open-r1 and TRL, from what transformers 4.40 to 5 and
# TRL 0.8 to 1 renamed or removed, and from Axolotl, LLaMA-Factory, Unsloth and plain scripts. A test holds every new
# name to the schema.

# new name -> old names that take the same value
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


def _mixture(mixture: Any) -> list[dict[str, Any]]:
    """Converts the handbook's and open-r1's mixture, ``{datasets: [{id, …}]}`` or ``{id: share}``, to ``datasets``."""
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


def _within(key: str, name: str) -> tuple[str, Callable[[Any], Any]]:
    """Returns the new key and value of an old key that became ``name`` in the mapping ``key``."""
    return key, lambda value: {name: value}


def _source(value: Any) -> list[dict[str, Any]]:
    return [{"source": file} for file in (value if isinstance(value, list) else [value])]


_WANDB = ("project", "entity", "run_group", "watch", "log_model")
# old key -> (new key, function from the old value to the new one)
REPLACED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{old: (new, lambda value: value) for new, olds in _RENAMED.items() for old in olds.split()},
    "group_by_length": ("train_sampling_strategy", lambda on: "group_by_length" if on else "random"),
    "include_inputs_for_metrics": ("include_for_metrics", lambda on: ["inputs"] if on else []),
    "adafactor": ("optim", lambda on: "adafactor" if on else "adamw_torch_fused"),
    **dict.fromkeys(
        "use_flash_attention_2 use_flash_attn use_flash_attention flash_attention".split(),
        ("attn_implementation", lambda on: "flash_attention_2" if on else "sdpa"),
    ),
    "flash_attn": (
        "attn_implementation",
        lambda on: "sdpa" if on in (False, "sdpa", "disabled") else "flash_attention_2",
    ),
    "gradient_checkpointing_use_reentrant": _within("gradient_checkpointing_kwargs", "use_reentrant"),
    "use_reentrant": _within("gradient_checkpointing_kwargs", "use_reentrant"),
    "fsdp_min_num_params": _within("fsdp_config", "min_num_params"),
    "fsdp_transformer_layer_cls_to_wrap": _within("fsdp_config", "transformer_layer_cls_to_wrap"),
    **{name: _within("accelerator_config", name) for name in ("dispatch_batches", "split_batches")},
    **{name: _within("model_init_kwargs", name) for name in ("use_kernels", "rope_scaling", "device_map")},
    **{f"wandb_{name}": _within("env", f"WANDB_{name.upper()}") for name in _WANDB},
    "logging_dir": _within("env", "TENSORBOARD_LOGGING_DIR"),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), ("completion_only_loss", operator.not_)),
    "train_on_responses_only": ("assistant_only_loss", lambda on: on),
    **dict.fromkeys(("adapter", "finetuning_type"), ("use_peft", lambda kind: kind in ("lora", "qlora"))),
    "lora_target_linear": ("lora_target_modules", lambda on: "all-linear" if on else None),
    "dataset": ("data", lambda name: [{"source": f"hf://{name}"}]),
    **dict.fromkeys(
        "train_file train_files data_files data_path dataset_path train_dataset".split(), ("data", _source)
    ),
    **dict.fromkeys(("dataset_mixture", "dataset_mixer"), ("datasets", _mixture)),
}

# why a key is to be left out -> keys
_LEAVE_OUT = {
    "put the template into a file and write chat_template_path: chat_template.jinja": "chat_template",
    "every run keeps its checkpoints in the bucket and overwrites none": "overwrite_output_dir",
    "weights are always written as safetensors": "save_safetensors",
    "bf16 and fp16 decide the precision": "half_precision_backend fp16_backend fp16_opt_level use_amp apex",
    "the tokenizer is the model's": "tokenizer_name tokenizer_name_or_path tokenizer_revision tokenizer tokenizer_type"
    " use_fast_tokenizer tokenizer_use_fast",
    "give --secret HF_TOKEN": "push_to_hub_token use_auth_token hf_token token",
    "give --secret WANDB_API_KEY": "wandb_api_key wandb_key",
    "write hub_model_id: org/name": "push_to_hub_organization hub_organization",
    "packing needs max_length alone now": "num_of_sequences chars_per_token infinite",
    "the data set is prepared in batches of TRL's choice": "dataset_batch_size preprocessing_batch_size",
    "put it into datasets: [{path: …, name: …, split: …}]": "dataset_splits dataset_configs dataset_mixture_splits",
    "write the system message into the rows, or into the chat template": "auto_insert_empty_system_msg"
    " system_prompt default_system",
    "write completion_only_loss: true or assistant_only_loss: true": "instruction_template response_template"
    " roles_to_train train_on_eos",
    "transformers has removed this setting": "jit_mode_eval use_ipex past_index mp_parameters tpu_num_cores"
    " tpu_metrics_debug ray_scope use_mps_device use_legacy_prediction_loop include_tokens_per_second",
    "write fsdp: true": "sharded_ddp fairscale",
    "write bf16: true, or fp16: true": "mixed_precision precision",
    "write load_in_4bit: true, or load_in_8bit: true": "quantization_bit bits",
    "it is for generation, and training generates nothing": "predict_with_generate generation_max_length"
    " generation_num_beams generation_config sortish_sampler num_completions_to_print num_return_sequences",
    "it is for preference or reward training, and spotune runs only TRL's SFT": "beta max_prompt_length"
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
LEFT_OUT = {old: reason for reason, olds in _LEAVE_OUT.items() for old in olds.split()}


def advice(key: str, value: Any) -> tuple[str, Any, str] | None:
    """Returns (new key, its value, why) for an old key, with "" as the new key of one to leave out; None if unknown."""
    if reason := LEFT_OUT.get(key):
        return "", None, reason if reason.startswith(("write", "put")) else f"leave it out: {reason}"
    if key not in REPLACED:
        return None
    name, convert = REPLACED[key]
    if value is None:
        return "", None, f"leave it out: its new name is {name}"
    return name, convert(value), f"renamed{_left_over(key, value)}"


def _left_over(key: str, value: Any) -> str:
    """Returns which parts of a mixture other keys take."""
    if not key.startswith("dataset_mix") or not isinstance(value, dict):
        return ""
    entries = value.get("datasets")
    shares = [entry.get("weight") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    found = "; test_split_size goes beside it" if value.get("test_split_size") else ""
    if any(isinstance(share, float) and share != 1 for share in shares or value.values()):
        found += "; for a part of a data set give data with limit"
    return found


# The keys of a config, checked against ``schema.json``: whether each is known and its value is of the right kind.


@cache
def schema() -> dict[str, Any]:
    """Returns the JSON schema of a config, which editors use too."""
    found: dict[str, Any] = json.loads(resources.files("spotune.core").joinpath("schema.json").read_bytes())
    return found


def key_faults(config: Mapping[str, Any]) -> Iterator[ConfigFault]:
    """Yields unknown keys, with what to write instead, and values of the wrong kind."""
    known = schema()["properties"]
    for key, value in config.items():
        if key not in known:
            yield ConfigFault(key, "unknown key", _instead(key, value, config))
            continue
        faults = list(value_faults(key, value, known[key]))
        yield from faults
        if key == "datasets" and isinstance(value, list) and not faults:
            yield from _dataset_faults(value, known[key]["items"]["properties"])


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config with each value as TRL reads it: ``"1e-4"`` is 0.0001, ``y`` is true."""
    known = schema()["properties"]
    return {key: read_value(value, known[key]) if key in known else value for key, value in config.items()}


def recorded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config for the record: as written, except for values that only TRL can read.

    Spotune's own keys become numbers, ``none`` for an optional number becomes null, and a number given for a text key
    becomes text.
    """
    own = ("data_limit", "num_processes", "keep_every")  # numbers that no library reads
    read = settled(config)
    return {
        key: read[key] if key in own or read[key] is None or isinstance(read[key], (str, list)) else value
        for key, value in config.items()
    }


def _instead(key: str, value: Any, config: Mapping[str, Any]) -> str:
    """Returns the remedy for an unknown key, with the user's own value if the new key accepts it."""
    known = schema()["properties"]
    old = advice(key, value)
    if old is None:
        if isinstance(value, dict) and any(inner in known for inner in value):
            return f"keys are flat: write {', '.join(map(str, value))} without {key}"
        near = difflib.get_close_matches(key, known, n=1)
        return f"did you mean {near[0]}?" if near else "see docs/reference/config.md"
    name, new_value, text = old
    if not name:
        return text
    if name in config and isinstance(new_value, dict):
        return f"put {', '.join(map(str, new_value))} into {name}"
    if config.get(name):
        return f"leave it out, since {name} is given"
    is_accepted = not list(key_faults({name: new_value}))
    return f"{text}; write {name}: {_as_yaml(new_value) if is_accepted else '…'}"


def _as_yaml(value: Any) -> str:
    """Writes a value as one line of YAML."""
    import yaml

    if isinstance(value, list) and len(value) > 1 and all(isinstance(entry, dict) for entry in value):
        return f"[{_as_yaml(value[0])}, …]"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _dataset_faults(entries: list[Any], known: Mapping[str, Any]) -> Iterator[ConfigFault]:
    for index, entry in enumerate(entries):
        row = f"datasets[{index}]"
        if not isinstance(entry, dict) or not entry.get("path"):
            yield ConfigFault(row, "needs a path", "{path: json, data_files: rows.jsonl}")
            continue
        for key, value in entry.items():
            if key not in known:
                yield ConfigFault(f"{row}.{key}", "unknown key", one_of(known))
            else:
                yield from value_faults(f"{row}.{key}", value, known[key])
