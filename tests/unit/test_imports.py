"""Who may import whom: the table in CONTRIBUTING.md, held over the source and over a running process."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import spotune

SOURCE = Path(spotune.__file__).parent
STDLIB = sys.stdlib_module_names
FSSPEC = {"fsspec", "s3fs", "gcsfs"}
TRAINING = {
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "numpy",
    "huggingface_hub",
    "wandb",
    "httpx2",
    "yaml",
}
# side -> spotune packages it may import, third-party modules it may import
RULES: dict[str, tuple[set[str], set[str]]] = {
    "core": (set(), {"fsspec", "gcsfs", "aiohttp", "yaml"}),
    "guard": ({"core"}, {"fsspec"}),
    "idle": (set(), set()),
    "sft": ({"core"}, TRAINING | {"fsspec", "safetensors", "pyarrow", "bitsandbytes", "tokenizers", "packaging"}),
    "launch": ({"core"}, {"yaml", "psutil"}),
    "cost": ({"core", "launch"}, {"jinja2"}),
    "cli": ({"core", "launch", "cost"}, {"click", "rich"}),
}
EXCEPTIONS = {("sft/__main__.py", "spotune.guard.main")}  # the script's door: the guard enters first
# The one door to SkyPilot, and the errors that its client lets through: nobody else imports them, not even late.
DOOR = "launch/skypilot/client.py"
BEHIND_THE_DOOR = {"sky", "click", "requests"}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield str(node.module), node.lineno


@pytest.mark.parametrize("side", RULES)
def test_each_side_imports_what_it_may(side: str) -> None:
    ours, foreign = RULES[side]
    wrong = []
    for path in sorted([*SOURCE.glob(f"{side}.py"), *(SOURCE / side).rglob("*.py")]):
        name = path.relative_to(SOURCE).as_posix()
        for module, line in imports(path):
            parts = module.split(".")
            if parts[0] == "spotune":
                allowed = len(parts) == 1 or parts[1] in ours | {side} or (name, module) in EXCEPTIONS
            else:
                allowed = parts[0] in STDLIB or parts[0] in foreign or (name == DOOR and parts[0] in BEHIND_THE_DOOR)
            if not allowed:
                wrong.append(f"{name}:{line} imports {module}")
    assert not wrong


def test_sky_is_imported_in_one_module_and_only_when_it_is_called() -> None:
    users = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if "sky" in _packages(path)}
    assert users == {DOOR}
    top = {name.split(".")[0] for node in ast.parse((SOURCE / DOOR).read_text()).body for name, _ in _top(node)}
    assert not top & BEHIND_THE_DOOR


def _packages(path: Path) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(path)}


def test_the_cli_imports_only_click_at_the_top() -> None:
    for path in sorted((SOURCE / "cli").rglob("*.py")):
        tree = ast.parse(path.read_text())
        top = {name.split(".")[0] for node in tree.body for name, _ in _top(node)}
        assert top <= STDLIB | {"click", "spotune"}, path


def _top(node: ast.stmt) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, 0) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield str(node.module), 0


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules), file=sys.__stderr__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    return {name.split(".")[0] for name in done.stderr.splitlines()}


HEAVY = {"sky", "torch", "transformers", "trl", "datasets", "pydantic", "pandas", "numpy", "jinja2"}


@pytest.mark.parametrize(
    "code",
    [
        "import spotune.guard.main",
        "import spotune.launch.local.engine",
        "import spotune.launch.skypilot.engine",
        "from spotune.cli import main\ntry:\n main(['--help'])\nexcept SystemExit: pass",
        "from spotune.cli import main\ntry:\n main(['queue', '-a'])\nexcept SystemExit: pass",
        "from spotune.cli import main\ntry:\n main(['cost'])\nexcept SystemExit: pass",
    ],
)
def test_no_light_process_loads_anything_heavy(code: str) -> None:
    loaded = loaded_by(code)
    assert "spotune" in loaded
    assert not loaded & HEAVY


def test_a_name_means_one_class() -> None:
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(path.relative_to(SOURCE).as_posix())
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_functions_are_short_and_the_files_few() -> None:
    paths = sorted(SOURCE.rglob("*.py"))
    assert len(paths) <= 95
    long = [
        f"{path.relative_to(SOURCE)}:{node.lineno} {node.name}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert not long
