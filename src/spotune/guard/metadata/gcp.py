"""GCP: ``instance/preempted`` of the metadata server, TRUE from the moment when the machine is being taken.

It does not say how long is left: 30 s, during which the system shuts down. Asked every second instead of by
``wait_for_change``: a second of thirty, and no request that hangs on a connection which has died silently.
"""

from spotune.guard.metadata.ask import ask
from spotune.guard.metadata.source import NoAnswer, Warned

HOST = "metadata.google.internal"


class Preempted:
    name = "gcp instance/preempted"
    every_s = 1.0

    def __init__(self, host: str = HOST) -> None:
        self._url = f"http://{host}/computeMetadata/v1/instance/preempted"

    def look(self, now: float) -> Warned | None:
        answer = ask(self._url, {"Metadata-Flavor": "Google"})
        if answer.status != 200:
            raise NoAnswer(f"status {answer.status}")
        match answer.body.strip():
            case "TRUE":
                return Warned(None)
            case "FALSE":
                return None
            case other:
                raise NoAnswer(f"neither TRUE nor FALSE: {other[:80]!r}")
