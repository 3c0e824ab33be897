"""The one door to SkyPilot: its client is imported here and nowhere else, and its errors end here as one line.

``import sky`` costs seconds of CPU, so no verb comes here before it knows that SkyPilot has something to say.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spotune.contracts.errors import InfraError, InputError

# SkyPilot's exception -> what to do about it. The message itself is SkyPilot's.
_REMEDIES = {
    "ApiServerConnectionError": "sky api start, or sky api login for a team's server",
    "ApiServerAuthenticationError": "sky api login",
    "APIVersionMismatchError": "install the SkyPilot version of the API server",
    "NoCloudAccessError": "sky check says what is missing",
    "InvalidCloudCredentials": "sky check says what is missing",
    "ResourcesUnavailableError": "other --gpus, another --infra, or later",
    "ConcurrentWorkerExhaustedError": "the API server is busy, try again",
    "ServerTemporarilyUnavailableError": "the API server is busy, try again",
}
_USERS = ("InvalidSkyPilotConfigError", "InvalidClusterNameError", "UserRequestRejectedByPolicy", "ValueError")
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def sdk() -> Any:
    """The module ``sky``; raises InfraError where it is not installed."""
    try:
        import sky
    except ImportError as error:
        raise InfraError(f"SkyPilot cannot be imported: {error} (make setup)") from error
    return sky


def ask(request_id: Any) -> Any:
    """The result of a request; every call of SkyPilot's client returns one. Raises InfraError or InputError."""
    with translated():
        return sdk().get(request_id)


def watch(request_id: Any, output: Any = None) -> Any:
    """As ``ask``, while what the server says of the request goes to ``output`` (a text stream; default stdout)."""
    with translated():
        return sdk().stream_and_get(request_id, output_stream=output)


@contextmanager
def translated(where: str = "SkyPilot") -> Iterator[None]:
    """Turns SkyPilot's exceptions into ours: bad input names ``where`` it was given, all else is an InfraError."""
    import click
    import requests

    exceptions = sdk().exceptions
    theirs = tuple(kind for kind in vars(exceptions).values() if isinstance(kind, type) and issubclass(kind, Exception))
    try:
        yield
    except (*theirs, click.ClickException, requests.RequestException, ValueError, RuntimeError, OSError) as error:
        name, text = type(error).__name__, one_line(error)
        if name in _USERS:
            raise InputError(where, text) from error
        remedy = _REMEDIES.get(name)
        raise InfraError(f"SkyPilot: {text}{f' ({remedy})' if remedy else ''}") from error


def one_line(error: BaseException) -> str:
    """What an exception of SkyPilot's says, without its colours and line breaks."""
    text = " ".join(_COLOUR.sub("", str(error)).split())
    return text or type(error).__name__
