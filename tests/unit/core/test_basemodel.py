"""The fingerprint of the base model, and the memory of hashes that makes it cheap."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spotune.core import fingerprint
from spotune.core.errors import InputError
from spotune.core.fingerprint import MEMORY, SETTLED_S, WORTHWHILE, hash_files, model_files, model_sha256


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def make_folder(folder: Path) -> Path:
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates/tools.jinja").write_text("t")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "merges.txt"):
        (folder / name).write_text(f"what {name} holds")
    for name in ("README.md", ".hidden.json", "optimizer.pt", "training_args.bin", "trainer_state.json", "plot.png"):
        (folder / name).write_text("not read when a model is loaded")
    return folder


def sha(config: dict[str, Any], cache: Path | None = None) -> str:
    return model_sha256(model_files(config, "run.yaml", cache))


def test_a_git_lfs_pointer_is_no_weights(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(InputError, match=r"model.safetensors: is a Git LFS pointer, .*\(git lfs pull\)"):
        sha({"model_name_or_path": str(model)})


# name: (what is done to the folder, whether the model is another one then)
EDITS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "nothing": (lambda folder: None, False),
    "a weight": (lambda folder: (folder / "model.safetensors").write_text("what model.safetensors HOLDS"), True),
    "a shard more": (lambda folder: (folder / "model-2.safetensors").write_text("x"), True),
    "the config": (lambda folder: (folder / "config.json").write_text("{}"), True),
    "the tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), True),
    "the chat template": (lambda folder: (folder / "chat_template.jinja").write_text("x"), True),
    "one of more templates": (lambda folder: (folder / "additional_chat_templates/tools.jinja").write_text("x"), True),
    "a file's name": (lambda folder: (folder / "merges.txt").rename(folder / "vocab.txt"), True),
    "its times": (lambda folder: os.utime(folder / "model.safetensors", (1, 1)), False),
    "the README": (lambda folder: (folder / "README.md").write_text("better"), False),
    "a hidden file": (lambda folder: (folder / ".cache.json").write_text("x"), False),
    "what training left": (lambda folder: (folder / "optimizer.pt").write_text("x"), False),
}


@pytest.mark.parametrize(("edit", "is_another"), EDITS.values(), ids=EDITS)
def test_a_folder(model: Path, edit: Callable[[Path], object], is_another: bool) -> None:
    config = {"model_name_or_path": str(model)}
    before = sha(config)
    edit(model)
    assert (sha(config) != before) is is_another


def test_the_folders_place_is_not_part_of_it(model: Path, tmp_path: Path) -> None:
    moved = make_folder(tmp_path / "elsewhere")
    assert sha({"model_name_or_path": str(moved)}) == sha({"model_name_or_path": str(model)})


def test_a_hub_id_is_its_name_and_revision() -> None:
    names = [("org/model", None), ("org/model", "v2"), ("org/other", None)]
    found = [sha({"model_name_or_path": name, "model_revision": revision}) for name, revision in names]
    assert len(set(found)) == 3
    assert found[0] == sha({"model_name_or_path": "org/model", "model_revision": "main"})


def test_an_adapter_brings_its_base(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_text("a")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    config = {"model_name_or_path": str(adapter)}
    names = [file["name"] for file in model_files(config, "run.yaml")]
    assert "adapter_model.safetensors" in names
    assert "base/model.safetensors" in names
    before = sha(config)
    (model / "model.safetensors").write_text("other weights")
    assert sha(config) != before
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/m", "revision": "v1"}))
    assert {"name": "hf://org/m", "revision": "v1"} in model_files(config, "run.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *(("not JSON", "cannot be read: not JSON"), ("[" * 100_000, "cannot be read: not JSON")),
        *(("{}", "names no base model"), ("[]", "names no base model")),
        ('{"base_model_name_or_path": null}', "names no base model"),
        (json.dumps({"base_model_name_or_path": "a" * 9000}), "names no base model: a name of 9000 characters"),
    ],
    ids=["no JSON", "brackets without end", "empty", "a list", "none", "too long"],
)
def test_an_adapter_that_names_no_base(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=f"adapter_config.json: {says}") as raised:
        sha({"model_name_or_path": str(tmp_path)})
    assert "\n" not in str(raised.value)


def test_an_adapter_is_neither_waited_for_nor_read_without_end(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    os.mkfifo(path)
    with pytest.raises(InputError, match="adapter_config.json: is a FIFO"):
        sha({"model_name_or_path": str(tmp_path)})
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match="adapter_config.json: is a device"):
        sha({"model_name_or_path": str(tmp_path)})


def test_a_base_of_a_name_longer_than_any_file_is_of_the_hub(tmp_path: Path) -> None:
    name = "a" * 300
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    assert {"name": f"hf://{name}", "revision": "main"} in model_files(
        {"model_name_or_path": str(tmp_path)}, "run.yaml"
    )


def test_a_chat_template_counts_by_its_content(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("one")
    config = {"model_name_or_path": "org/model", "chat_template_path": str(template)}
    before = sha(config)
    template.write_text("two")
    assert sha(config) != before
    other = {**config, "chat_template_path": str(model)}  # another model's: its tokenizer, not its weights
    assert "chat_template/tokenizer.json" in [file["name"] for file in model_files(other, "run.yaml")]
    before = sha(other)
    (model / "model.safetensors").write_text("x")
    assert sha(other) == before
    assert sha({**config, "chat_template_path": "org/chatty"}) != sha({"model_name_or_path": "org/model"})


def test_what_cannot_be_read_is_bad_input(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(fingerprint, "file_facts", refuse)
    with pytest.raises(InputError, match="run.yaml: model_name_or_path: cannot be read: .*Permission denied"):
        sha({"model_name_or_path": str(model)})


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really read."""
    names: list[str] = []
    whole = fingerprint.file_facts

    def noting(path: Path) -> dict[str, Any]:
        names.append(path.name)
        return whole(path)

    monkeypatch.setattr(fingerprint, "file_facts", noting)
    return names


def later() -> float:
    return time.time() + 60


def test_a_large_file_is_read_once(tmp_path: Path, read: list[str]) -> None:
    large, small, cache = tmp_path / "large", tmp_path / "small", tmp_path / "cache"
    large.write_bytes(b"a" * WORTHWHILE)
    small.write_bytes(b"a")
    first = hash_files([large, small], cache, later)
    assert hash_files([large, small], cache, later) == first
    assert read == ["large", "small", "small"]
    large.write_bytes(b"b" * WORTHWHILE)
    assert hash_files([large, small], cache, later)[0]["sha256"] != first[0]["sha256"]
    assert hash_files([large], None, later) == hash_files([large], cache, later)


def test_the_old_time_of_a_file_does_not_hide_that_it_changed(tmp_path: Path) -> None:
    large, cache = tmp_path / "large", tmp_path / "cache"
    large.write_bytes(b"a" * WORTHWHILE)
    first = hash_files([large], cache, later)
    seen = large.stat()
    large.write_bytes(b"b" * WORTHWHILE)
    os.utime(large, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert hash_files([large], cache, later) != first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    large, cache = tmp_path / "large", tmp_path / "cache"
    large.write_bytes(b"a" * WORTHWHILE)
    hash_files([large], cache, lambda: large.stat().st_mtime + SETTLED_S - 0.1)
    assert not (cache / MEMORY).exists()


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"/x": 3}', b"\xff"])
def test_a_damaged_memory_is_no_memory(tmp_path: Path, damage: bytes) -> None:
    large, cache = tmp_path / "large", tmp_path / "cache"
    cache.mkdir()
    large.write_bytes(b"a" * WORTHWHILE)
    (cache / MEMORY).write_bytes(damage)
    found = hash_files([large], cache, later)
    assert found == hash_files([large])
    assert set(json.loads((cache / MEMORY).read_text())) == {str(large)}  # and what is gone is forgotten


def test_a_home_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    (tmp_path / "large").write_bytes(b"a" * WORTHWHILE)
    assert hash_files([tmp_path / "large"], tmp_path / "home" / "cache", later) == hash_files([tmp_path / "large"])
