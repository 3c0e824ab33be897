"""The push to the hub, against a hub on loopback that takes it, refuses it, fails, hangs, and loses answers."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from spotune.core.errors import SpotuneError
from spotune.core.protocol import ExtraJob
from spotune.sft.extras import doubts, hub, push, repo_name
from tests.fake_hub import TOKEN, Hub, fake_hub

# The hub's own client sends files in a way that httpx2 calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO = "somebody/a-run"
REQUEST_S = 30.0


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the fake hub has LFS alone
    with fake_hub() as made:
        set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=REQUEST_S))
        yield made
    set_client_factory(default_client_factory)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "deep" / "notes.txt").write_text("text")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A card\n")
    return folder


@pytest.fixture
def send(there: Hub, output: Path) -> Callable[..., dict[str, str]]:
    def push_it(token: str = TOKEN, patience_s: float = 60.0, **config: Any) -> dict[str, str]:
        job = ExtraJob("a-run", 7, "5" * 64, {"push_to_hub": True, **config})
        return push(job, output, HfApi(there.url, token), patience_s, sleep=lambda seconds: None)

    return push_it


def test_what_output_is_lies_on_the_hub_in_one_commit(send: Callable[..., Any], there: Hub, output: Path) -> None:
    facts = send()
    branch = there.main(REPO)
    assert branch.files == {
        path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()
    }
    assert [commit["title"] for commit in branch.commits] == ["initial commit", "a-run at step 7"]
    assert "5" * 64 in branch.commits[1]["description"]
    oid = branch.commits[1]["oid"]
    assert facts == {"repo_id": REPO, "oid": oid, "url": f"{there.url}/{REPO}/commit/{oid}"}


def test_a_second_push_changes_nothing(send: Callable[..., Any], there: Hub) -> None:
    assert send() == send()
    assert len(there.main(REPO).commits) == 2
    assert sum(name.startswith("PUT") for name in there.asked) == 1  # the weights went once


def test_names_branches_and_privacy_are_the_configs(send: Callable[..., Any], there: Hub) -> None:
    for _ in range(2):
        facts = send(hub_model_id="acme/model", hub_revision="v2", hub_private_repo=True)
    assert there.private == {"acme/model": True}
    assert facts["oid"] == there.repos["acme/model"]["v2"].commits[-1]["oid"]
    assert len(there.repos["acme/model"]["v2"].commits) == 2
    assert not there.main("acme/model").files


@pytest.mark.parametrize("faults", [{"create": [503, 503]}, {"commit": [503, 429]}, {"create": ["hang"]}], ids=str)
def test_a_hub_that_is_away_is_asked_again(
    send: Callable[..., Any], there: Hub, faults: dict[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    there.faults = {name: list(steps) for name, steps in faults.items()}
    tries, hangs = sum(len(steps) for steps in faults.values()), "hang" in str(faults)
    if hangs:
        set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=0.5))
    send()
    assert len(there.main(REPO).commits) == 2
    said = capsys.readouterr().err.count("[spotune] the hub, tried again in")
    assert said == tries or (hangs and said > tries)  # a slow machine's answers are late too


def test_an_answer_that_is_lost_makes_no_second_commit(send: Callable[..., Any], there: Hub) -> None:
    there.faults = {"commit": ["drop"]}
    facts = send()
    assert len(there.main(REPO).commits) == 2
    assert facts["oid"] == there.main(REPO).commits[1]["oid"]


def test_a_hub_that_stays_away_is_given_up(send: Callable[..., Any], there: Hub) -> None:
    there.faults = {"create": [503] * 99}
    with pytest.raises(SpotuneError, match="the hub does not take it: HfHubHTTPError: .*503"):
        send(patience_s=1.0)


def test_a_refusal_is_not_asked_again(send: Callable[..., Any], there: Hub) -> None:
    with pytest.raises(SpotuneError, match=r"refuses it, HTTP 401 \(--secret HF_TOKEN"):
        send(token="hf_wrong")
    assert there.asked.count("POST /api/repos/create") == 1
    there.faults = {"commit": [403, 403]}
    with pytest.raises(SpotuneError, match="HTTP 403"):
        send()
    assert there.faults["commit"] == [403]


def test_a_card_that_the_hub_refuses_is_said(send: Callable[..., Any], output: Path) -> None:
    (output / "README.md").write_text("---\nbase_model: /tmp/model\n---\n")
    with pytest.raises(ValueError, match="base_model"):
        send()


def test_the_repository_is_called_as_trainer_calls_it() -> None:
    assert repo_name({}, "a-run") == "a-run"
    assert repo_name({"output_dir": "out/my-model/"}, "a-run") == "my-model"
    assert repo_name({"output_dir": "out/my model"}, "a-run") == "a-run"
    assert repo_name({"output_dir": "out", "hub_model_id": "acme/m"}, "a-run") == "acme/m"


def test_what_cannot_work_is_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = sys.modules["huggingface_hub.constants"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline" in doubts()[0]
    with pytest.raises(SpotuneError, match="offline"):
        hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert "--secret HF_TOKEN" in doubts()[0]
    with pytest.raises(SpotuneError, match="no token"):
        hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert doubts() == []
