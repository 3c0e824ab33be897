"""One YAML file -> one flat, checked config: TRL's own keys, plus ``data``, ``data_limit``, ``profiles``."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from spotune.core.config_keys import ConfigFault, key_faults, one_of, recorded, schema
from spotune.core.config_rules import missing_faults, whole_faults
from spotune.core.errors import InputError, raise_all, refuse, shown
from spotune.core.fingerprint import read_user_file

# What YAML can say and JSON cannot: a value inside itself or in thousands of places, an endless integer, a date.

_MOST_BITS = 4096  # Python writes no integer of more than 4300 digits
_MOST_VALUES = 100_000


def refuse_endless(value: Any, where: object) -> None:
    """Raises InputError naming the key that holds itself, as in ``env: &e {A: *e}``, or too many digits or values."""
    _count(value, where, "", (), {})


def _count(value: Any, where: object, key: str, above: tuple[int, ...], known: dict[int, int]) -> int:
    """How many values it is when written without aliases; each is looked at once."""
    if id(value) in above:
        raise InputError(where, "holds itself", key=key, remedy="no alias inside what it names")
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise InputError(where, f"{shown(value)} is too large", key=key)
    if id(value) not in known:
        inside = _inside(value, key)
        known[id(value)] = 1 + sum(_count(inner, where, name, (*above, id(value)), known) for name, inner in inside)
    if known[id(value)] > _MOST_VALUES:
        raise InputError(where, f"more than {_MOST_VALUES:,} values", key=key, remedy="fewer aliases of aliases")
    return known[id(value)]


def refuse_dates(value: Any, where: object, key: str = "") -> None:
    """Raises InputError naming the first value that JSON has no word for: a date, bytes, a set."""
    if not isinstance(value, (dict, list, str, int, float, type(None))):
        raise InputError(where, f"{shown(str(value))} is read as a {type(value).__name__}", key=key, remedy="quote it")
    for name, inner in _inside(value, key):
        refuse_dates(inner, where, name)


def _inside(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what a mapping or list holds."""
    if isinstance(value, dict):
        yield from ((f"{key}.{name}" if key else str(name), inner) for name, inner in value.items())
    elif isinstance(value, list):
        yield from ((f"{key}[{index}]", inner) for index, inner in enumerate(value))


# Files of other tools that are given as CONFIG by mistake: each is named, with what to do about it.

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


# Used by the launcher at submission and by the guard of a run that was started by hand. Keys, types and rules are the
# pinned TRL's, so that what the machine would refuse costs milliseconds. All that is wrong is reported at once.

OVERRIDE = "--set"


def load_config(
    path: str | Path,
    profile: str = "",
    overrides: Iterable[str] = (),
    default_profile: str = "",
    allowed_env: Collection[str] = (),
) -> dict[str, Any]:
    """Reads, overlays and checks a config.

    Args:
        path: the YAML file.
        profile: must be one of the file's ``profiles`` when given.
        overrides: ``key=value`` each, the value as YAML; they win over the profile.
        default_profile: used when ``profile`` is empty and the file has it.
        allowed_env: names that ``env`` may set because the user said so, see ``envrule.py``.

    Returns:
        The flat config without ``profiles``. Raises InputError for all that is wrong with it.
    """
    raw = read_config(path)
    profiles = profiles_of(raw, path)
    raw.pop("profiles", None)
    if profile and profile not in profiles:
        raise InputError(path, f"no profile {shown(profile)}", key="profiles", remedy=one_of(profiles) or "it has none")
    chosen = profile or (default_profile if default_profile in profiles else "")
    given, overlay = parse_overrides(overrides), profiles[chosen] if chosen else {}
    config = {**raw, **overlay, **given}
    overlaid = overlay.keys() - given.keys()
    faults = list(_faults_of(config, path, overlaid, f"{path}: profiles.{chosen}", allowed_env))
    for name, other in profiles.items():
        if name != chosen:
            faults += _as_errors(key_faults(other), f"{path}: profiles.{name}")
    raise_all(faults)
    return recorded(config)


def overlay(
    config: Mapping[str, Any], overrides: Iterable[str], where: object, allowed_env: Collection[str] = ()
) -> dict[str, Any]:
    """A resolved config with ``key=value`` overrides on top, checked again; raises InputError."""
    changed = {**config, **parse_overrides(overrides)}
    raise_all(_faults_of(changed, where, allowed_env=allowed_env))
    return recorded(changed)


def _faults_of(
    config: Mapping[str, Any],
    where: object,
    overlaid: Iterable[str] = (),
    overlay_is: object = "",
    allowed_env: Collection[str] = (),
) -> Iterator[InputError]:
    """All that is wrong with a config; what comes from a profile (``overlaid``) is reported there."""
    places = dict.fromkeys(overlaid, overlay_is)
    dated = {}
    for key, value in config.items():
        try:
            refuse_dates(value, places.get(key, where), key)
        except InputError as error:
            dated[key] = error
    yield from dated.values()
    wrong = list(key_faults({key: value for key, value in config.items() if key not in dated}))
    faulty = frozenset([*dated, *(_top_level(fault.key) for fault in wrong)])
    missing = [] if faulty else missing_faults(config)  # an unknown key may be the one that is meant
    for fault in [*wrong, *missing, *whole_faults(config, faulty, allowed_env)]:
        place = places.get(_top_level(fault.key), where)
        yield InputError(place, fault.what, key=fault.key, remedy=fault.remedy)


def _as_errors(faults: Iterable[ConfigFault], where: object) -> Iterator[InputError]:
    yield from (InputError(where, fault.what, key=fault.key, remedy=fault.remedy) for fault in faults)


def _top_level(key: str) -> str:
    return key.partition(".")[0].partition("[")[0]


def read_config(path: str | Path) -> dict[str, Any]:
    """A config file as it is written; raises InputError for what is no mapping, or another tool's file."""
    try:
        raw = read_yaml(path)
    except InputError as error:
        raise foreign_text(path) or error from error
    if (foreign := foreign_data(raw, path)) is not None:
        raise foreign
    return raw


def profiles_of(raw: Mapping[str, Any], path: object) -> dict[str, dict[str, Any]]:
    """The overlays of a config by name; raises InputError for what cannot be one."""
    profiles = raw.get("profiles") or {}
    if not isinstance(profiles, dict) or not all(isinstance(overlay, dict) for overlay in profiles.values()):
        raise InputError(path, "must map names to settings", key="profiles", remedy="profiles: {dev: {max_steps: 30}}")
    for name, overlay in profiles.items():
        if not isinstance(name, str):
            raise InputError(path, f"the name {shown(name)} is not text", key="profiles", remedy="write it in quotes")
        if "profiles" in overlay:
            raise InputError(path, "profiles do not nest", key=f"profiles.{name}.profiles")
        for key in overlay:
            if not isinstance(key, str):
                raise InputError(path, "keys are text", key=f"profiles.{name}.{shown(key)}")
    return profiles


def read_yaml(path: str | Path, remedy: str = "model_name_or_path: …", may_be_empty: bool = False) -> dict[str, Any]:
    """A YAML mapping; raises InputError naming file and line. ``remedy``: the start of such a file."""
    import yaml

    try:
        data = yaml.load(read_user_file(path), Loader=_unique_loader())
    except (ValueError, RecursionError) as error:  # a value that looks like a date and is none; brackets without end
        raise InputError(path, f"not YAML: {error}") from error
    except yaml.composer.ComposerError as error:  # also an alias of nothing
        what = "several documents" if "single document" in str(error.context) else f"not YAML: {error.problem}"
        raise InputError(path, what, remedy="one file for each" if what.startswith("several") else "") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(path, f"not YAML: {error.problem}", key=line) from error
    except yaml.YAMLError as error:
        raise InputError(path, f"not YAML: {error}") from error
    if data is None and may_be_empty:
        return {}
    if not isinstance(data, dict):
        raise InputError(path, "must be a mapping of keys to values", remedy=remedy)
    for key in data:
        if not isinstance(key, str):
            raise InputError(path, "keys are text", key=shown(key))
    refuse_endless(data, path)
    return data


@cache
def _unique_loader() -> type:
    """PyYAML's safe loader, but a key given twice is an error instead of the last one winning."""
    import yaml

    class UniqueLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = getattr(key_node, "value", None)
                if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str):
                    if key in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"key {shown(key)} given twice", key_node.start_mark
                        )
                    seen.add(key)
            return super().construct_mapping(node, deep)

    return UniqueLoader


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``key=value`` pairs -> a dict, values read as YAML (``max_steps=5``, ``packing=true``)."""
    import yaml

    parsed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(OVERRIDE, f"{shown(override)} is not key=value", remedy="--set max_steps=50")
        try:
            parsed[key.strip().replace("-", "_")] = yaml.safe_load(text) if text else ""
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(OVERRIDE, f"the value {shown(text)} is not YAML", key=key) from error
    refuse_endless(parsed, OVERRIDE)
    return parsed


def parse_flags(flags: list[str]) -> list[str]:
    """TRL's own flags (``--learning_rate 1e-4 --packing``) -> ``key=value`` overrides."""
    overrides: list[str] = []
    position = 0
    while position < len(flags):
        flag = flags[position]
        if not flag.startswith("--"):
            raise InputError("command line", f"unexpected {shown(flag)}", remedy="CONFIG [--key value]...")
        name, equals, value = flag[2:].partition("=")
        position += 1
        if not equals:
            values: list[str] = []
            while position < len(flags) and not flags[position].startswith("--"):
                values.append(flags[position])
                position += 1
            known = schema()["properties"]
            kinds = known.get(name.replace("-", "_"), {}).get("type", "boolean")
            if name.startswith(("no_", "no-")) and not values and name[3:].replace("-", "_") in known:
                name, values = name[3:], ["false"]
            elif not values and "boolean" not in kinds:
                raise InputError(f"--{name}", "needs a value")
            is_list = "array" in kinds and ("string" not in kinds or len(values) > 1)
            value = f"[{', '.join(values)}]" if is_list else " ".join(values) or "true"
        overrides.append(f"{name}={value}")
    return overrides


# Files that a config names beside its data and its model: those that are to be here must be here.

_BUILDERS = ("json", "csv", "parquet", "text")  # of TRL's ``datasets``: a path of another name is on the hub
SETTINGS = ("deepspeed", "fsdp_config", "accelerator_config")  # a mapping, or a file that has it


def check_local_files(config: Mapping[str, Any], where: object) -> None:
    """Raises InputError for all files that the config names and that are not here."""
    refuse(where, file_faults(config))


def file_faults(config: Mapping[str, Any]) -> Iterator[ConfigFault]:
    """What is named and is not here; a pattern, a URL or a name on the hub may be anywhere."""
    for index, entry in enumerate(config.get("datasets") or []):
        for file in _files_of(entry):
            folder = Path(entry["path"]) if Path(entry["path"]).is_dir() else Path()
            if "://" in file or any(mark in file for mark in "*?[") or (folder / file).exists():
                continue
            if entry["path"] in _BUILDERS or folder.name:
                yield ConfigFault(f"datasets[{index}].data_files", f"no such file: {file}")
    template = config.get("chat_template_path")
    if isinstance(template, str) and template.endswith((".jinja", ".j2")) and not Path(template).is_file():
        yield ConfigFault("chat_template_path", f"no such file: {template}")
    for key in SETTINGS:
        value = config.get(key)
        if isinstance(value, str) and not value.lstrip().startswith("{") and not Path(value).is_file():
            yield ConfigFault(key, f"no such file: {value}")


def _files_of(entry: Any) -> list[str]:
    files = entry.get("data_files") if isinstance(entry, dict) else None
    named = files.values() if isinstance(files, dict) else [files] if isinstance(files, str) else files or []
    return [str(file) for file in named]
