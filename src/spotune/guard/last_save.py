"""Whether one more checkpoint fits into what is left before the machine goes. Plain numbers in, one line out."""

from dataclasses import dataclass, replace
from typing import Literal

Action = Literal["save", "finish", "leave"]

# Saves of one run differ in how long they take, and the disk and the network are shared: a fifth more, and a second
# for what is not measured (the fence, the commit object). Not more: a save that does not fit harms nothing.
MARGIN = 1.2
FIXED_S = 1.0
UNMEASURED_S = 10.0  # with so much left an unmeasured save is worth the try


@dataclass(frozen=True)
class Outlook:
    """What is known when the notice has come.

    Attributes:
        left_s: seconds until the machine goes.
        new_steps: steps done since the newest checkpoint that is committed or on its way.
        step_s: how long a step takes, the wait for the next boundary at worst; None: not measured yet.
        write_s: training's stop until a checkpoint is complete on the local disk; None: none was written yet.
        upload_s: from there to its commit; None: none was committed yet.
        uploading: whether an upload is under way; it ends before another begins.
        upload_left_s: what is left of it; None: not known.
    """

    left_s: float
    new_steps: int
    step_s: float | None = None
    write_s: float | None = None
    upload_s: float | None = None
    uploading: bool = False
    upload_left_s: float | None = None


@dataclass(frozen=True)
class LastSave:
    """``save`` a new checkpoint, let the running upload ``finish``, or ``leave`` with the last commit; and why."""

    action: Action
    reason: str


def fits(outlook: Outlook) -> LastSave:
    """What to do with the time that is left."""
    new = _new_checkpoint(outlook)
    if new.action == "save" or not outlook.uploading:
        return new
    running = _running_upload(outlook)
    return replace(running, reason=f"{running.reason}; {new.reason}")


def _new_checkpoint(outlook: Outlook) -> LastSave:
    if outlook.new_steps <= 0:
        return LastSave("leave", "there is nothing new to save")
    step_s, write_s, upload_s = outlook.step_s, outlook.write_s, outlook.upload_s
    if step_s is None or write_s is None or upload_s is None:
        # Tried also behind a running upload: that one goes first, so that nothing is lost by it.
        return _unmeasured(outlook.left_s, "save", "a new checkpoint")
    upload_left_s = _upload_left_s(outlook) or 0.0
    wait_s = max(upload_left_s - step_s - write_s, 0.0)
    parts = f"{step_s:.1f} s to the step's end, {write_s:.1f} s to write, {upload_s:.1f} s to upload"
    if wait_s:
        parts += f" after {wait_s:.1f} s for the running upload"
    if (step_s + write_s + wait_s + upload_s) * MARGIN + FIXED_S > outlook.left_s:
        return LastSave("leave", f"a new checkpoint does not fit in {outlook.left_s:.0f} s: {parts}")
    return LastSave("save", f"a new checkpoint fits in {outlook.left_s:.0f} s: {parts}")


def _running_upload(outlook: Outlook) -> LastSave:
    left_s = _upload_left_s(outlook)
    if left_s is None:
        return _unmeasured(outlook.left_s, "finish", "the running upload")
    # No margin: it is under way, and to wait for it costs seconds.
    if left_s <= outlook.left_s:
        return LastSave("finish", f"the running upload ends in {left_s:.1f} of {outlook.left_s:.0f} s")
    return LastSave("leave", f"the running upload needs {left_s:.1f} s, there are {outlook.left_s:.0f} s")


def _upload_left_s(outlook: Outlook) -> float | None:
    """What is left of the running upload: at worst, all that the last one took."""
    if not outlook.uploading:
        return 0.0
    return outlook.upload_s if outlook.upload_left_s is None else outlook.upload_left_s


def _unmeasured(left_s: float, action: Action, what: str) -> LastSave:
    if left_s >= UNMEASURED_S:
        return LastSave(action, f"{what} is tried: nothing is measured yet, {left_s:.0f} s are left")
    return LastSave("leave", f"{what} is not tried: nothing is measured yet, only {left_s:.0f} s are left")
