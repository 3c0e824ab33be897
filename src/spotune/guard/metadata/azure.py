"""Azure: Preempt events of Scheduled Events.

Events are for all machines of an availability or scale set, so this machine's name is looked for in them. Where the
service does not tell the name, any Preempt event counts: to leave once too often costs less than the other mistake.

Events are not acknowledged. That would let Azure take *all* machines of the event at once, and be worth at most the
few seconds for which this one has nothing to do any more. The other types (Freeze, Reboot, Redeploy, Terminate)
come minutes to days ahead; the regular checkpoints are for them.
"""

from typing import Any

from spotune.guard.metadata.ask import ask
from spotune.guard.metadata.source import NoAnswer, Warned, read_object, seconds_until

ENDPOINT = "http://169.254.169.254"
HEADERS = {"Metadata": "true"}


class ScheduledEvents:
    name = "azure scheduled event Preempt"
    every_s = 1.0  # what Azure recommends

    def __init__(self, endpoint: str = ENDPOINT) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._machine = ""

    def look(self, now: float) -> Warned | None:
        # The first answer takes Azure up to two minutes. Asking again and again begins them as well as one long wait.
        answer = ask(f"{self._endpoint}/metadata/scheduledevents?api-version=2020-07-01", HEADERS)
        if answer.status != 200:
            raise NoAnswer(f"status {answer.status}")
        preempts = read_preempts(answer.body)
        if not preempts:
            return None
        self._machine = self._machine or self._ask_name()
        mine = [event for event in preempts if is_for(event, self._machine)]
        times = [seconds_until(event.get("NotBefore"), now) for event in mine]
        # An event that has started has no time any more, like one whose time cannot be read.
        return Warned(min((time for time in times if time is not None), default=None)) if mine else None

    def _ask_name(self) -> str:
        url = f"{self._endpoint}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        try:
            answer = ask(url, HEADERS)
        except NoAnswer:
            return ""
        return answer.body.strip() if answer.status == 200 else ""


def read_preempts(body: str) -> list[dict[str, Any]]:
    """The Preempt events of a document; raises NoAnswer when it is none."""
    events = read_object(body).get("Events")
    if not isinstance(events, list):
        raise NoAnswer(f"no list of events: {body[:80]!r}")
    return [event for event in events if isinstance(event, dict) and event.get("EventType") == "Preempt"]


def is_for(event: dict[str, Any], machine: str) -> bool:
    """Whether an event takes this machine; it does when either side does not say which."""
    resources = event.get("Resources")
    if not machine or not isinstance(resources, list) or not resources:
        return True
    return machine.lower() in [str(name).lower() for name in resources]
