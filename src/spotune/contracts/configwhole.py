"""A config as a whole: a model, data from somewhere, and nothing that cannot go together."""

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from spotune.contracts.configkeys import is_on, settled
from spotune.contracts.configrules import rule_faults
from spotune.contracts.configvalues import Fault, number_of, one_of
from spotune.contracts.envrule import env_faults
from spotune.contracts.errors import refuse, shown

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
