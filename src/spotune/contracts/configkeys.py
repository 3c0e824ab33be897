"""The keys of a config: known or not, of the right kind or not, as ``schema.json`` says."""

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Any

from spotune.contracts.configvalues import Fault, bool_of, one_of, read_value, value_faults
from spotune.contracts.errors import refuse
from spotune.contracts.oldkeys import advice

_OWN = ("data_limit", "num_processes", "keep_every")  # numbers that no library reads


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a config, as editors use it too."""
    found: dict[str, Any] = json.loads(resources.files("spotune.contracts").joinpath("schema.json").read_bytes())
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
    return f"did you mean {near[0]}?" if near else "see docs/config.md"


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
