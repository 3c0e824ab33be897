"""What can be known to be wrong within a second or two, before a model is loaded or a row is read."""

import importlib.util
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spotune.core.config import check_local_files
from spotune.core.config_keys import is_on
from spotune.core.config_rules import HUB_ID, check_sources
from spotune.core.errors import InputError, OtherVersions, SpotuneError, StoreError
from spotune.core.fingerprint import find_files, read_user_json
from spotune.core.protocol import Outcome
from spotune.core.store.faults import is_machine_fault

# What an exception means for the run: bad input, worth another machine, or failed for good.

_MEMORY_REMEDY = "lower per_device_train_batch_size or max_length, or set activation_checkpointing: true"


class Stopped(Exception):
    """The guard asked the ranks to leave; everything up to ``step`` is staged."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class NotFinite(SpotuneError):
    """Training cannot be used from some step on; the message names the step."""


def outcome_of(error: BaseException, step: int) -> Outcome:
    """The outcome that an exception amounts to; its message is one line for people."""
    if isinstance(error, Stopped):
        return Outcome("stopped", error.step)
    if isinstance(error, InputError):
        changed = error.changed if isinstance(error, OtherVersions) else []
        return Outcome("bad_input", step, str(error), changed)
    if isinstance(error, SpotuneError):
        return Outcome("retry" if isinstance(error, StoreError) else "failed", step, str(error))
    if _is_out_of_memory(error):  # it would come again on the same kind of machine
        return Outcome("failed", step, f"the GPU ran out of memory ({_MEMORY_REMEDY})")
    if is_machine_fault(error):
        return Outcome("retry", step, one_line(error))
    if type(error).__name__ == "SafetensorError":  # named, not imported: this module comes before the libraries
        return Outcome("bad_input", step, f"model_name_or_path: its weights are damaged: {one_line(error)}")
    return Outcome("failed", step, one_line(error))


def one_line(error: BaseException) -> str:
    """``Type: message`` on one line; where it came from is in the traceback."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:500]


def print_traceback(error: BaseException) -> None:
    traceback.print_exception(error)


def _is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in str(error)


# Keys that need hardware or a package which is not there.

BF16_CAPABILITY = (8, 0)  # Ampere
FLASH_KERNELS = "kernels-community/"


@dataclass(frozen=True)
class Hardware:
    """What this machine has."""

    gpu: str = ""
    capability: tuple[int, int] = (0, 0)
    packages: frozenset[str] = frozenset()

    @classmethod
    def look(cls) -> "Hardware":
        import torch

        names = ("bitsandbytes", "liger_kernel", "flash_attn", "flash_attn_3", "kernels", "deepspeed", "peft")
        packages = frozenset(name for name in names if importlib.util.find_spec(name))
        if torch.backends.mps.is_available():
            return cls("Apple GPU", BF16_CAPABILITY, packages)
        if not torch.cuda.is_available():
            return cls(packages=packages)
        return cls(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0), packages)


def check_hardware(config: Mapping[str, Any], where: str, found: Hardware) -> None:
    """Raises InputError naming the key, what it needs and what to write instead."""

    def refuse(key: str, what: str, remedy: str) -> None:
        raise InputError(where, what, key=key, remedy=remedy)

    for key in ("load_in_4bit", "load_in_8bit"):
        if is_on(config, key):
            if not found.gpu:
                refuse(
                    key, "quantized training needs a GPU, and this machine has none", f"{key}: false in this profile"
                )
            if "bitsandbytes" not in found.packages:
                refuse(key, "bitsandbytes is not installed", "pip install bitsandbytes")
    if is_on(config, "use_liger_kernel"):
        if not found.gpu:
            refuse(
                "use_liger_kernel",
                "Liger kernels need a GPU, and this machine has none",
                "use_liger_kernel: false in this profile",
            )
        if "liger_kernel" not in found.packages:
            refuse("use_liger_kernel", "liger-kernel is not installed", "pip install liger-kernel")
    if config.get("fsdp") and not found.gpu:
        refuse(
            "fsdp", "FSDP needs GPUs, and this machine has none: it would run as DDP", "leave fsdp out in this profile"
        )
    if config.get("deepspeed") and "deepspeed" not in found.packages:
        refuse("deepspeed", "deepspeed is not installed", "pip install deepspeed, or use fsdp")
    if is_on(config, "tf32") and found.capability < BF16_CAPABILITY:
        refuse("tf32", f"TF32 needs an Ampere GPU or newer, {_there(found)}", "leave tf32 out")
    _check_precision(config, refuse, found)
    _check_attention(config, refuse, found)


def _check_precision(config: Mapping[str, Any], refuse: Any, found: Hardware) -> None:
    bf16, fp16, on_cpu = config.get("bf16"), is_on(config, "fp16"), is_on(config, "use_cpu")
    if not found.gpu:
        if fp16:
            refuse("fp16", "needs a GPU, and this machine has none", "fp16: false, bf16: false")
        if not on_cpu and (bf16 is None or is_on(config, "bf16")):  # TRL's default is bf16, which it refuses on a CPU
            what = "needs a GPU, and this machine has none" + (" (it is TRL's default)" if bf16 is None else "")
            refuse("bf16", what, "bf16: false, or use_cpu: true to try bf16 on the CPU")
    elif found.capability < BF16_CAPABILITY and is_on(config, "bf16"):
        refuse("bf16", f"needs an Ampere GPU or newer, {_there(found)}", "bf16: false, fp16: true")


def _check_attention(config: Mapping[str, Any], refuse: Any, found: Hardware) -> None:
    wanted = str(config.get("attn_implementation") or "")
    if not wanted.startswith(("flash_attention", FLASH_KERNELS)):
        return
    key = "attn_implementation"
    if not found.gpu:
        refuse(key, f"{wanted} needs a GPU, and this machine has none", "attn_implementation: sdpa in this profile")
    if wanted == "flash_attention_2" and not found.packages & {"flash_attn", "kernels"}:
        refuse(key, "flash-attn is not installed", "pip install flash-attn, or attn_implementation: sdpa")
    if wanted.startswith(FLASH_KERNELS) and "kernels" not in found.packages:
        refuse(key, "kernels is not installed", "pip install kernels, or attn_implementation: sdpa")
    if found.capability < BF16_CAPABILITY:
        refuse(key, f"{wanted} needs an Ampere GPU or newer, {_there(found)}", "attn_implementation: sdpa")


def _there(found: Hardware) -> str:
    return (
        f"this is a {found.gpu} ({found.capability[0]}.{found.capability[1]})" if found.gpu else "this machine has none"
    )


# What can be known to be wrong within a second or two, before a model is loaded or a row is read.
#
# Each check raises InputError with the key and what to do. torch is imported only for what a GPU decides.

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
