"""The keys of a config: known or not, of the right kind or not, as ``schema.json`` says."""

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import Any

from spotune.contracts.errors import InputError, shown


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a config, as editors use it too."""
    found: dict[str, Any] = json.loads(resources.files("spotune.contracts").joinpath("schema.json").read_bytes())
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
            where,
            f"{shown(value)} is not {_spell(kinds)}",
            key=key,
            remedy='write it in quotes: "no"' if is_bare_no else "",
        )
    choices = rule.get("enum")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), map(str, choices), n=1)
        named = f"did you mean {near[0]}?" if near else one_of(str(choice) for choice in choices if choice is not None)
        raise InputError(where, f"{shown(value)} is not known", key=key, remedy=named)
    low, above = rule.get("minimum"), rule.get("exclusiveMinimum")
    number = number_of(value)
    if number is not None and ((low is not None and number < low) or (above is not None and number <= above)):
        raise InputError(
            where,
            f"{shown(value)} is too small",
            key=key,
            remedy=f"at least {low}" if low is not None else f"above {above}",
        )


def _check_datasets(where: object, entries: Any, rule: Mapping[str, Any]) -> None:
    for index, entry in enumerate(entries):
        row = f"datasets[{index}]"
        if not isinstance(entry, dict) or not entry.get("path"):
            raise InputError(where, "needs a path", key=row, remedy="{path: json, data_files: rows.jsonl}")
        for key, value in entry.items():
            if key not in rule["properties"]:
                raise InputError(where, "unknown key", key=f"{row}.{key}", remedy=one_of(rule["properties"]))
            if value is not None:
                _check_value(where, f"{row}.{key}", value, rule["properties"][key])


def number_of(value: Any) -> float | None:
    """A number, also one that YAML 1.1 reads as text, infinite beyond a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:
        return math.inf if isinstance(value, int) and value > 0 else -math.inf


def _is_kind(value: Any, kind: str) -> bool:
    """Whether a value fits; numbers may come as text, since YAML 1.1 reads ``1e-4`` as text and TRL takes it."""
    match kind:
        case "boolean":
            return isinstance(value, bool) or (
                isinstance(value, str) and value.lower() in ("true", "false", "yes", "no")
            )
        case "integer":
            number = number_of(value)
            return number is not None and number.is_integer()
        case "number":
            number = number_of(value)
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


def one_of(names: Iterable[str]) -> str:
    """A remedy that lists what is known; empty for nothing."""
    listed = ", ".join(names)
    return f"one of {listed}" if listed else ""


def is_on(config: Mapping[str, Any], key: str) -> bool:
    """Whether a true-or-false key is true; YAML gives some as text."""
    value = config.get(key)
    return value.lower() in ("true", "yes", "1") if isinstance(value, str) else bool(value)
