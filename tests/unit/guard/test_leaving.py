"""What is still saved when the machine goes, and how it is left."""

import signal
from collections.abc import Iterator

import pytest

from spotune.guard.leaving import SIGNALS, STAY_S, Outlook, departure, fits, stay_until_killed


@pytest.mark.parametrize(
    ("infra", "source", "managed", "left_s", "stay"),
    [
        ("slurm", "SIGURG", True, 20, True),
        ("slurm", "SIGTERM", True, 500, True),  # however long: its end is the same race
        ("slurm", "SIGTERM", False, 20, False),  # a dev cluster
        ("slurm", "SIGINT", True, 290, False),
        ("gcp", "gcp instance/preempted", True, 20, True),
        ("gcp", "SIGTERM on node 1", True, 20, True),
        ("azure", "azure scheduled event Preempt", True, 25, True),
        ("kubernetes", "kubernetes pod deletion", True, 25, True),
        ("kubernetes", "aws spot/instance-action", True, 110, True),
        ("aws", "aws spot/instance-action", True, 110, False),
        ("aws", "aws spot/instance-action", True, 35, False),
        ("aws", "aws spot/instance-action", True, 34, True),
        ("aws", "SIGTERM", True, 10, True),
        ("aws", "SIGTERM", False, 10, False),
        ("lambda", "SIGTERM", True, 5, False),
        ("local", "SIGTERM", True, 5, False),
        ("", "SIGTERM", False, 25, False),
        ("", "SIGINT", False, 290, False),
    ],
)
def test_how_a_machine_is_left(infra: str, source: str, managed: bool, left_s: float, stay: bool) -> None:
    stays, why = departure(infra, source, managed, left_s)
    assert stays is stay
    assert why
    assert "\n" not in why


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_staying_is_one_deaf_sleep_that_ends_a_minute_after_the_deadline() -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
        for number in SIGNALS:
            signal.raise_signal(number)

    stay_until_killed(1030.0, clock=lambda: 1010.0, sleep=sleep)
    stay_until_killed(1030.0, clock=lambda: 5000.0, sleep=sleep)
    assert slept == [20.0 + STAY_S, STAY_S]


KNOWN = {"new_steps": 4, "step_s": 2.0, "write_s": 1.0, "upload_s": 7.0}
# what is known, what is done, a part of the reason
OUTLOOKS: dict[str, tuple[Outlook, str, str]] = {
    "it fits": (Outlook(left_s=28, **KNOWN), "save", "fits in 28 s: 2.0 s to the step's end, 1.0 s to write, 7.0 s"),
    "just": (Outlook(left_s=13, **KNOWN), "save", "fits in 13 s"),
    "but for the margin": (Outlook(left_s=12.9, **KNOWN), "leave", "does not fit in 13 s"),
    "nothing is left": (Outlook(left_s=0, **KNOWN), "leave", "does not fit in 0 s"),
    "a long step": (Outlook(left_s=28, **{**KNOWN, "step_s": 40.0}), "leave", "40.0 s to the step's end"),
    "nothing new": (Outlook(left_s=28, **{**KNOWN, "new_steps": 0}), "leave", "nothing new"),
    "a first one": (Outlook(left_s=28, new_steps=4), "save", "nothing is measured yet, 28 s are left"),
    "a first one, its step known": (Outlook(left_s=28, new_steps=4, step_s=2), "save", "a new checkpoint is tried"),
    "a first one, too late": (Outlook(left_s=9.9, new_steps=4), "leave", "a new checkpoint is not tried"),
    "both": (
        Outlook(left_s=28, **KNOWN, uploading=True, upload_left_s=5.0),
        "save",
        "7.0 s to upload after 2.0 s for the running upload",
    ),
    "the upload ends while it is written": (
        Outlook(left_s=13, **KNOWN, uploading=True, upload_left_s=3.0),
        "save",
        "fits in 13 s",
    ),
    "only the running one": (
        Outlook(left_s=14, **KNOWN, uploading=True, upload_left_s=6.0),
        "finish",
        "the running upload ends in 6.0 of 14 s; a new checkpoint does not fit in 14 s",
    ),
    "the running one, at worst a whole one": (
        Outlook(left_s=12, **KNOWN, uploading=True),
        "finish",
        "ends in 7.0 of 12 s",
    ),
    "not even that": (
        Outlook(left_s=5, **KNOWN, uploading=True, upload_left_s=6.0),
        "leave",
        "the running upload needs 6.0 s, there are 5 s",
    ),
    "the running one holds all": (
        Outlook(left_s=8, **{**KNOWN, "new_steps": 0}, uploading=True, upload_left_s=6.0),
        "finish",
        "there is nothing new to save",
    ),
    "the first upload is under way": (
        Outlook(left_s=28, new_steps=4, step_s=2.0, write_s=1.0, uploading=True),
        "save",
        "a new checkpoint is tried: nothing is measured yet",
    ),
    "the first upload, too late": (Outlook(left_s=6, new_steps=4, uploading=True), "leave", "only 6 s are left"),
    "the first upload, its rest known": (
        Outlook(left_s=6, new_steps=4, uploading=True, upload_left_s=5.0),
        "finish",
        "ends in 5.0 of 6 s",
    ),
}


@pytest.mark.parametrize("case", OUTLOOKS)
def test_what_is_still_saved(case: str) -> None:
    outlook, action, reason = OUTLOOKS[case]
    found, why = fits(outlook)
    assert found == action, why
    assert reason in why
    assert "\n" not in why


def test_more_time_never_saves_less() -> None:
    worth = ["leave", "finish", "save"]
    for case, (outlook, _, _) in OUTLOOKS.items():
        saved = [worth.index(fits(Outlook(**{**vars(outlook), "left_s": left_s / 2}))[0]) for left_s in range(240)]
        assert saved == sorted(saved), case
