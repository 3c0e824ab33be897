"""Keys of a config that do not go together, and what a config as a whole must have."""

import difflib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from spotune.core.config_keys import Fault, env_faults, is_on, mapping_of, number_of, one_of, schema, settled
from spotune.core.errors import refuse, shown

# Keys of TRL that do not go together, as TRL and transformers refuse them on the machine.
#
# Each rule is one check of ``TrainingArguments``, ``SFTConfig``, ``ModelConfig``, ``Trainer`` or ``SFTTrainer`` that
# the config alone decides. What a GPU, an installed package or the rows decide stays with the machine.

METRICS = (  # what SFTTrainer's evaluation reports, each with `eval_` before it
    *("loss", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss"),
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time"),
)
_FOLLOWS_THE_METRIC = ("reduce_lr_on_plateau", "greedy")
_LOW_RANK = ("galore", "apollo")  # optimizers that need to know their layers
# Names inside ``model_init_kwargs`` that run code or send a token where no plan shows it -> remedy.
_NOT_INSIDE = {
    "trust_remote_code": "write trust_remote_code: true as a key of its own",
    "weights_only": "leave it out: weights are read without running code",
    "token": "leave it out, and give --secret HF_TOKEN",
    "use_auth_token": "leave it out, and give --secret HF_TOKEN",
    "proxies": "leave it out, and give --env HTTPS_PROXY=…",
    "cache_dir": "leave it out, and give --env HF_HOME=…",
}
_OWN_FILES = ("fsdp_config", "deepspeed", "accelerator_config")  # a mapping, JSON, or the path of a file


class Unreadable(Exception):
    """A rule asked for a key whose own value is wrong: that is reported already."""


class View:
    """A config's values with TRL's defaults for what it leaves out."""

    def __init__(self, config: Mapping[str, Any], faulty: frozenset[str]) -> None:
        self._config, self._faulty = config, faulty

    def __getitem__(self, key: str) -> Any:
        if key in self._faulty:
            raise Unreadable(key)
        return self._config[key] if key in self._config else schema()["properties"].get(key, {}).get("default")

    @property
    def evaluates(self) -> bool:
        return bool(self["eval_strategy"] != "no")

    @property
    def checkpoints_activations(self) -> bool:
        """transformers' new name of the key wins over the old one."""
        new = self["activation_checkpointing"]
        return bool(self["gradient_checkpointing"] if new is None else new)

    @property
    def checkpointing_kwargs(self) -> dict[str, Any]:
        new = self["activation_checkpointing_kwargs"]
        return mapping_of(self["gradient_checkpointing_kwargs"] if new is None else new)


def rule_faults(config: Mapping[str, Any], faulty: frozenset[str] = frozenset()) -> Iterator[Fault]:
    """What does not go together in a config of settled values; ``faulty``: keys whose own values are wrong."""
    view = View(config, faulty)
    for rule in RULES:
        try:
            found = list(rule(view))
        except Unreadable:
            continue
        yield from found


def _intervals(view: View) -> Iterator[Fault]:
    for name in ("logging", "eval", "save"):
        key = f"{name}_steps"
        if view[f"{name}_strategy"] != "steps" or view[key] is None:
            continue
        if view[key] > 1 and view[key] != int(view[key]):
            remedy = f"write {key}: {int(view[key])}, or a share of all steps below 1"
            yield Fault(key, f"{shown(view[key])} is not a whole number", remedy)


def _best_model(view: View) -> Iterator[Fault]:
    if not view["load_best_model_at_end"] or view["save_strategy"] == "best":
        return
    evaluation, saving = view["eval_strategy"], view["save_strategy"]
    if evaluation != saving:
        what = f"load_best_model_at_end needs it to match eval_strategy: {evaluation}, and it is {saving}"
        remedy = f"write eval_strategy: {saving}" if evaluation == "no" else f"write save_strategy: {evaluation}"
        yield Fault("save_strategy", what, remedy)
        return
    every, saved = view["eval_steps"] or view["logging_steps"], view["save_steps"]
    if evaluation != "steps" or saved % every == 0:
        return
    if (every < 1) != (saved < 1):
        what = f"load_best_model_at_end cannot match {shown(saved)} with eval_steps: {shown(every)}"
        yield Fault("save_steps", what, "both as shares of all steps, or both as numbers of steps")
    elif every >= 1 or (saved * 1_000_000) % (every * 1_000_000) != 0:
        what = f"load_best_model_at_end needs a multiple of eval_steps: {shown(every)}, not {shown(saved)}"
        yield Fault("save_steps", what, f"write save_steps: {shown(every)}")


def _metric(view: View) -> Iterator[Fault]:
    key, metric = "metric_for_best_model", view["metric_for_best_model"]
    follows = view["load_best_model_at_end"] or view["lr_scheduler_type"] in _FOLLOWS_THE_METRIC
    if view["save_strategy"] == "best" and metric is None and not follows:
        yield Fault(key, "missing, and save_strategy: best needs one", f"write {key}: loss")
    if metric is not None and view.evaluates and str(metric).removeprefix("eval_") not in METRICS:
        yield Fault(key, f"an evaluation does not report {shown(metric)}", one_of(METRICS))


def _evaluation(view: View) -> Iterator[Fault]:
    if view["lr_scheduler_type"] in _FOLLOWS_THE_METRIC and not view.evaluates:
        what = f"{view['lr_scheduler_type']} follows an evaluation, and there is none"
        yield Fault("lr_scheduler_type", what, "write eval_strategy: steps")
    if view["eval_on_start"] and not view.evaluates:
        yield Fault("eval_on_start", "there is nothing to evaluate", "write eval_strategy: steps")


def _held_out_rows(view: View) -> Iterator[Fault]:
    if not view.evaluates:
        return
    none = 'or eval_strategy: "no"'
    what = "there are no held-out rows to evaluate on"
    if view["data"]:
        if not any(isinstance(entry, dict) and entry.get("split") for entry in view["data"]):
            yield Fault("eval_strategy", what, f"split: 0.05 on an entry of data, {none}")
    elif view["datasets"] and view["test_split_size"] is None:
        yield Fault("eval_strategy", what, f"test_split_size: 0.05, {none}")


def _mixture(view: View) -> Iterator[Fault]:
    """TRL's ``datasets``: it makes one split ``train``, and ``test`` where it is asked for one."""
    entries = view["datasets"]
    if view["data"] or not entries:
        return
    fractions = [entry.get("fraction") for entry in entries if isinstance(entry, dict)]
    if any(one is not None for one in fractions):
        if None in fractions:
            yield Fault("datasets", "fraction is given for some entries only", "give it for all of them, or for none")
        if view["streaming"]:
            yield Fault("datasets", "fraction does not go with streaming", "leave out fraction, or streaming")
    size = view["test_split_size"]
    if size is not None and view["streaming"]:
        yield Fault("test_split_size", "streamed data cannot be split", "leave out test_split_size, or streaming")
    if isinstance(size, float) and size >= 1:
        yield Fault("test_split_size", f"{shown(size)} is not a share", "below 1 a share, or a whole number of rows")
    if view["dataset_train_split"] != "train":
        what = f"datasets become one split named train, not {shown(view['dataset_train_split'])}"
        yield Fault("dataset_train_split", what, "leave it out; name each entry's split in datasets")
    if view.evaluates and size is not None and view["dataset_test_split"] != "test":
        what = f"test_split_size makes a split named test, not {shown(view['dataset_test_split'])}"
        yield Fault("dataset_test_split", what, "leave it out")


def _streaming(view: View) -> Iterator[Fault]:
    if view["data"] or (view["max_steps"] or 0) > 0:
        return
    key = "streaming" if view["datasets"] else "dataset_streaming"
    if view[key]:
        yield Fault("max_steps", f"missing: with {key} nobody knows where training ends", "write max_steps: 1000")


def _formats(view: View) -> Iterator[Fault]:
    """What ``data`` says of its formats itself; those that are found in files are the machine's to compare."""
    entries = [entry for entry in view["data"] or [] if isinstance(entry, dict)]
    given = list(dict.fromkeys(entry["format"] for entry in entries if entry.get("format")))
    if len(given) > 1:
        yield Fault("data", f"the sources have different formats: {', '.join(map(str, given))}", "give all of them one")
    elif given == ["text"] and view["assistant_only_loss"]:
        yield Fault("assistant_only_loss", "text has no assistant", "format: messages, or leave it out")


def _precision(view: View) -> Iterator[Fault]:
    for suffix in ("", "_full_eval"):
        if view[f"fp16{suffix}"] and view[f"bf16{suffix}"]:
            yield Fault(f"fp16{suffix}", f"bf16{suffix} is true as well", "keep one of them")


def _quantization(view: View) -> Iterator[Fault]:
    if view["load_in_4bit"] and view["load_in_8bit"]:
        yield Fault("load_in_8bit", "load_in_4bit is true as well", "keep one of them")
    for key in ("load_in_4bit", "load_in_8bit"):
        if view[key] and not view["use_peft"]:
            yield Fault(key, "quantized weights cannot be trained without an adapter", "write use_peft: true")


def _adapter(view: View) -> Iterator[Fault]:
    if not view["use_peft"]:
        return
    targets = view["lora_target_modules"]
    if targets is not None and not targets:
        yield Fault("lora_target_modules", "names no layers", "lora_target_modules: all-linear, or leave it out")
    if targets == "lm_head" or (isinstance(targets, list) and "lm_head" in targets):
        yield Fault("lora_target_modules", "TRL does not train an adapter on lm_head", "leave lm_head out")


def _packing(view: View) -> Iterator[Fault]:
    prepares = not mapping_of(view["dataset_kwargs"]).get("skip_prepare_dataset")
    packs = view["packing"]
    packs_evaluation = view.evaluates and (packs if view["eval_packing"] is None else view["eval_packing"])
    if view["max_length"] is None and prepares and (packs or packs_evaluation):
        yield Fault("max_length", "packing needs a length", "write max_length: 1024")
    if view["padding_free"] and not packs and view["max_length"] is not None:
        what = "without packing it does not keep max_length"
        yield Fault("padding_free", what, "write packing: true, or max_length: null")


def _loading(view: View) -> Iterator[Fault]:
    if view["dataloader_num_workers"]:
        return
    for name in ("prefetch_factor", "persistent_workers", "multiprocessing_context"):
        if view[f"dataloader_{name}"]:
            yield Fault(f"dataloader_{name}", "needs worker processes", "write dataloader_num_workers: 1")


def _checkpointing(view: View) -> Iterator[Fault]:
    kwargs = view.checkpointing_kwargs
    if not kwargs.get("selective"):
        return
    key = "activation_checkpointing_kwargs"
    if not view.checkpoints_activations:
        yield Fault(key, "selective needs activation_checkpointing", "write activation_checkpointing: true")
    if kwargs.get("use_reentrant"):
        yield Fault(key, "selective does not go with use_reentrant", "write use_reentrant: false")


def _sharding(view: View) -> Iterator[Fault]:
    fsdp = view["fsdp"]
    if not fsdp:
        return
    if view["deepspeed"]:
        yield Fault("deepspeed", "fsdp is given as well", "keep one of them")
    settings = {name.removeprefix("fsdp_"): value for name, value in mapping_of(view["fsdp_config"]).items()}
    if str(settings.get("activation_checkpointing")).lower() == "true" and view.checkpoints_activations:
        remedy = "write activation_checkpointing: false, so that FSDP's own is used"
        yield Fault("fsdp_config", "activation_checkpointing is true as well", remedy)
    wraps = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
    if settings.get("auto_wrap_policy", wraps[0]) not in wraps:
        yield Fault(
            "fsdp_config.auto_wrap_policy", f"{shown(settings['auto_wrap_policy'])} is not known", one_of(wraps)
        )
    is_second = str(settings.get("version", 2)) != "1"
    for option in fsdp.split() if isinstance(fsdp, str) else fsdp if isinstance(fsdp, list) else ():
        if option in ("full_shard", "shard_grad_op", "offload", "auto_wrap"):
            continue
        if option in ("hybrid_shard", "hybrid_shard_zero2", "no_shard"):
            if is_second:
                yield Fault("fsdp", f"{option} is of FSDP's first version", "fsdp: true, or fsdp_config: {version: 1}")
            continue
        yield Fault("fsdp", f"{shown(option)} is not known", "write fsdp: true, and the rest in fsdp_config")


def _mappings(view: View) -> Iterator[Fault]:
    """Mappings that are given as text are JSON; three of them may also be the path of a file."""
    for key, rule in schema()["properties"].items():
        if set(rule.get("type") or ()) != {"object", "string", "null"}:
            continue
        try:
            value = view[key]
        except Unreadable:
            continue
        if isinstance(value, str) and (value.startswith("{") or key not in _OWN_FILES) and not _is_json_mapping(value):
            yield Fault(key, f"{shown(value)} is not a mapping", f"write {key}: {{name: value}}")


def _is_json_mapping(text: str) -> bool:
    return bool(mapping_of(text)) or text.replace(" ", "") == "{}"


def _loaded_with(view: View) -> Iterator[Fault]:
    """What decides which code runs, or where a token goes, is no keyword of the model (or of its adapter) inside."""
    waiting: list[tuple[str, Any]] = [("model_init_kwargs", mapping_of(view["model_init_kwargs"]))]
    while waiting:
        key, value = waiting.pop()
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if name in _NOT_INSIDE:
                yield Fault(f"{key}.{name}", "is not taken here", _NOT_INSIDE[name])
            elif isinstance(inner, (dict, list)):
                waiting.append((f"{key}.{name}", inner))


def _accelerator(view: View) -> Iterator[Fault]:
    kwargs = mapping_of(view["accelerator_config"]).get("gradient_accumulation_kwargs")
    if isinstance(kwargs, dict) and "num_steps" in kwargs and view["gradient_accumulation_steps"] > 1:
        key = "accelerator_config.gradient_accumulation_kwargs.num_steps"
        yield Fault(key, "gradient_accumulation_steps is given as well", "leave num_steps out")


def _schedule(view: View) -> Iterator[Fault]:
    key, schedule = "lr_scheduler_kwargs", view["lr_scheduler_type"]
    taken, given = schema()["x-scheduler-kwargs"][schedule], mapping_of(view[key])
    if schedule not in ("constant", "constant_with_warmup") and not taken["any"]:  # those two ignore them
        for name in given:
            if name not in taken["names"]:
                yield Fault(f"{key}.{name}", f"{schedule} does not take it", one_of(taken["names"]))
    missing = [name for name in taken["needed"] if name not in given]
    if missing:
        yield Fault(key, f"{schedule} needs {missing[0]}", f"write {key}: {{{missing[0]}: 100}}")
    if "min_lr" in taken["names"]:
        both = [given.get(name) is not None for name in ("min_lr", "min_lr_rate")]
        if not any(both):
            yield Fault(key, f"{schedule} needs min_lr or min_lr_rate", f"write {key}: {{min_lr_rate: 0.1}}")
        elif all(both):
            yield Fault(key, "min_lr and min_lr_rate are given", "keep one of them")


def _optimizer(view: View) -> Iterator[Fault]:
    arguments = str(view["optim_args"] or "").replace(" ", "")
    if arguments and any(part.count("=") != 1 for part in arguments.split(",")):
        yield Fault("optim_args", f"{shown(arguments)} is not name=value, name=value", "optim_args: rank=64,scale=0.25")
    if str(view["optim"]).startswith(_LOW_RANK) and view["optim_target_modules"] is None:
        yield Fault(
            "optim_target_modules", f"missing, and {view['optim']} needs it", "optim_target_modules: all-linear"
        )


def _kernels(view: View) -> Iterator[Fault]:
    if view["use_liger_kernel"] and mapping_of(view["liger_kernel_config"]).get("fused_linear_cross_entropy"):
        what = "TRL has a fused head of its own"
        yield Fault("liger_kernel_config.fused_linear_cross_entropy", what, "leave it out")


def _padding(view: View) -> Iterator[Fault]:
    key, value = "pad_to_multiple_of", view["pad_to_multiple_of"]
    if value is None or value == "auto" or (isinstance(value, str) and value.lower() in ("none", "null")):
        return
    try:
        is_one = int(value) >= 1
    except ValueError:
        is_one = False
    if not is_one:
        yield Fault(key, f"{shown(value)} is not a number from 1 on", f"write {key}: 8, or auto, or null")


def _reports(view: View) -> Iterator[Fault]:
    names = view["report_to"]
    alone = [name for name in names if name in ("none", "all")] if isinstance(names, list) and len(names) > 1 else []
    if alone:
        yield Fault("report_to", f"{alone[0]} does not go with others", f"write report_to: {alone[0]}, or the others")


RULES: tuple[Callable[[View], Iterator[Fault]], ...] = (
    *(_intervals, _best_model, _metric, _evaluation, _held_out_rows, _mixture, _streaming, _formats),
    *(_precision, _quantization, _adapter, _packing, _loading, _checkpointing, _sharding, _mappings, _loaded_with),
    *(_accelerator, _schedule, _optimizer, _kernels, _padding, _reports),
)


# A config as a whole: a model, data from somewhere, and nothing that cannot go together.

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?")  # a model, as the hub names it
SOURCE_KEYS = ("source", "weight", "format", "columns", "limit", "split", "dataset_config", "dataset_split")
FORMATS = ("messages", "prompt_completion", "text")
COLUMNS = ("messages", "prompt", "completion", "text")
_DATA = ("data", "datasets", "dataset_name")


def missing_faults(config: Mapping[str, Any]) -> Iterator[Fault]:
    """What every config needs: a model, and data."""
    if not config.get("model_name_or_path"):
        yield Fault("model_name_or_path", "missing", "a hub id or a local folder")
    if not any(config.get(key) for key in _DATA):
        yield Fault("data", "no training data", "data:, or TRL's dataset_name or datasets")


def whole_faults(
    config: Mapping[str, Any], faulty: frozenset[str] = frozenset(), allowed_env: Collection[str] = ()
) -> Iterator[Fault]:
    """What does not go together; ``faulty``: keys whose own values are reported already.

    ``allowed_env``: names of ``env`` that the user allowed, see ``envrule.py``.
    """
    config = settled(config)
    if "max_steps" not in faulty and config.get("max_steps") == 0:
        yield Fault("max_steps", "0 steps train nothing", "1 or more, or leave it out")
    given = [key for key in _DATA if config.get(key)]
    if "data" in given and len(given) > 1:
        yield Fault("data", f"both data and {given[1]} are given", "keep one of them")
    sources = [] if "data" in faulty else list(source_faults(config.get("data") or []))
    yield from sources
    faulty |= {"data"} if sources else frozenset()
    yield from _extra_faults(config, faulty)
    if "env" not in faulty:
        yield from env_faults(config.get("env") or {}, allowed_env)
    yield from rule_faults(config, faulty)


def _extra_faults(config: Mapping[str, Any], faulty: frozenset[str]) -> Iterator[Fault]:
    if is_on(config, "merge_adapter") and not is_on(config, "use_peft") and "use_peft" not in faulty:
        remedy = "use_peft: true, or leave merge_adapter out"
        yield Fault("merge_adapter", "this config trains no adapter", remedy)
    if config.get("hub_token"):
        yield Fault("hub_token", "a secret would be written to run.json", "leave it out, and give --secret HF_TOKEN")
    name = config.get("hub_model_id")
    if name is not None and "hub_model_id" not in faulty and not HUB_NAME.fullmatch(str(name)):
        yield Fault("hub_model_id", f"{shown(name)} is no name on the hub", "name, or org/name")


def check_sources(config: Mapping[str, Any], where: object) -> None:
    """Checks the ``data`` list: its entries' keys and kinds. Raises InputError."""
    refuse(where, source_faults(config.get("data") or []))


def source_faults(entries: Any) -> Iterator[Fault]:
    """What is wrong with the entries of ``data``."""
    for index, source in enumerate(entries):
        row = f"data[{index}]"
        if not isinstance(source, dict) or not isinstance(source.get("source"), str) or not source["source"].strip():
            yield Fault(row, "needs a source", "{source: path or URL, weight: 1.0}")
            continue
        if source["source"].partition("://")[2] == "" and "://" in source["source"]:
            yield Fault(f"{row}.source", f"{shown(source['source'])} names nothing", "hf://org/name")
        for key in source:
            if key not in SOURCE_KEYS:
                near = difflib.get_close_matches(str(key), SOURCE_KEYS, n=1)
                remedy = f"did you mean {near[0]}?" if near else one_of(SOURCE_KEYS)
                yield Fault(f"{row}.{key}", "unknown key", remedy)
        yield from _number_faults(row, source)
        format = source.get("format")
        if format is not None and format not in FORMATS:
            yield Fault(f"{row}.format", f"{shown(format)} is no format", one_of(FORMATS))
        if source.get("columns") is not None:
            yield from _column_faults(f"{row}.columns", source["columns"])


def _number_faults(row: str, source: Mapping[str, Any]) -> Iterator[Fault]:
    """Of an entry's weight, limit and split; YAML's own numbers only, since nobody reads text here."""
    for key in ("weight", "limit", "split"):
        value = source.get(key)
        number = None if isinstance(value, str) else number_of(value)
        if value is None:
            continue
        if number is None or not 0 < number < math.inf:
            yield Fault(f"{row}.{key}", f"{shown(value)} is not a number above 0")
        elif key == "split" and number >= 1 and not number.is_integer():
            what = f"{shown(value)} is neither a share nor a number of rows"
            yield Fault(f"{row}.split", what, "below 1 a share, from 1 on a number of rows")
        elif key == "limit" and not isinstance(value, int):
            yield Fault(f"{row}.limit", f"{shown(value)} is not a whole number")


def _column_faults(key: str, columns: Any) -> Iterator[Fault]:
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        yield Fault(key, "must map our names to the file's", "columns: {prompt: question, completion: answer}")
        return
    for ours in columns:
        if ours not in COLUMNS:
            yield Fault(f"{key}.{ours}", "unknown key", one_of(COLUMNS))
