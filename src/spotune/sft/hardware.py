"""Keys that need hardware or a package which is not there."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spotune.contracts.configkeys import is_on
from spotune.contracts.errors import InputError

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
