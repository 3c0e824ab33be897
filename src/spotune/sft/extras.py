"""Merges an adapter into its base model, pushes the result to the hub, and rebuilds wandb's run.

The guard starts ``python -m spotune.sft.extras NAME FOLDER`` for one of them (see core/protocol.py). Like a rank, the
process ignores signals and dies with the guard. It always leaves an answer. Only ``wandb`` is a plain program:
FOLDER/run.json -> FOLDER/wandb/offline-run-*.
"""

from spotune.sft.worker import die_with_parent, ignore_signals

if __name__ == "__main__":
    import sys

    if sys.argv[1:2] != ["wandb"]:
        ignore_signals()  # before anything else is imported


import gc
import itertools
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from spotune.core import protocol
from spotune.core.config_keys import is_on, schema
from spotune.core.config_rules import HUB_NAME
from spotune.core.errors import SpotuneError, protect_output
from spotune.core.store.faults import chain
from spotune.sft.preflight import one_line

# Merging: one folder that loads without PEFT.
#
# Runs on the CPU, in the type that training loaded the base in. A base that was quantized for training is loaded in
# bfloat16, since 4 or 8 bits cannot hold base and adapter. The base is in memory once. The merged model is loaded again
# and must compute what the adapter computes.

# How far apart logits may be, as a share of their norm. Rounding the sum of base and adapter to the base's type gives
# at most 1.2e-6, 2.6e-3 and 2.1e-2, measured on random models of 2 to 28 layers with adapters that change logits by 2 %
# to 140 %. Also allowed is a tenth of the adapter's own change: a trained one of extreme size, 138 %, gave 8.5e-2 in
# bfloat16. An adapter that was not merged is as far away as all that it changes.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}

# The keys of model_init_kwargs that belong to training or to the machine that trained.
_NOT_FOR_A_MERGE = {"attn_implementation", "device_map", "max_memory", "quantization_config", "tp_plan", "use_cache"}
# The adapter's own files of the result; the rest belongs to the tokenizer or the processor.
_ADAPTERS_OWN = ("adapter_*", "README.md", "trainer_state.json", "training_args.bin")


def merge(config: Mapping[str, Any], result: Path, target: Path) -> dict[str, str]:
    """Merges the adapter in ``result`` into the base model of ``config``, to ``target``. Returns the facts.

    Raises SpotuneError if the merged model does not compute what the adapter computes.
    """
    import transformers
    from peft import PeftModel
    from transformers import AutoTokenizer
    from transformers.trainer_utils import align_special_tokens
    from trl.trainer.utils import create_model_from_path

    transformers.utils.logging.disable_progress_bar()
    base = create_model_from_path(str(config["model_name_or_path"]), **base_options(config))
    dtypes = {name: parameter.dtype for name, parameter in base.named_parameters()}
    known = set(not_finite(base))  # a mask of -inf, for example, which merging did not make
    dtype = str(base.dtype).removeprefix("torch.")
    _match_vocabulary(base, result)
    model = PeftModel.from_pretrained(base, str(result)).eval()
    wanted = probe(model)
    with model.disable_adapter():
        effect = _distance(probe(model), wanted)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():  # PEFT trains whole tensors in float32
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    # Trainer does the same for a model that is trained whole.
    tokenizer = AutoTokenizer.from_pretrained(str(result), trust_remote_code=is_on(config, "trust_remote_code"))
    align_special_tokens(merged, tokenizer)
    shutil.rmtree(target, ignore_errors=True)
    merged.save_pretrained(target, max_shard_size="5GB")
    shutil.copytree(result, target, ignore=shutil.ignore_patterns(*_ADAPTERS_OWN), dirs_exist_ok=True)
    del base, model, merged
    gc.collect()
    return {"check": check(target, config, wanted, effect, dtype, known)}


def base_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options with which training loaded the base, as far as they matter here; always on the CPU."""
    given = config.get("model_init_kwargs") or {}
    given = json.loads(given) if isinstance(given, str) else given
    options = {
        "revision": config.get("model_revision") or "main",
        "trust_remote_code": is_on(config, "trust_remote_code"),
        "dtype": config.get("dtype", schema()["properties"]["dtype"]["default"]),
    }
    options |= {name: value for name, value in given.items() if name not in _NOT_FOR_A_MERGE}
    if is_on(config, "load_in_4bit") or is_on(config, "load_in_8bit"):
        options["dtype"] = "bfloat16"
    return options | {"device_map": None}


def check(
    target: Path, config: Mapping[str, Any], wanted: Any, effect: float, dtype: str, known: Collection[str] = ()
) -> str:
    """Loads the merged model and compares its logits; returns a line of figures. Raises SpotuneError.

    ``known``: the tensors that are not finite in the base itself.
    """
    from trl.trainer.utils import create_model_from_path

    trust = is_on(config, "trust_remote_code")
    model = create_model_from_path(str(target), dtype=dtype, device_map=None, trust_remote_code=trust).eval()
    bad = [name for name in not_finite(model) if name not in known]
    if bad:
        raise SpotuneError(f"merged, {len(bad)} tensors are not finite, the first is {bad[0]}")
    distance, allowed = _distance(probe(model), wanted), max(TOLERANCE.get(dtype, 5e-2), 0.1 * effect)
    if not distance <= allowed:
        raise SpotuneError(f"merged, its logits are {distance:.1e} away from the adapter's, {allowed:.1e} is allowed")
    return f"{dtype}, logits {distance:.1e} from the adapter's, which is {effect:.1e} from the base"


def not_finite(model: Any) -> list[str]:
    from spotune.sft.boundary import all_finite

    return [name for name, tensor in model.state_dict().items() if not all_finite([tensor])]


def probe(model: Any) -> Any:
    """Returns the logits of a fixed row of 64 tokens."""
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(64) * 7919 + 13).remainder(size)[None]
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def _distance(found: Any, wanted: Any) -> float:
    """Returns the distance of two sets of logits, as a share of the second's norm."""
    return float((found - wanted).norm() / wanted.norm())


def _match_vocabulary(base: Any, result: Path) -> None:
    """Resizes the base's embeddings to the adapter's: training resized them if a chat template brought tokens."""
    from safetensors import safe_open

    rows = base.get_input_embeddings().weight.shape[0]
    wanted = rows
    for path in result.glob("adapter_*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                if name.endswith(("embed_tokens.token_adapter.base_layer.weight", "lm_head.modules_to_save.weight")):
                    wanted = tensors.get_slice(name).get_shape()[0]
    if wanted != rows:
        base.resize_token_embeddings(wanted, mean_resizing=False)


# Pushing: ``output/`` in one commit, as ``trl sft`` does it at its end.
#
# A push may be cut off anywhere and repeated: files that the hub has are not sent again, and without a change there is
# no commit.

PAUSES_S = (2.0, 5.0, 15.0, 60.0)  # after the n-th failure in a row; the last one from then on
TOKEN_REMEDY = "--secret HF_TOKEN, with a token that may write"


def hub(request_s: float = 60.0) -> Any:
    """Returns the hub's client, with a limit for each request. Raises SpotuneError if offline or without a token."""
    import httpx2
    from huggingface_hub import HfApi, constants, get_token, set_client_factory

    if constants.HF_HUB_OFFLINE:
        raise SpotuneError("the hub is offline here (HF_HUB_OFFLINE)")
    if not get_token():
        raise SpotuneError(f"no token for the hub ({TOKEN_REMEDY})")
    set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=request_s))
    return HfApi()


def push(
    job: protocol.ExtraJob,
    output: Path,
    api: Any,
    patience_s: float = 300.0,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, str]:
    """Pushes ``output`` and returns the facts. Retries up to a deadline. Raises SpotuneError if no push succeeds."""
    import httpx2

    deadline = time.monotonic() + patience_s
    pauses = itertools.chain(PAUSES_S, itertools.repeat(PAUSES_S[-1]))
    while True:
        try:
            return _push_once(job, output, api)
        except (OSError, RuntimeError, httpx2.HTTPError) as error:
            responses = (getattr(link, "response", None) for link in chain(error))  # of the error or of its causes
            status = next((int(response.status_code) for response in responses if response is not None), None)
            if status in (401, 403):
                raise SpotuneError(f"the hub refuses it, HTTP {status} ({TOKEN_REMEDY})") from error
            if status is not None and 400 <= status < 500 and status not in (408, 409, 412, 429):
                raise
            # The client says of a file's upload only that it failed; the cause is behind that.
            cause = error.__cause__ if isinstance(error, RuntimeError) else None
            reason, pause_s = one_line(cause or error), next(pauses)
            if time.monotonic() + pause_s > deadline:
                raise SpotuneError(f"the hub does not take it: {reason}") from error
            print(f"[spotune] the hub, tried again in {pause_s:.0f} s: {reason}", file=sys.stderr, flush=True)
            sleep(pause_s)


def _push_once(job: protocol.ExtraJob, output: Path, api: Any) -> dict[str, str]:
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
    """Returns ``hub_model_id``, else the name of ``output_dir`` as Trainer does, else the run's name."""
    named = str(config.get("hub_model_id") or "")
    folder = Path(str(config.get("output_dir") or "")).name
    return named or (folder if HUB_NAME.fullmatch(folder) else run_id)


def write_card(trainer: Any, output: Path, config: Mapping[str, Any], run_id: str) -> None:
    """Writes TRL's model card. PEFT's card names a local base model by its path, which the hub refuses."""
    trainer.hub_model_id = repo_name(config, run_id)
    dataset = str(config.get("dataset_name") or "")
    is_on_hub = HUB_NAME.fullmatch(dataset) and not Path(dataset).exists()
    trainer.create_model_card(trainer.hub_model_id.split("/")[-1], dataset if is_on_hub else None)
    Path(trainer.args.output_dir, "README.md").replace(output / "README.md")


def doubts() -> list[str]:
    """Returns a line for what will prevent the push, known before training."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return ["push_to_hub: the hub is offline here (HF_HUB_OFFLINE); the push will stay pending"]
    return [] if get_token() else [f"push_to_hub: there is no token ({TOKEN_REMEDY}); the push will stay pending"]


def rebuild_wandb(folder: Path) -> None:
    """Logs every surviving line once, in order, under Trainer's names (``train/loss``, ``eval/loss``)."""
    import wandb

    spec = json.loads((folder / "run.json").read_bytes())
    run = wandb.init(
        id=spec["run_id"],
        name=spec["run_id"],
        config=spec["config"],
        dir=str(folder),
        mode="offline",
        settings=wandb.Settings(silent=True, x_disable_stats=True, x_disable_meta=True),
    )
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    for line in spec["logs"]:
        step, _ = line.pop("step"), line.pop("t", None)
        named: dict[str, Any] = {"train/global_step": step}
        for name, value in line.items():
            tracked = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
            named[tracked] = float(value) if value in protocol.NOT_FINITE else value
        run.log(named)
    run.finish()


def main(argv: list[str]) -> None:
    """Does the extra and ends the process; returns only from ``wandb``, which leaves no answer."""
    protect_output()
    name, folder = argv[1], Path(argv[2]).absolute()
    if name == "wandb":
        rebuild_wandb(folder)
        return
    die_with_parent(os.environ)
    answer = run(name, folder)
    protocol.write_json(protocol.answer_path(folder, name), answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if answer.done else 1)


def run(name: str, folder: Path) -> protocol.ExtraResult:
    output = folder / protocol.OUTPUT
    try:
        job = protocol.ExtraJob(**protocol.read_json(folder / protocol.EXTRAS))
        if name == protocol.MERGE:
            facts = merge(job.config, output, folder / protocol.MERGED)
        else:
            facts = push(job, output, hub())
        return protocol.ExtraResult(True, facts=facts)
    except SpotuneError as error:
        return protocol.ExtraResult(False, str(error))
    except BaseException as error:  # the outermost frame: the guard must learn of any fault
        traceback.print_exception(error)
        return protocol.ExtraResult(False, one_line(error))


if __name__ == "__main__":
    main(sys.argv)
