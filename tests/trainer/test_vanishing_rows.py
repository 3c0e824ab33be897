"""Rows that vanish are counted and reported; where none is left, or the model has no embedding, one line says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spotune.core.protocol import Outcome
from tests import tiny
from tests.ranks import Nursery, events, log_text, make_folder, weights

Run = Callable[..., tuple[Outcome, Path]]
LONG = {"prompt": "red " * 100, "completion": " dog"}
FITS = {"prompt": "red", "completion": " dog"}
CUT = {"prompt": "red", "completion": " dog" * 100}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vanishing")
    tiny.make_model(folder / "model", layers=1)
    tiny.write_jsonl(folder / "a.jsonl", [LONG, FITS] * 4)
    tiny.write_jsonl(folder / "b.jsonl", [CUT, FITS])
    tiny.write_jsonl(folder / "long.jsonl", [LONG] * 8)
    tiny.write_jsonl(folder / "stream" / "train.jsonl", [LONG] * 8)
    tiny.write_jsonl(folder / "half" / "train.jsonl", [FITS] * 8)
    tiny.write_jsonl(folder / "half" / "test.jsonl", [LONG] * 8)
    tiny.write_jsonl(folder / "chat.jsonl", tiny.rows(4))
    tools = tiny.rows(6)
    tools[3]["messages"].insert(1, {"role": "tool", "content": "x"})
    tiny.write_jsonl(folder / "tools.jsonl", tools)
    tiny.write_jsonl(folder / "tools" / "train.jsonl", tools)
    tiny.write_jsonl(folder / "nulls" / "train.jsonl", [{"text": "a"}, {"text": None}])
    tiny.write_jsonl(folder / "tokens" / "train.jsonl", [{"input_ids": [5, 6]}, {"input_ids": [5, 9999]}])
    (folder / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    (folder / "adding.jinja").write_text("{% for m in messages %}{{ m.content + 3 }}{% endfor %}")
    mute = "{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}"
    (folder / "mute.jinja").write_text(mute)
    return folder


@pytest.fixture
def run(ranks: Nursery, home: Path, tmp_path: Path) -> Run:
    def made(name: str = "job", **changes: Any) -> tuple[Outcome, Path]:
        base = {
            "model_name_or_path": str(home / "model"),
            "max_steps": 1,
            "bf16": False,
            "max_length": 64,
            "per_device_train_batch_size": 2,
            "report_to": "none",
        }
        config = json.loads(json.dumps(base | changes).replace("HOME", str(home)))
        folder = make_folder(tmp_path / name, config)
        (found,) = ranks.run(folder)
        return Outcome(**found), folder

    return made


def counts(folder: Path, name: str) -> list[tuple[Any, ...]]:
    (event,) = (event for event in events(folder, "rows") if event["set"] == name)
    return [
        (Path(one["source"]).name, one["rows"], one["dropped"], one["truncated"], one["empty"])
        for one in event["sources"]
    ]


def said(folder: Path, home: Path) -> list[str]:
    lines = log_text(folder).replace(f"{home}/", "").splitlines()
    return [line for line in lines if line.startswith("[spotune]")]


def test_each_source_is_counted_and_said(run: Run, home: Path) -> None:
    sources = [{"source": "HOME/a.jsonl"}, {"source": "HOME/b.jsonl"}]
    outcome, folder = run(data=sources)
    assert outcome.how == "completed", outcome
    assert counts(folder, "training") == [("a.jsonl", 8, 4, 0, 0), ("b.jsonl", 2, 0, 1, 0)]
    assert said(folder, home) == [
        "[spotune] a.jsonl: 8 rows, 4 dropped (the answer does not fit max_length 64)",
        "[spotune] b.jsonl: 2 rows, 1 truncated",
    ]


def test_nothing_is_said_of_whole_rows(run: Run, home: Path) -> None:
    outcome, folder = run(data=[{"source": "HOME/chat.jsonl"}])
    assert outcome.how == "completed", outcome
    assert counts(folder, "training") == [("chat.jsonl", 4, 0, 0, 0)]
    assert said(folder, home) == []


def test_held_out_rows_are_counted_too(run: Run, home: Path) -> None:
    data = [{"source": "HOME/a.jsonl", "split": 3}]
    outcome, folder = run(data=data, eval_strategy="steps", eval_steps=1)
    assert outcome.how == "completed", outcome
    ((_, rows, kept, *_),), ((_, held_out, lost, *_),) = counts(folder, "training"), counts(folder, "evaluation")
    assert (rows, held_out, kept + lost) == (5, 3, 4)


def test_the_same_source_twice_has_two_names(run: Run, home: Path) -> None:
    outcome, folder = run(data=[{"source": "HOME/a.jsonl"}, {"source": "HOME/a.jsonl", "limit": 1}])
    assert outcome.how == "completed", outcome
    assert counts(folder, "training") == [("a.jsonl (data[0])", 8, 4, 0, 0), ("a.jsonl (data[1])", 1, 1, 0, 0)]


def test_packing_that_splits_loses_nothing(run: Run, home: Path) -> None:
    outcome, folder = run(data=[{"source": "HOME/long.jsonl"}], packing=True, packing_strategy="bfd_split")
    assert outcome.how == "completed", outcome
    assert counts(folder, "training") == [("long.jsonl", 8, 0, 0, 0)]


def test_a_stream_is_said_not_to_be_counted(run: Run, home: Path) -> None:
    outcome, folder = run(dataset_name="HOME/half", dataset_streaming=True)
    assert outcome.how == "completed", outcome
    assert counts(folder, "training") == [("half", None, None, None, None)]
    assert said(folder, home)[0].startswith("[spotune] half is streamed, so that rows")


def test_the_next_attempt_finds_the_tokenized_rows(run: Run, home: Path) -> None:
    def cached() -> set[Path]:
        return set(home.parent.rglob("cache-*.arrow"))  # the ranks' cache is in there

    before = cached()
    first, one = run("first", data=[{"source": "HOME/a.jsonl", "limit": 7}])
    made = cached()
    second, other = run("second", data=[{"source": "HOME/a.jsonl", "limit": 7}])
    assert (first.how, second.how) == ("completed", "completed")
    assert made > before
    assert cached() == made
    assert weights(one) == weights(other)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none fits": (
        {"data": [{"source": "HOME/long.jsonl"}]},
        "config.yaml: max_length: with 64 tokens none of the 8 training rows of HOME/long.jsonl has an answer left"
        " (a greater max_length, or shorter prompts)",
    ),
    "none fits, packed": (
        {"data": [{"source": "HOME/long.jsonl"}], "packing": True},
        "config.yaml: max_length: with 64 tokens none of the 8 training rows of HOME/long.jsonl has an answer left"
        " (a greater max_length, or shorter prompts)",
    ),
    "none to evaluate on": (
        {"dataset_name": "HOME/half", "eval_strategy": "steps", "eval_steps": 1},
        "config.yaml: max_length: with 64 tokens none of the 8 evaluation rows of HOME/half has an answer left"
        " (a greater max_length, or shorter prompts)",
    ),
    "none of a stream": (
        {"dataset_name": "HOME/stream", "dataset_streaming": True},
        "config.yaml: data: not a single step could be made: the rows do not fill a batch, or none is left of a stream"
        " (more rows, or a greater max_length)",
    ),
    "none of a stream to evaluate on": (
        {"dataset_name": "HOME/half", "dataset_streaming": True, "eval_strategy": "steps", "eval_steps": 1},
        "config.yaml: max_length: no row is left to evaluate on: none has an answer within max_length"
        " (a greater max_length, or other rows)",
    ),
    "not a whole batch": (
        {"data": [{"source": "HOME/chat.jsonl"}], "dataloader_drop_last": True, "per_device_train_batch_size": 9},
        "config.yaml: data: not a single step could be made: the rows do not fill a batch, or none is left of a stream"
        " (more rows, or a greater max_length)",
    ),
    "a template that renders nothing": (
        {"data": [{"source": "HOME/chat.jsonl"}], "chat_template_path": "HOME/mute.jinja"},
        "config.yaml: data: none of the 4 training rows of HOME/chat.jsonl has any text once it is tokenized"
        " (look at the rows and at the chat template)",
    ),
    "a template that raises": (
        {"data": [{"source": "HOME/tools.jsonl"}], "chat_template_path": "HOME/strict.jinja"},
        "HOME/tools.jsonl: row 4: the chat template HOME/strict.jinja fails: no tools",
    ),
    "a template that raises, in another process": (
        {"data": [{"source": "HOME/tools.jsonl"}], "chat_template_path": "HOME/strict.jinja", "dataset_num_proc": 2},
        "HOME/tools.jsonl: row 4: the chat template HOME/strict.jinja fails: no tools",
    ),
    "a template that raises, in a stream": (
        {"dataset_name": "HOME/tools", "dataset_streaming": True, "chat_template_path": "HOME/strict.jinja"},
        "HOME/tools: data: the chat template HOME/strict.jinja fails: no tools",
    ),
    "a template that raises, in a stream's own process": (
        {
            "dataset_name": "HOME/tools",
            "dataset_streaming": True,
            "dataloader_num_workers": 1,
            "chat_template_path": "HOME/strict.jinja",
        },
        "HOME/tools: data: the chat template HOME/strict.jinja fails: no tools",
    ),
    "a scheduler's argument": (
        {"data": [{"source": "HOME/chat.jsonl"}], "lr_scheduler_kwargs": {"nope": 1}, "lr_scheduler_type": "cosine"},
        "config.yaml: lr_scheduler_type: get_cosine_schedule_with_warmup() got an unexpected keyword argument 'nope'",
    ),
    "a model's argument": (
        {"data": [{"source": "HOME/chat.jsonl"}], "model_init_kwargs": {"nope": 1}},
        "config.yaml: model_init_kwargs: LlamaForCausalLM.__init__() got an unexpected keyword argument 'nope'",
    ),
    "no steps to add up": (
        {"data": [{"source": "HOME/chat.jsonl"}], "gradient_accumulation_steps": 0},
        "config.yaml: gradient_accumulation_steps: must be at least 1",
    ),
    "a template with a fault": (
        {"data": [{"source": "HOME/chat.jsonl"}], "chat_template_path": "HOME/adding.jinja"},
        "HOME/chat.jsonl: row 1: the chat template HOME/adding.jinja fails:"
        ' can only concatenate str (not "int") to str',
    ),
    "a row of TRL's own data set": ({"dataset_name": "HOME/nulls"}, "HOME/nulls: row 2: text is missing"),
    "a token beyond the model": (
        {"dataset_name": "HOME/tokens"},
        "HOME/tokens: row 2: token 9999 is beyond the model's 342 embeddings"
        " (tokenizer and model do not belong together: take the tokenizer that the model was saved with)",
    ),
    "a token beyond the model, as it is": (
        {"dataset_name": "HOME/tokens", "dataset_kwargs": {"skip_prepare_dataset": True}},
        "HOME/tokens: row 2: token 9999 is beyond the model's 342 embeddings"
        " (tokenizer and model do not belong together: take the tokenizer that the model was saved with)",
    ),
    "a token beyond the model, in a stream": (
        {"dataset_name": "HOME/tokens", "dataset_streaming": True},
        "HOME/tokens: token 9999 is beyond the model's 342 embeddings"
        " (tokenizer and model do not belong together: take the tokenizer that the model was saved with)",
    ),
    "no tracker": (
        {"data": [{"source": "HOME/chat.jsonl"}], "report_to": None},
        "config.yaml: report_to: null does not name a tracker (report_to: none)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused_in_one_line(run: Run, home: Path, name: str) -> None:
    changes, line = REFUSED[name]
    outcome, _ = run(**changes)
    assert (outcome.how, outcome.message) == ("bad_input", line.replace("HOME", str(home)))


def test_positions_that_are_a_table(run: Run, home: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny.make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model, data = str(tmp_path / "gpt2"), [{"source": "HOME/b.jsonl"}]
    outcome, _ = run("long", model_name_or_path=model, data=data)
    expected = f"config.yaml: max_length: row 1 of {home}/b.jsonl has 64 tokens, and the model only 32 positions"
    assert (outcome.how, outcome.message) == ("bad_input", f"{expected} (max_length: 32)")
    outcome, _ = run("short", model_name_or_path=model, data=data, max_length=32)
    assert outcome.how == "completed", outcome


def test_a_pad_token_beyond_the_model(run: Run, home: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(home / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    tokenizer.save_pretrained(tmp_path / "model")
    model, data = str(tmp_path / "model"), [{"source": "HOME/chat.jsonl"}]
    outcome, _ = run("padded", model_name_or_path=model, data=data)
    assert outcome.how == "bad_input", outcome
    assert outcome.message.startswith("config.yaml: pad_token: batches are padded, and token 342 ('<|new|>') is beyond")
    outcome, _ = run("alone", model_name_or_path=model, data=data, per_device_train_batch_size=1)
    assert outcome.how == "completed", outcome


@pytest.mark.parametrize("more", [{}, {"lr_scheduler_type": "reduce_lr_on_plateau"}], ids=["best", "plateau"])
def test_a_metric_that_there_is_not_is_refused(run: Run, more: dict[str, Any]) -> None:
    best = {"metric_for_best_model": "bleu", "load_best_model_at_end": True, "save_steps": 1}
    data = [{"source": "HOME/chat.jsonl", "split": 1}]
    outcome, _ = run(data=data, eval_strategy="steps", eval_steps=1, **best, **more)
    assert outcome.how == "bad_input", outcome
    expected = "config.yaml: metric_for_best_model: 'bleu' is not a metric of this training (one of eval_loss, "
    assert outcome.message.startswith(expected)
