"""Finds within a second or two what is wrong, before a model is loaded or a row is read."""

import importlib.util
import os
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


class Stopped(Exception):
    """The guard asked the ranks to stop; everything up to ``step`` is staged."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


class NotFinite(SpotuneError):
    """Training is unusable from some step on; the message names the step."""


def outcome_of(error: BaseException, step: int) -> Outcome:
    """Returns the outcome of a run that an exception ends: bad input, worth another machine, or failed."""
    if isinstance(error, Stopped):
        return Outcome("stopped", error.step)
    if isinstance(error, InputError):
        changed = error.changed if isinstance(error, OtherVersions) else []
        return Outcome("bad_input", step, str(error), changed)
    if isinstance(error, SpotuneError):
        return Outcome("retry" if isinstance(error, StoreError) else "failed", step, str(error))
    # The GPU would run out of memory again on the same kind of machine.
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in str(error):
        remedy = "lower per_device_train_batch_size or max_length, or set activation_checkpointing: true"
        return Outcome("failed", step, f"the GPU ran out of memory ({remedy})")
    if is_machine_fault(error):
        return Outcome("retry", step, one_line(error))
    if type(error).__name__ == "SafetensorError":  # by name: this module does not import the libraries
        return Outcome("bad_input", step, f"model_name_or_path: its weights are damaged: {one_line(error)}")
    return Outcome("failed", step, one_line(error))


def one_line(error: BaseException) -> str:
    """Returns ``Type: message`` on one line."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:500]


BF16_CAPABILITY = (8, 0)  # Ampere
FLASH_KERNELS = "kernels-community/"


@dataclass(frozen=True)
class Hardware:
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

    def __str__(self) -> str:
        major, minor = self.capability
        return f"this is a {self.gpu} ({major}.{minor})" if self.gpu else "this machine has none"


def check_hardware(config: Mapping[str, Any], where: str, found: Hardware) -> None:
    """Raises InputError naming the key, what it needs and what to write instead."""

    def require(is_there: bool, key: str, what: str, remedy: str) -> None:
        if not is_there:
            raise InputError(where, what, key=key, remedy=remedy)

    packages, has_gpu, no_gpu = found.packages, bool(found.gpu), "and this machine has none"
    is_ampere = found.capability >= BF16_CAPABILITY
    for key in ("load_in_4bit", "load_in_8bit"):
        if is_on(config, key):
            require(has_gpu, key, f"quantized training needs a GPU, {no_gpu}", f"{key}: false in this profile")
            require("bitsandbytes" in packages, key, "bitsandbytes is not installed", "pip install bitsandbytes")
    if is_on(config, "use_liger_kernel"):
        key = "use_liger_kernel"
        require(has_gpu, key, f"Liger kernels need a GPU, {no_gpu}", f"{key}: false in this profile")
        require("liger_kernel" in packages, key, "liger-kernel is not installed", "pip install liger-kernel")
    if config.get("fsdp"):
        what = f"FSDP needs GPUs, {no_gpu}: it would run as DDP"
        require(has_gpu, "fsdp", what, "leave fsdp out in this profile")
    if config.get("deepspeed"):
        remedy = "pip install deepspeed, or use fsdp"
        require("deepspeed" in packages, "deepspeed", "deepspeed is not installed", remedy)
    if is_on(config, "tf32"):
        require(is_ampere, "tf32", f"TF32 needs an Ampere GPU or newer, {found}", "leave tf32 out")
    if is_on(config, "fp16"):
        require(has_gpu, "fp16", f"needs a GPU, {no_gpu}", "fp16: false, bf16: false")
    key, bf16 = "bf16", config.get("bf16")
    if not is_on(config, "use_cpu") and (bf16 is None or is_on(config, key)):  # TRL refuses its default on a CPU
        what = f"needs a GPU, {no_gpu}" + (" (it is TRL's default)" if bf16 is None else "")
        require(has_gpu, key, what, "bf16: false, or use_cpu: true to try bf16 on the CPU")
    if has_gpu and is_on(config, key):
        require(is_ampere, key, f"needs an Ampere GPU or newer, {found}", "bf16: false, fp16: true")
    key, wanted = "attn_implementation", str(config.get("attn_implementation") or "")
    if wanted.startswith(("flash_attention", FLASH_KERNELS)):
        sdpa = "attn_implementation: sdpa"
        require(has_gpu, key, f"{wanted} needs a GPU, {no_gpu}", f"{sdpa} in this profile")
        if wanted == "flash_attention_2":
            is_there = bool(packages & {"flash_attn", "kernels"})
            require(is_there, key, "flash-attn is not installed", f"pip install flash-attn, or {sdpa}")
        if wanted.startswith(FLASH_KERNELS):
            require("kernels" in packages, key, "kernels is not installed", f"pip install kernels, or {sdpa}")
        require(is_ampere, key, f"{wanted} needs an Ampere GPU or newer, {found}", sdpa)


def check(config: Mapping[str, Any], where: str, hardware: Hardware | None = None) -> None:
    """Raises InputError, with the key and a remedy, for what cannot work here. Imports torch only for the GPU."""
    check_sources(config, where)
    for index, entry in enumerate(config.get("data") or []):
        if not entry["source"].startswith("hf://"):
            find_files(entry["source"], where, f"data[{index}].source")
    check_local_files(config, where)
    _check_model(str(config.get("model_name_or_path") or ""), config, where)
    entries = config.get("data") or []
    if config.get("eval_strategy") not in (None, "no") and entries and not any(one.get("split") for one in entries):
        remedy = 'split: 0.05 on an entry of data, or eval_strategy: "no"'
        raise InputError(where, "there are no held-out rows to evaluate on", key="eval_strategy", remedy=remedy)
    check_hardware(config, where, hardware or Hardware.look())


def _check_model(name: str, config: Mapping[str, Any], where: str) -> None:
    key, folder = "model_name_or_path", Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or not HUB_ID.fullmatch(name):
            what = f"no folder {name!r}, and not a hub id"
            raise InputError(where, what, key=key, remedy="org/name, or a local folder")
        _check_hub(name, str(config.get("model_revision") or "main"), where)
        return
    if not (folder / "config.json").is_file():
        raise InputError(where, f"{name} has no config.json", key=key, remedy="a folder as save_pretrained writes it")
    if not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "adapter_config.json")):
        raise InputError(where, f"{name} has no weights", key=key, remedy="*.safetensors beside config.json")
    read_user_json(folder / "config.json")
    # Conversations need a chat template; before the rows are read only ``format`` says that there are some.
    talks = any(entry.get("format") == "messages" for entry in config.get("data") or [])
    if talks and not config.get("chat_template_path") and not _has_template(folder):
        remedy = "chat_template_path: a .jinja file or the id of a model that has one"
        raise InputError(where, f"{folder} has no chat template, which messages need", key=key, remedy=remedy)


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    settings = folder / "tokenizer_config.json"
    found = read_user_json(settings) if settings.exists() else {}
    return isinstance(found, dict) and bool(found.get("chat_template"))


def _check_hub(name: str, revision: str, where: str) -> None:
    """Asks the hub once, within 8 s; transformers would try for minutes if nothing answers.

    Raises InputError for a model that the hub lacks, ConnectionError for a hub that another machine may reach.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    key, absent = "model_name_or_path", f"{name} is not a local folder and not in the hub's cache"
    transport_error: type[Exception] = OSError
    if importlib.util.find_spec("httpx2"):
        import httpx2

        transport_error = httpx2.TransportError
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    if constants.HF_HUB_OFFLINE:
        remedy = "a local folder, or HF_HUB_OFFLINE=0 with a network"
        raise InputError(where, f"{absent}, and the hub is offline", key=key, remedy=remedy)
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=8.0)
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
    except (OSError, transport_error) as error:
        proxy = " behind the proxy" if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") else ""
        remedy = "a local folder, or a machine that reaches the hub"
        what = f"{absent}, and the hub cannot be reached{proxy}"
        raise ConnectionError(str(InputError(where, what, key=key, remedy=remedy))) from error
