"""Whatever SkyPilot's client raises is one line of ours, with what to do about it, and without a password."""

import pytest

from spotune.core.errors import InfraError, InputError
from spotune.launch.skypilot.client import MOST, MOST_FIX, masked, translated


class ResourcesUnavailableError(Exception):
    """As SkyPilot's."""


class KubeAPIUnreachableError(ResourcesUnavailableError):
    """As SkyPilot's."""


class ResourcesMismatchError(Exception):
    """As SkyPilot's."""


class ApiServerConnectionError(RuntimeError):
    """As SkyPilot's."""


UNAVAILABLE = (
    "\x1b[33mCatalog does not contain any instances satisfying the request: 1x <Cloud>({'L5': 1}).\n"
    "To fix: relax or change the resource requirements.\nTry one of these offered accelerators: ['L4:1']\n\n"
    "Hint: \x1b[1msky gpus list\x1b[0m to list available accelerators.\n"
)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            ResourcesUnavailableError(UNAVAILABLE),
            "SkyPilot: Catalog does not contain any instances satisfying the request: 1x <Cloud>({'L5': 1}) (other"
            " --gpus, --cpus or --memory, another --infra, or later; relax or change the resource requirements. Try one"
            " of these offered accelerators: ['L4:1'])",
        ),
        (
            ResourcesMismatchError("Requested resources do not match. To fix: specify a new cluster name."),
            "SkyPilot: Requested resources do not match (specify a new cluster name)",
        ),
        (
            KubeAPIUnreachableError("no answer"),
            "SkyPilot: no answer (kubectl get pods says whether the context answers)",
        ),
        (
            ApiServerConnectionError("Could not connect to SkyPilot API server at https://team:s3cret@host."),
            "SkyPilot: Could not connect to SkyPilot API server at https://team:***@host (sky api start, or sky api"
            " login for a team's server)",
        ),
        (ConnectionRefusedError("refused"), "SkyPilot: refused (sky api info says whether the server answers)"),
        (RuntimeError("plain"), "SkyPilot: plain"),
    ],
)
def test_one_line_and_what_to_do(error: Exception, says: str) -> None:
    with pytest.raises(InfraError) as raised, translated():
        raise error
    assert str(raised.value) == says
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyError("zone"), AssertionError(), TypeError("x"), Exception("ApiException: gone")])
def test_faults_of_the_server_are_no_stack_traces(error: Exception) -> None:
    """It sends builtins by name, and what it does not know as a bare Exception."""
    with (
        pytest.raises(InfraError, match=r"SkyPilot: \w+.*\(a fault of SkyPilot's: sky api status -a") as raised,
        translated(),
    ):
        raise error
    assert "\n" not in str(raised.value)


def test_ours_and_a_reader_that_left_pass_through() -> None:
    for error in (InputError("task", "no"), BrokenPipeError()):
        with pytest.raises(type(error)) as raised, translated():
            raise error
        assert raised.value is error


def test_bad_input_names_where_it_was_given() -> None:
    with pytest.raises(InputError, match=r"^dev\.yaml: no such region \(check it\)$"), translated("dev.yaml"):
        raise ValueError("no such region. To fix: check it.")


def test_a_long_story_is_cut() -> None:
    with pytest.raises(InfraError) as raised, translated():
        raise RuntimeError(f"{'tried ' * 1000} To fix: {'this ' * 1000}")
    assert len(str(raised.value)) < MOST + MOST_FIX + 30


def test_passwords_in_addresses() -> None:
    assert masked("at http://team:p@ss:w0rd@host:46580/x, or http://host:80/a@b") == (
        "at http://team:***@host:46580/x, or http://host:80/a@b"
    )
    assert masked("s3://bucket/x team:y@z") == "s3://bucket/x team:y@z"
