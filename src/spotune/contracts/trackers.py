"""When wandb is asked for: live under one id across all attempts, or rebuilt at the end, or not at all."""

from collections.abc import Mapping
from typing import Any, Literal

Wandb = Literal["live", "rebuild", "off"]


def wandb_mode(config: Mapping[str, Any], environ: Mapping[str, str]) -> Wandb:
    """``live`` where a key allows it; else ``rebuild``: wandb's own offline files do not survive a SIGKILL
    and repeat the steps that are done twice, so one clean run is written from our events at the end.
    """
    asked = config.get("report_to") or []
    asked = [asked] if isinstance(asked, str) else asked
    if not {"wandb", "all"} & set(asked) or environ.get("WANDB_MODE") == "disabled":
        return "off"
    return "live" if environ.get("WANDB_API_KEY") and environ.get("WANDB_MODE", "online") == "online" else "rebuild"
