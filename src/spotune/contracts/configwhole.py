"""A config as a whole: a model, data from somewhere, and nothing that cannot go together."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

from spotune.contracts.configkeys import is_on, number_of, one_of
from spotune.contracts.errors import InputError, shown

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SOURCE_KEYS = ("source", "weight", "format", "columns", "limit", "split", "dataset_config", "dataset_split")
FORMATS = ("messages", "prompt_completion", "text")
COLUMNS = ("messages", "prompt", "completion", "text")


def check_whole(config: Mapping[str, Any], where: object) -> None:
    """What a config needs, and what cannot go together. Raises InputError."""
    if number_of(config.get("max_steps")) == 0:
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


def _check_extras(config: Mapping[str, Any], where: object) -> None:
    if is_on(config, "merge_adapter") and not is_on(config, "use_peft"):
        remedy = "use_peft: true, or leave merge_adapter out"
        raise InputError(where, "this config trains no adapter", key="merge_adapter", remedy=remedy)
    if config.get("hub_token"):
        what = "a secret would be written to run.json"
        raise InputError(where, what, key="hub_token", remedy="leave it out, and give --secret HF_TOKEN")
    _check_env(config.get("env") or {}, where)
    name = config.get("hub_model_id")
    if name is not None and not HUB_NAME.fullmatch(str(name)):
        raise InputError(where, f"{shown(name)} is no name on the hub", key="hub_model_id", remedy="name, or org/name")


def _check_env(env: Mapping[Any, Any], where: object) -> None:
    """What TRL sets in the environment of a run: names and texts, and none that spotune goes by."""
    for name, value in env.items():
        key = f"env.{name}"
        if not isinstance(name, str) or not name.isidentifier():
            raise InputError(where, "is no name of the environment", key=key, remedy="env: {NCCL_DEBUG: INFO}")
        if name.startswith("SPOTUNE_"):
            raise InputError(where, "is for spotune to set", key=key, remedy="leave it out")
        if not isinstance(value, (str, int, float)) or (isinstance(value, str) and "\0" in value):
            raise InputError(where, f"{shown(value)} is not text", key=key, remedy=f'{name}: "1"')


def check_sources(config: Mapping[str, Any], where: object) -> None:
    """Checks the ``data`` list: keys, kinds, and local files that must be there. Raises InputError."""
    for index, source in enumerate(config.get("data") or []):
        row = f"data[{index}]"
        if not isinstance(source, dict) or not isinstance(source.get("source"), str) or not source["source"].strip():
            raise InputError(where, "needs a source", key=row, remedy="{source: path or URL, weight: 1.0}")
        if source["source"].partition("://")[2] == "" and "://" in source["source"]:
            raise InputError(
                where, f"{shown(source['source'])} names nothing", key=f"{row}.source", remedy="hf://org/name"
            )
        for key in source:
            if key not in SOURCE_KEYS:
                near = difflib.get_close_matches(str(key), SOURCE_KEYS, n=1)
                raise InputError(
                    where,
                    "unknown key",
                    key=f"{row}.{key}",
                    remedy=f"did you mean {near[0]}?" if near else one_of(SOURCE_KEYS),
                )
        for key, low in (("weight", 0.0), ("limit", 0.0), ("split", 0.0)):
            value = source.get(key)
            number = None if isinstance(value, str) else number_of(value)
            if value is not None and (number is None or not low < number < math.inf):
                raise InputError(where, f"{shown(value)} is not a number above 0", key=f"{row}.{key}")
        if (source.get("split") or 0) >= 1 and source["split"] != int(source["split"]):
            remedy = "below 1 a share, from 1 on a number of rows"
            raise InputError(
                where,
                f"{shown(source['split'])} is neither a share nor a number of rows",
                key=f"{row}.split",
                remedy=remedy,
            )
        if source.get("limit") is not None and not isinstance(source["limit"], int):
            raise InputError(where, f"{shown(source['limit'])} is not a whole number", key=f"{row}.limit")
        if source.get("format") is not None and source["format"] not in FORMATS:
            raise InputError(
                where, f"{shown(source['format'])} is no format", key=f"{row}.format", remedy=one_of(FORMATS)
            )
        if source.get("columns") is not None:
            _check_columns(where, f"{row}.columns", source["columns"])


def _check_columns(where: object, key: str, columns: Any) -> None:
    remedy = "columns: {prompt: question, completion: answer}"
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        raise InputError(where, "must map our names to the file's", key=key, remedy=remedy)
    for ours in columns:
        if ours not in COLUMNS:
            raise InputError(where, "unknown key", key=f"{key}.{ours}", remedy=one_of(COLUMNS))
