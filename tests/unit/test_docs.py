"""Documents and the program never disagree."""

import importlib.util
import re
from pathlib import Path

import pytest

from spotune.cli import VERBS
from spotune.core.config_keys import schema

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def test_the_reference_is_what_help_says() -> None:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "reference" / "cli.md").read_text() == module.reference(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    dead = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not dead


def anchors(page: Path) -> set[str]:
    """The names under which GitHub finds a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^\s*```.*?^\s*```", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_into_pages_name_headings(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", page.read_text())
    assert [anchor for path, anchor in targets if anchor not in anchors(page.parent / path if path else page)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_that_are_shown_exist(page: Path) -> None:
    text = page.read_text()
    verbs = set(re.findall(r"(?m)(?:^\$ |^|`)spotune ([a-z]+)", text)) - {"is"}
    assert verbs <= set(VERBS)
    targets = set(re.findall(r"(?m)(?:^\$ |^|`)make ([a-z-]+)", text))
    known = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert targets <= known


def test_paths_that_the_readme_names_exist() -> None:
    named = re.findall(
        r"`((?:src|config|examples|docs|tasks|tests|benchmarks)/[\w./-]*)`", (ROOT / "README.md").read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_index_has_every_page() -> None:
    listed = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)\)", (DOCS / "README.md").read_text())}
    assert {page for page in DOCS.rglob("*.md") if page.name != "README.md"} <= listed


def test_keys_that_configs_show_are_known() -> None:
    page = (DOCS / "reference" / "config.md").read_text()
    keys = {key for block in re.findall(r"```yaml\n(.*?)```", page, re.S) for key in re.findall(r"(?m)^(\w+):", block)}
    assert keys <= set(schema()["properties"])
