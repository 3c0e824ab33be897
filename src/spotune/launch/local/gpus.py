"""What GPUs this machine has, without importing torch."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """``device`` is what CUDA_VISIBLE_DEVICES takes; ``name`` as SkyPilot spells it, e.g. ``L4``."""

    device: str
    name: str


def find_gpus(environ: Mapping[str, str]) -> list[Gpu]:
    """The GPUs that nvidia-smi lists, of those that CUDA_VISIBLE_DEVICES leaves; empty without a driver."""
    command = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if not command:
        return []
    query = [command, "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return _visible(listed.stdout, environ.get("CUDA_VISIBLE_DEVICES")) if listed.returncode == 0 else []


def _visible(listing: str, visible: str | None) -> list[Gpu]:
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") >= 3]
    names = {row[0]: _sky_name(row[2], row[3]) for row in rows}
    if visible is None:
        return [Gpu(index, name) for index, name in names.items()]
    by_uuid = {row[1]: names[row[0]] for row in rows}
    found: list[Gpu] = []
    for device in (part.strip() for part in visible.split(",")):
        named = [name for uuid, name in by_uuid.items() if device and uuid.startswith(device)]
        name = names.get(device) or (named[0] if named else None)
        if name is None:  # CUDA stops at the first device that is not there
            break
        found.append(Gpu(device, name))
    return found


def _sky_name(name: str, memory_mib: str) -> str:
    """``NVIDIA A100-SXM4-80GB`` -> ``A100-80GB``, ``Tesla T4`` -> ``T4``, ``GeForce RTX 4090`` -> ``RTX4090``."""
    bare = re.sub(r"\b(NVIDIA|Tesla|GeForce|Graphics Device)\b", "", name).strip()
    bare = re.sub(r"^RTX\s+", "RTX", bare)
    model = re.split(r"[\s-]", bare)[0] if bare else "GPU"
    large = model == "A100" and memory_mib.isdigit() and int(memory_mib) > 60_000
    return f"{model}-80GB" if large else model
