"""What can be told about a config's model and folders before anything runs; the machine checks the rest."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.configwhole import HUB_ID
from spotune.contracts.errors import InputError, shown

_MODEL_FILES = ("config.json", "adapter_config.json")


def check_model(config: Mapping[str, Any], where: object) -> str:
    """``local`` or ``hub``: where the model comes from. Raises InputError for a folder that is not one."""
    name = str(config["model_name_or_path"])
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~name of nobody
        raise InputError(where, f"{name}: {error}", key="model_name_or_path") from error
    if os.path.isdir(path):
        if not any(os.path.isfile(path / file) for file in _MODEL_FILES):
            raise InputError(where, f"{name} holds no model", key="model_name_or_path", remedy="it needs a config.json")
        return "local"
    if os.path.lexists(path):
        what = "is a file" if os.path.isfile(path) else "is no folder"
        raise InputError(where, f"{name} {what}", key="model_name_or_path", remedy="a hub id or a folder")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise InputError(where, f"no such folder {name}", key="model_name_or_path", remedy="a hub id or a local folder")
    if not HUB_ID.fullmatch(name):
        raise InputError(
            where, f"{shown(name)} is no name on the hub", key="model_name_or_path", remedy="a hub id or a folder"
        )
    return "hub"
