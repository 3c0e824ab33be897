"""The parts of the lab that are plain values."""

from pathlib import Path

import pytest

from tests.lab import preempt
from tests.lab.down import SKY
from tests.lab.layout import LabError, Layout


def test_labs_side_by_side_share_nothing() -> None:
    first, second = (Layout.read({"SPOTUNE_LAB_SLOT": slot}) for slot in ("0", "1"))
    for lab in (first, second):
        ports = [lab.ssh_port, lab.controller_port, lab.api_port, *(node.port for node in lab.nodes)]
        assert len(set(ports)) == len(ports)
    assert not set(first.environ().values()) & set(second.environ().values()) - {"1"}
    assert first.user != second.user
    names = [{word for node in lab.nodes for word in (node.name, node.address)} for lab in (first, second)]
    assert not names[0] & names[1]


def test_the_lab_meets_no_server_of_the_user(tmp_path: Path) -> None:
    lab = Layout.read({"SPOTUNE_LAB_DIR": str(tmp_path / "lab")})
    assert lab.environ()["HOME"] == str(tmp_path / "lab" / "home")
    assert lab.api_port != 46580


@pytest.mark.parametrize(("name", "value"), [("SLOT", "20"), ("DIR", "/tmp"), ("DIR", "lab")])
def test_no_lab_in_a_place_that_is_not_its_own(name: str, value: str) -> None:
    with pytest.raises(LabError):
        Layout.read({f"SPOTUNE_LAB_{name}": value})


def test_a_node_by_its_number() -> None:
    lab = Layout.read({})
    assert lab.node("gpu2") == lab.node("2") == lab.node(lab.nodes[1].name) == lab.nodes[1]
    with pytest.raises(LabError, match="no such node"):
        lab.node("gpu3")


@pytest.mark.parametrize("argv", [[], ["gpu3"], ["gpu1", "1", "2"], ["gpu1", "--hard"]])
def test_what_preempt_does_not_take(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert preempt.main(argv) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "is_sky"),
    [
        ("python -m sky.server.server --port=46780", True),
        ("python -u -msky.jobs.controller 4f9f1ebb", True),
        ("python /venv/bin/sky jobs queue", True),
        ("python -m skylark.jobs", False),
    ],
)
def test_what_is_skypilots(command: str, is_sky: bool) -> None:
    assert bool(SKY.search(command)) == is_sky
