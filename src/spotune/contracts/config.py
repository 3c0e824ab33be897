"""One YAML file -> one flat, checked config: TRL's own keys, plus ``data``, ``data_limit``, ``profiles``.

Used by the launcher at submission and by the guard of a run that was started by hand. Keys and types
come from ``schema.json``, generated from the pinned TRL, so that a typo costs milliseconds.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from spotune.contracts.errors import InputError

OVERRIDE = "--set"


def load_config(
    path: str | Path, profile: str = "", overrides: Iterable[str] = (), default_profile: str = ""
) -> dict[str, Any]:
    """Reads, overlays and checks a config.

    Args:
        path: the YAML file.
        profile: must be one of the file's ``profiles`` when given.
        overrides: ``key=value`` each, the value as YAML; they win over the profile.
        default_profile: used when ``profile`` is empty and the file has it.

    Returns:
        The flat config without ``profiles``. Raises InputError for anything that is not right.
    """
    raw = read_yaml(path)
    profiles = raw.pop("profiles", None) or {}
    if not isinstance(profiles, dict) or not all(isinstance(overlay, dict) for overlay in profiles.values()):
        raise InputError(path, "must map names to settings", key="profiles", remedy="profiles: {dev: {max_steps: 30}}")
    for name, overlay in profiles.items():
        if not isinstance(name, str):
            raise InputError(path, f"the name {name!r} is not text", key="profiles", remedy="write it in quotes")
        if "profiles" in overlay:
            raise InputError(path, "profiles do not nest", key=f"profiles.{name}.profiles")
        check_keys(overlay, f"{path}: profiles.{name}")
    if profile and profile not in profiles:
        raise InputError(path, f"no profile {profile!r}", key="profiles", remedy=_one_of(profiles) or "it has none")
    chosen = profile or (default_profile if default_profile in profiles else "")
    config = {**raw, **(profiles[chosen] if chosen else {}), **parse_overrides(overrides)}
    check_keys(config, path)
    _check_needed(config, path)
    return config


def overlay(config: Mapping[str, Any], overrides: Iterable[str], where: object) -> dict[str, Any]:
    """A resolved config with ``key=value`` overrides on top, checked again; raises InputError."""
    changed = {**config, **parse_overrides(overrides)}
    check_keys(changed, where)
    _check_needed(changed, where)
    return changed


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping; raises InputError naming file and line."""
    import yaml

    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_unique_loader())
    except FileNotFoundError as error:
        raise InputError(path, "no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # a value that looks like a date and is none; brackets without end
        raise InputError(path, f"not YAML: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(path, f"not YAML: {error.problem}", key=line) from error
    except yaml.YAMLError as error:
        raise InputError(path, f"not YAML: {error}") from error
    if not isinstance(data, dict):
        raise InputError(path, "must be a mapping of keys to values", remedy="model_name_or_path: …")
    for key in data:
        if not isinstance(key, str):
            raise InputError(path, "keys are text", key=repr(key))
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
                            None, None, f"key {key!r} given twice", key_node.start_mark
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
            raise InputError(OVERRIDE, f"{override!r} is not key=value", remedy="--set max_steps=50")
        try:
            parsed[key.strip().replace("-", "_")] = yaml.safe_load(text) if text else ""
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(OVERRIDE, f"the value {text!r} is not YAML", key=key) from error
    return parsed


def parse_flags(flags: list[str]) -> list[str]:
    """TRL's own flags (``--learning_rate 1e-4 --packing``) -> ``key=value`` overrides."""
    overrides: list[str] = []
    position = 0
    while position < len(flags):
        flag = flags[position]
        if not flag.startswith("--"):
            raise InputError("command line", f"unexpected {flag!r}", remedy="CONFIG [--key value]...")
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
            value = f"[{', '.join(values)}]" if kinds == "array" else " ".join(values) or "true"
        overrides.append(f"{name}={value}")
    return overrides


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a config, as editors use it too."""
    found: dict[str, Any] = json.loads(resources.files("spotune.contracts").joinpath("schema.json").read_text())
    return found


def check_keys(config: Mapping[str, Any], where: object) -> None:
    """Raises InputError for an unknown key (naming the nearest known one) or a value of the wrong kind."""
    known = schema()["properties"]
    for key, value in config.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "see docs/config.md"
            raise InputError(where, "unknown key", key=key, remedy=remedy)
        if value is not None:
            _check_value(where, key, value, known[key])
            if key == "datasets":
                _check_datasets(where, value, known[key]["items"])


def _check_value(where: object, key: str, value: Any, rule: Mapping[str, Any]) -> None:
    kinds = rule.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_kind(value, kind) for kind in kinds):
        is_bare_no = value is False and "no" in rule.get("enum", ())  # YAML 1.1 reads a bare no as false
        raise InputError(
            where, f"{value!r} is not {_spell(kinds)}", key=key, remedy='write it in quotes: "no"' if is_bare_no else ""
        )
    choices = rule.get("enum")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), map(str, choices), n=1)
        named = f"did you mean {near[0]}?" if near else _one_of(str(choice) for choice in choices if choice is not None)
        raise InputError(where, f"{value!r} is not known", key=key, remedy=named)
    low, above = rule.get("minimum"), rule.get("exclusiveMinimum")
    number = _number(value)
    if number is not None and ((low is not None and number < low) or (above is not None and number <= above)):
        raise InputError(
            where, f"{value!r} is too small", key=key, remedy=f"at least {low}" if low is not None else f"above {above}"
        )


def _check_datasets(where: object, entries: Any, rule: Mapping[str, Any]) -> None:
    for index, entry in enumerate(entries):
        row = f"datasets[{index}]"
        if not isinstance(entry, dict) or not entry.get("path"):
            raise InputError(where, "needs a path", key=row, remedy="{path: json, data_files: rows.jsonl}")
        for key, value in entry.items():
            if key not in rule["properties"]:
                raise InputError(where, "unknown key", key=f"{row}.{key}", remedy=_one_of(rule["properties"]))
            if value is not None:
                _check_value(where, f"{row}.{key}", value, rule["properties"][key])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _is_kind(value: Any, kind: str) -> bool:
    """Whether a value fits; numbers may come as text, since YAML 1.1 reads ``1e-4`` as text and TRL takes it."""
    match kind:
        case "boolean":
            return isinstance(value, bool) or (
                isinstance(value, str) and value.lower() in ("true", "false", "yes", "no")
            )
        case "integer":
            number = _number(value)
            return number is not None and number.is_integer()
        case "number":
            number = _number(value)
            return number is not None and math.isfinite(number)
        case "string":
            return isinstance(value, (str, int, float)) and not isinstance(value, bool)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case "null":
            return value is None
    return True


def _spell(kinds: Iterable[str]) -> str:
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    words |= {"array": "a list", "object": "a mapping"}
    return " or ".join(words.get(kind, kind) for kind in kinds if kind != "null")


def _one_of(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f"one of {listed}" if listed else ""


def is_on(config: Mapping[str, Any], key: str) -> bool:
    """Whether a true-or-false key is true; YAML gives some as text."""
    value = config.get(key)
    return value.lower() in ("true", "yes", "1") if isinstance(value, str) else bool(value)


def _check_needed(config: Mapping[str, Any], where: object) -> None:
    if _number(config.get("max_steps")) == 0:
        raise InputError(where, "0 steps train nothing", key="max_steps", remedy="1 or more, or leave it out")
    if not config.get("model_name_or_path"):
        raise InputError(where, "missing", key="model_name_or_path", remedy="a hub id or a local folder")
    given = [key for key in ("data", "datasets", "dataset_name") if config.get(key)]
    if not given:
        raise InputError(where, "no training data", key="data", remedy="data:, or TRL's dataset_name or datasets")
    if "data" in given and len(given) > 1:
        raise InputError(where, f"both data and {given[1]} are given", key="data", remedy="keep one of them")
    check_sources(config, where)
    _check_extras(config, where)


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _check_extras(config: Mapping[str, Any], where: object) -> None:
    if is_on(config, "merge_adapter") and not is_on(config, "use_peft"):
        remedy = "use_peft: true, or leave merge_adapter out"
        raise InputError(where, "this config trains no adapter", key="merge_adapter", remedy=remedy)
    if config.get("hub_token"):
        what = "a secret would be written to run.json"
        raise InputError(where, what, key="hub_token", remedy="leave it out, and give --secret HF_TOKEN")
    name = config.get("hub_model_id")
    if name is not None and not HUB_NAME.fullmatch(str(name)):
        raise InputError(where, f"{name!r} is no name on the hub", key="hub_model_id", remedy="name, or org/name")


SOURCE_KEYS = ("source", "weight", "format", "columns", "limit", "split", "dataset_config", "dataset_split")
FORMATS = ("messages", "prompt_completion", "text")
COLUMNS = ("messages", "prompt", "completion", "text")


def check_sources(config: Mapping[str, Any], where: object) -> None:
    """Checks the ``data`` list: keys, kinds, and local files that must be there. Raises InputError."""
    for index, source in enumerate(config.get("data") or []):
        row = f"data[{index}]"
        if not isinstance(source, dict) or not isinstance(source.get("source"), str) or not source["source"].strip():
            raise InputError(where, "needs a source", key=row, remedy="{source: path or URL, weight: 1.0}")
        if source["source"].partition("://")[2] == "" and "://" in source["source"]:
            raise InputError(where, f"{source['source']!r} names nothing", key=f"{row}.source", remedy="hf://org/name")
        for key in source:
            if key not in SOURCE_KEYS:
                near = difflib.get_close_matches(str(key), SOURCE_KEYS, n=1)
                raise InputError(
                    where,
                    "unknown key",
                    key=f"{row}.{key}",
                    remedy=f"did you mean {near[0]}?" if near else _one_of(SOURCE_KEYS),
                )
        for key, low in (("weight", 0.0), ("limit", 0.0), ("split", 0.0)):
            value = source.get(key)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and (not is_number or value <= low):
                raise InputError(where, f"{value!r} is not a number above 0", key=f"{row}.{key}")
        if (source.get("split") or 0) >= 1 and source["split"] != int(source["split"]):
            remedy = "below 1 a share, from 1 on a number of rows"
            raise InputError(
                where, f"{source['split']!r} is neither a share nor a number of rows", key=f"{row}.split", remedy=remedy
            )
        if source.get("limit") is not None and not isinstance(source["limit"], int):
            raise InputError(where, f"{source['limit']!r} is not a whole number", key=f"{row}.limit")
        if source.get("format") is not None and source["format"] not in FORMATS:
            raise InputError(where, f"{source['format']!r} is no format", key=f"{row}.format", remedy=_one_of(FORMATS))
        if source.get("columns") is not None:
            _check_columns(where, f"{row}.columns", source["columns"])


def _check_columns(where: object, key: str, columns: Any) -> None:
    remedy = "columns: {prompt: question, completion: answer}"
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        raise InputError(where, "must map our names to the file's", key=key, remedy=remedy)
    for ours in columns:
        if ours not in COLUMNS:
            raise InputError(where, "unknown key", key=f"{key}.{ours}", remedy=_one_of(COLUMNS))
