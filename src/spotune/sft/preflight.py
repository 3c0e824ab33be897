"""What can be known to be wrong within a second or two, before a model is loaded or a row is read.

Each check raises InputError with the key and what to do. torch is imported only for what a GPU decides.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.configwhole import HUB_ID, check_sources
from spotune.contracts.datafiles import find_files
from spotune.contracts.errors import InputError
from spotune.contracts.localfiles import check_local_files
from spotune.contracts.userfiles import read_user_json
from spotune.sft.hardware import Hardware, check_hardware

HUB_TIMEOUT_S = 8.0


def check(config: Mapping[str, Any], where: str, hardware: Hardware | None = None) -> None:
    """Raises InputError for what cannot work on this machine."""
    check_sources(config, where)
    for index, entry in enumerate(config.get("data") or []):
        if not entry["source"].startswith("hf://"):
            find_files(entry["source"], where, f"data[{index}].source")
    check_local_files(config, where)
    _check_model(str(config.get("model_name_or_path") or ""), config, where)
    _check_held_out(config, where)
    check_hardware(config, where, hardware or Hardware.look())


def _check_held_out(config: Mapping[str, Any], where: str) -> None:
    entries = config.get("data") or []
    if config.get("eval_strategy") in (None, "no") or not entries or any(entry.get("split") for entry in entries):
        return
    remedy = 'split: 0.05 on an entry of data, or eval_strategy: "no"'
    raise InputError(where, "there are no held-out rows to evaluate on", key="eval_strategy", remedy=remedy)


def _check_model(name: str, config: Mapping[str, Any], where: str) -> None:
    key = "model_name_or_path"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                where, f"{name} has no config.json", key=key, remedy="a folder as save_pretrained writes it"
            )
        _check_weights(folder, name, where)
        _check_template(folder, config, where)
        return
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or not HUB_ID.fullmatch(name):
        raise InputError(
            where, f"no folder {name!r}, and no hub id either", key=key, remedy="org/name, or a local folder"
        )
    _check_hub(name, str(config.get("model_revision") or "main"), where)


def _check_weights(folder: Path, name: str, where: str) -> None:
    if (
        not any(folder.glob("*.safetensors"))
        and not any(folder.glob("*.bin"))
        and not (folder / "adapter_config.json").exists()
    ):
        raise InputError(
            where, f"{name} has no weights", key="model_name_or_path", remedy="*.safetensors beside config.json"
        )
    read_user_json(folder / "config.json")


def _check_template(folder: Path, config: Mapping[str, Any], where: str) -> None:
    """Conversations need a chat template; known here only where the config says that it has some."""
    talks = any(entry.get("format") == "messages" for entry in config.get("data") or [])
    if talks and not config.get("chat_template_path") and not has_template(folder):
        remedy = "chat_template_path: a .jinja file or the id of a model that has one"
        raise InputError(
            where, f"{folder} has no chat template, which messages need", key="model_name_or_path", remedy=remedy
        )


def has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    settings = folder / "tokenizer_config.json"
    found = read_user_json(settings) if settings.exists() else {}
    return isinstance(found, dict) and bool(found.get("chat_template"))


def _check_hub(name: str, revision: str, where: str) -> None:
    """One look at the hub with a deadline; transformers' own would try for minutes where nothing answers.

    Raises ConnectionError where it cannot be reached: another machine may reach it.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    key = "model_name_or_path"
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    if constants.HF_HUB_OFFLINE:
        remedy = "a local folder, or HF_HUB_OFFLINE=0 with a network"
        raise InputError(
            where,
            f"{name} is no local folder and not in the hub's cache, and the hub is offline",
            key=key,
            remedy=remedy,
        )
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise InputError(where, f"{name} is gated", key=key, remedy="accept its terms and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        remedy = "check the name; for a private model set HF_TOKEN"
        raise InputError(where, f"the hub has no model {name!r}", key=key, remedy=remedy) from error
    except RevisionNotFoundError as error:
        raise InputError(where, f"{name} has no revision {revision!r}", key="model_revision") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if 400 <= status < 500 and status != 429:
            raise InputError(where, f"{name} has no config.json (HTTP {status})", key=key) from error
        raise ConnectionError(f"the hub answers HTTP {status} for {name}") from error
    except (OSError, _transport_error()) as error:
        proxy = " behind the proxy" if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") else ""
        remedy = "a local folder, or a machine that reaches the hub"
        what = f"{name} is no local folder and not in the hub's cache, and the hub cannot be reached{proxy}"
        raise ConnectionError(str(InputError(where, what, key=key, remedy=remedy))) from error


def _transport_error() -> type[Exception]:
    if importlib.util.find_spec("httpx2"):
        import httpx2

        return httpx2.TransportError
    return OSError
