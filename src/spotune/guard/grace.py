"""How long a machine has left after a notice that does not say so itself.

| infra | notice | seconds | from |
|---|---|---|---|
| slurm | SIGURG or SIGTERM | 25 | the partition's GraceTime, not in the environment; our test cluster's |
| kubernetes | SIGTERM | 30 | Kubernetes' terminationGracePeriodSeconds, its default |
| gcp | preempted, SIGTERM | 30 | Google's documentation: from ACPI G2 to G3 on spot machines |
| azure | event that has started, SIGTERM | 30 | Azure's documentation: the least notice of a Preempt event |
| any | SIGTERM | 30 | SkyPilot's source: from SIGTERM to SIGKILL of a job that is cancelled |
| any | Ctrl-C | 300 | nobody kills after it, but a person waits |

``SPOTUNE_GRACE_S`` overrides all but Ctrl-C. What a notice says itself (AWS and Azure name the time) stands.
"""

PERSON_S = 300.0
PRIOR_S = 30.0
PRIORS_S = {"slurm": 25.0}


def prior_s(infra: str, source: str, told_s: float | None = None) -> float:
    """Seconds from the notice of ``source`` to the kill; ``told_s``: what the user said."""
    if is_person(source):
        return PERSON_S
    return PRIORS_S.get(infra, PRIOR_S) if told_s is None else told_s


def is_person(source: str) -> bool:
    """Whether the notice is a Ctrl-C, here or on another node."""
    return source.split(" ", 1)[0] == "SIGINT"
