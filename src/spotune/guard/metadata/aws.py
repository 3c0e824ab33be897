"""AWS: ``spot/instance-action`` of the instance metadata service, version 2.

404 as long as nothing is planned; then ``{"action": "terminate", "time": "2026-11-24T20:40:00Z"}``, two minutes
ahead (for ``hibernate`` not ahead at all). A rebalance recommendation is not asked for: it says that an interruption
has become likelier, not that there will be one, and a machine is not given up for that.
"""

import time
from collections.abc import Callable

from spotune.guard.metadata.ask import Answer, ask
from spotune.guard.metadata.source import NoAnswer, Warned, read_object, seconds_until

ENDPOINT = "http://169.254.169.254"
TOKEN_TTL_S = 21_600  # the longest that there is
ACTIONS = {"terminate": 120.0, "stop": 120.0, "hibernate": 0.0}


class SpotAction:
    """Asks with a session token, and for a new one when it is refused or about to run out."""

    name = "aws spot/instance-action"
    every_s = 5.0  # what AWS recommends

    def __init__(self, endpoint: str = ENDPOINT, clock: Callable[[], float] = time.monotonic) -> None:
        self._endpoint, self._clock = endpoint.rstrip("/"), clock
        self._token, self._token_until = "", 0.0

    def look(self, now: float) -> Warned | None:
        answer = self._ask()
        if answer.status == 401:
            self._token = ""
            answer = self._ask()
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise NoAnswer(f"status {answer.status}")
        return read_action(answer.body, now)

    def _ask(self) -> Answer:
        if not self._token or self._clock() >= self._token_until:
            self._renew_token()
        url = f"{self._endpoint}/latest/meta-data/spot/instance-action"
        return ask(url, {"X-aws-ec2-metadata-token": self._token})

    def _renew_token(self) -> None:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
        answer = ask(f"{self._endpoint}/latest/api/token", ttl, method="PUT")
        if answer.status != 200 or not answer.body.isprintable():
            raise NoAnswer(f"no session token: status {answer.status}")
        self._token, self._token_until = answer.body.strip(), self._clock() + TOKEN_TTL_S * 0.9


def read_action(body: str, now: float) -> Warned:
    """The planned action; raises NoAnswer for what is none, so that it is asked again."""
    action = read_object(body)
    kind = action.get("action")
    if not isinstance(kind, str) or kind not in ACTIONS:
        raise NoAnswer(f"no action that is known: {body[:80]!r}")
    said_s = seconds_until(action.get("time"), now)
    return Warned(ACTIONS[kind] if said_s is None else said_s)
