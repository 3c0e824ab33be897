"""What SkyPilot's client raises, as our errors of one line with what to do about it.

Its server sends exceptions by name: a builtin, one of SkyPilot's own, or a bare ``Exception`` for any other. So every
exception in a call to the client is taken for SkyPilot's.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from spotune.contracts.errors import InfraError, InputError, SpotuneError
from spotune.launch.skypilot.logs import plain

MOST = 600  # characters of what went wrong; some list all that was tried
MOST_FIX = 240
_BUSY = "the API server is busy, try again"
_VERSION = "install the SkyPilot version of the API server"
_ACCESS = "sky check says what is missing"
_REACH = "sky api info says whether the server answers"
_ACCOUNT = "log in to the cloud's account that it was launched with"
# SkyPilot's exception -> what to do about it. The message itself is SkyPilot's.
_REMEDIES = {
    "ApiServerConnectionError": "sky api start, or sky api login for a team's server",
    "ApiServerAuthenticationError": "sky api login",
    "APIVersionMismatchError": _VERSION,
    "APINotSupportedError": _VERSION,
    "NoCloudAccessError": _ACCESS,
    "InvalidCloudConfigs": _ACCESS,
    "InvalidCloudCredentials": _ACCESS,
    "CloudUserIdentityError": _ACCESS,
    "CloudError": "the cloud's own word: its console, or sky check",
    "ClusterOwnerIdentityMismatchError": _ACCOUNT,
    "ResourcesUnavailableError": "other --gpus, --cpus or --memory, another --infra, or later",
    "KubeAPIUnreachableError": "kubectl get pods says whether the context answers",
    "NotSupportedError": "another --infra, or a task without it",
    "ClusterNotUpError": "spotune dev ls says how it stands",
    "ClusterDoesNotExist": "spotune dev ls says which there are",
    "ClusterStatusFetchingError": "sky status --refresh says how it stands",
    "CachedClusterUnavailable": "sky status --refresh says how it stands",
    "PermissionDeniedError": "whoever runs the API server can allow it",
    "NoWorkspaceAccessError": "whoever runs the API server can allow it",
    "WorkspaceAmbiguousError": "active_workspace: NAME in ~/.sky/config.yaml",
    "StorageError": "sky check says which storage may be used",
    "RequestCancelled": "somebody cancelled the request: try again",
    "RequestInterruptedError": "the API server was started anew: try again",
    "ConcurrentWorkerExhaustedError": _BUSY,
    "ServerTemporarilyUnavailableError": _BUSY,
    "OperationalError": _BUSY,
    "ConnectionError": _REACH,
    "ConnectTimeout": _REACH,
    "ReadTimeout": _REACH,
    "SSLError": _REACH,
    "HTTPError": _REACH,
}
_FAULT = "a fault of SkyPilot's: sky api status -a names the request, sky api logs ID shows it"
_USERS = ("InvalidSkyPilotConfigError", "InvalidClusterNameError", "UserRequestRejectedByPolicy", "ValueError")
# What tells nothing without its name, and is nothing that a user did.
_FAULTS = ("AssertionError", "AttributeError", "Exception", "IndexError", "KeyError", "NameError", "TypeError")
_FIX = re.compile(r"\s*\bTo fix(?: this)?[:,]\s*")
_HINT = re.compile(r"\s*\b(?:Hint: |To see the details, run: )")
_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s]*@")


@contextmanager
def translated(where: str = "SkyPilot") -> Iterator[None]:
    """Turns SkyPilot's exceptions into ours: bad input names ``where`` it was given, all else is an InfraError."""
    try:
        yield
    except (SpotuneError, BrokenPipeError):  # ours; and whoever read what we printed has left
        raise
    except Exception as error:
        name = type(error).__name__
        text, fix = one_line(error)
        if name in _USERS:
            raise InputError(where, text, remedy=fix) from error
        if name in _FAULTS:
            text = text if name == "Exception" else f"{name}: {text}"
        remedy = "; ".join(part for part in (_remedy(error), fix) if part)
        raise InfraError(f"SkyPilot: {text}{f' ({remedy})' if remedy else ''}") from error


def one_line(error: BaseException) -> tuple[str, str]:
    """(what an exception of SkyPilot's says, what it advises), without colours, line breaks and passwords."""
    text = masked(" ".join(plain(str(error)).split()))
    what, *fixes = _FIX.split(text, maxsplit=1)
    fix = _HINT.split(fixes[0])[0] if fixes else ""
    what = _HINT.split(what)[0]
    return _cut(what, MOST) or type(error).__name__, _cut(fix, MOST_FIX)


def masked(text: str) -> str:
    """Without the passwords that URLs in it hold: a team's server is logged in to by one."""
    return _PASSWORD.sub(r"\1:***@", text)


def _remedy(error: BaseException) -> str:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    found = next((_REMEDIES[kind] for kind in kinds if kind in _REMEDIES), "")
    return found or (_FAULT if kinds[0] in _FAULTS else "")


def _cut(text: str, most: int) -> str:
    text = text.strip().rstrip(".")
    return text if len(text) <= most else f"{text[:most].rstrip()} …"
