"""The result pushed to the hub, as ``trl sft`` does it at its end: what ``output/`` is, in one commit.

Safe to be cut off anywhere and repeated: files that the hub has already are not sent, and without a change there is
no commit.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spotune.contracts.configkeys import is_on
from spotune.contracts.configwhole import HUB_NAME
from spotune.contracts.errors import SpotuneError
from spotune.contracts.extras import ExtraJob
from spotune.contracts.machinefaults import chain
from spotune.sft.faults import one_line

REQUEST_S = 60.0  # without it a hub that hangs is waited for for ever
PATIENCE_S = 300.0
PAUSES_S = (2.0, 5.0, 15.0, 60.0)  # after the n-th failure in a row; the last one from then on
REFUSALS = (401, 403)
TOKEN_REMEDY = "--secret HF_TOKEN, with a token that may write"


def hub(request_s: float = REQUEST_S) -> Any:
    """The hub's client, which gives up on a request that takes too long. Raises SpotuneError when there is no way."""
    import httpx2
    from huggingface_hub import HfApi, constants, get_token, set_client_factory

    if constants.HF_HUB_OFFLINE:
        raise SpotuneError("the hub is offline here (HF_HUB_OFFLINE)")
    if not get_token():
        raise SpotuneError(f"no token for the hub ({TOKEN_REMEDY})")
    set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=request_s))
    return HfApi()


def push(
    job: ExtraJob,
    output: Path,
    api: Any,
    patience_s: float = PATIENCE_S,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, str]:
    """Pushes ``output`` and returns what the mark says of it; tries again while the hub is away, up to a deadline.

    Raises SpotuneError when the hub refuses, or stays away.
    """
    import httpx2

    deadline = time.monotonic() + patience_s
    pauses = _pauses()
    while True:
        try:
            return _push_once(job, output, api)
        except (OSError, RuntimeError, httpx2.HTTPError) as error:
            status = _status_of(error)
            if status in REFUSALS:
                raise SpotuneError(f"the hub refuses it, HTTP {status} ({TOKEN_REMEDY})") from error
            if status is not None and 400 <= status < 500 and status not in (408, 409, 412, 429):
                raise
            reason, pause_s = _reason_of(error), next(pauses)
            if time.monotonic() + pause_s > deadline:
                raise SpotuneError(f"the hub does not take it: {reason}") from error
            print(f"[spotune] the hub, tried again in {pause_s:.0f} s: {reason}", file=sys.stderr, flush=True)
            sleep(pause_s)


def _push_once(job: ExtraJob, output: Path, api: Any) -> dict[str, str]:
    config = job.config
    private = is_on(config, "hub_private_repo") if config.get("hub_private_repo") is not None else None
    repo = api.create_repo(repo_name(config, job.run_id), private=private, exist_ok=True)
    revision = config.get("hub_revision") or None
    if revision:
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=str(output),
        revision=revision,
        commit_message=f"{job.run_id} at step {job.step}",
        commit_description=f"Trained with spotune. weights_sha256: {job.weights_sha256}",
    )
    return {"repo_id": repo.repo_id, "oid": commit.oid, "url": commit.commit_url}


def repo_name(config: Mapping[str, Any], run_id: str) -> str:
    """``hub_model_id``, else the name of ``output_dir`` as Trainer has it, else the run's."""
    named = str(config.get("hub_model_id") or "")
    folder = Path(str(config.get("output_dir") or "")).name
    return named or (folder if HUB_NAME.fullmatch(folder) else run_id)


def write_card(trainer: Any, output: Path, config: Mapping[str, Any], run_id: str) -> None:
    """TRL's model card. PEFT's names a local base model by its path, which the hub refuses."""
    trainer.hub_model_id = repo_name(config, run_id)
    dataset = str(config.get("dataset_name") or "")
    is_on_hub = HUB_NAME.fullmatch(dataset) and not Path(dataset).exists()
    trainer.create_model_card(trainer.hub_model_id.split("/")[-1], dataset if is_on_hub else None)
    Path(trainer.args.output_dir, "README.md").replace(output / "README.md")


def doubts() -> list[str]:
    """What will keep a push from working, known before training: a line each."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return ["push_to_hub: the hub is offline here (HF_HUB_OFFLINE); the push will be owed"]
    return [] if get_token() else [f"push_to_hub: there is no token ({TOKEN_REMEDY}); the push will be owed"]


def _reason_of(error: BaseException) -> str:
    """One line; of a file's upload the client says only that it failed, and the cause is behind that."""
    return one_line(error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error)


def _status_of(error: BaseException) -> int | None:
    """The HTTP status that an error is about, of it or of what caused it; None for a hub that did not answer."""
    responses = (getattr(link, "response", None) for link in chain(error))
    return next((int(response.status_code) for response in responses if response is not None), None)


def _pauses() -> Iterator[float]:
    yield from PAUSES_S[:-1]
    while True:
        yield PAUSES_S[-1]
