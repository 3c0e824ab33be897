"""What each lost machine cost the run: what the next one spent until it was where that one had been.

    provision + setup + load + restore + replayed, of the attempt that followed, at that attempt's price

``replayed`` here is all that is done again, the waits, evaluations and saves between those steps too. What a machine
spent on leaving, or after its last sign of life, is in its own phases. Waiting for the next one costs nothing.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from spotune.contracts.money import cost_usd
from spotune.cost.account import Account
from spotune.cost.phases import Phase, total

RESTART: tuple[Phase, ...] = ("provision", "setup", "load", "restore")


def preemptions(accounts: Sequence[Account]) -> list[dict[str, Any]]:
    """One for each machine that went while the run was not over, in order; ``attempt`` is the one that was lost."""
    return [_cost(lost, following) for lost, following in pairwise(accounts) if not lost.stands_still]


def _cost(lost: Account, following: Account) -> dict[str, Any]:
    sums = total([segment for segment in following.segments if not segment.again])
    seconds = {f"{phase}_s": sums[phase] for phase in RESTART}
    seconds["replayed_s"] = sum(segment.seconds for segment in following.segments if segment.again)
    paid_s = sum(seconds.values())
    return {
        "attempt": lost.machine.attempt,
        "at": lost.span.ended_at,
        "end_reason": lost.end_reason,
        "waited_s": max(0.0, following.span.started_at - lost.span.ended_at),
        **seconds,
        "paid_s": paid_s,
        "cost_usd": cost_usd(paid_s, following.nodes, following.price),
    }
