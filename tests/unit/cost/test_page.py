"""The page: well-formed, alone, escaped, with a text for every picture; and the table fits a terminal."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from spotune.core.errors import InputError
from spotune.core.money import duration, percent, usd
from spotune.cost.export import as_csv, attempt_rows, run_row
from spotune.cost.machines import RunData
from spotune.cost.page import check_target, page_of, write_page
from spotune.cost.report import build_report
from spotune.cost.tables import WIDTH, run_text, runs_text
from tests.unit.cost.cases import T, row, run, three_attempts

EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'"


@pytest.fixture
def report() -> dict[str, Any]:
    return build_report(three_attempts(), "SUCCEEDED", T + 1000)


def parse(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def test_the_page_is_well_formed_and_refers_to_nothing_outside(report: dict[str, Any]) -> None:
    page = page_of(report)
    root = parse(page)
    assert root.tag == "html"
    assert root.get("lang") == "en"
    tags = {element.tag for element in root.iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not re.search(r"https?:|//[a-z]|@import|src=|href=", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))


def test_every_picture_has_a_text(report: dict[str, Any]) -> None:
    root = parse(page_of(report))
    ids = {element.get("id"): element for element in root.iter() if element.get("id")}
    pictures = [element for element in root.iter("svg") if element.get("role") == "img"]
    assert len(pictures) == 1 + 3 + 2  # phases, an attempt each, loss, cost
    for picture in pictures:
        texts = [ids[name].text for name in str(picture.get("aria-labelledby")).split()]
        assert all(texts)
    inner = {id(child) for picture in pictures for child in picture.iter("svg")}
    others = [element for element in root.iter("svg") if id(element) not in inner]
    assert all(element.get("aria-hidden") == "true" for element in others)
    loss = " ".join(str(ids["loss-d"].text).split())
    assert loss == (
        "Loss over steps: from 3.000 at step 1 to 1.700 at step 6; attempt 2 goes on from step 2; "
        "attempt 3 goes on from step 2, 2 steps again"
    )


def test_the_headline(report: dict[str, Any]) -> None:
    values = [e.text for e in parse(page_of(report)).iter("span") if "value" in str(e.get("class"))]
    assert values == ["$0.0070", "$0.0016", "26 %", "6", "$11.67"]


def test_what_a_user_typed_is_escaped() -> None:
    evil = run(user=EVIL, team=EVIL, config_path=EVIL, prices=[{**one, "source": EVIL} for one in run().prices])
    run_data = replace(three_attempts(), run=evil, intervals=[row(10, 30, zone=EVIL, instance_type=EVIL)])
    page = page_of(build_report(run_data, "FAILED", T + 1000))
    assert "<script" not in page
    assert "<img" not in page
    assert parse(page) is not None
    assert "&lt;script&gt;" in page


def test_the_money_comes_first(report: dict[str, Any]) -> None:
    """On a phone the last columns are beyond the edge of the screen."""
    heads = [[str(cell.text) for cell in head.iter("th")] for head in parse(page_of(report)).iter("thead")]
    assert [titles[:3] for titles in heads[1:]] == [["Attempt", "Cost", "Paid"]] * 2


def test_a_phase_of_no_time_has_no_row(report: dict[str, Any]) -> None:
    report["phases"]["setup_s"] = 0.04
    names = [cell.text for cell in parse(page_of(report)).iter("th") if cell.get("scope") == "row"]
    assert " setup" not in names
    assert "setup" not in run_text(report)


def test_a_refused_start_is_not_reported_as_a_vanished_machine() -> None:
    refused = RunData(run=run(), intervals=[row(10, 30, end_reason="failed", exit_code=2)])
    text = run_text(build_report(refused, "FAILED", T + 1000))
    assert "are unknown: a start that is refused leaves no events; the log says why." in text
    assert "vanishes" not in text
    gone = RunData(run=run(), intervals=[row(10, 30, end_reason="preempted")])
    assert "a machine that vanishes takes its last events" in run_text(build_report(gone, "FAILED", T + 1000))


def test_the_same_report_gives_the_same_page(report: dict[str, Any]) -> None:
    assert page_of(report) == page_of(report)


def test_the_page_before_there_is_a_machine() -> None:
    page = page_of(build_report(replace(three_attempts(), intervals=[], attempts=[], events={}), "PENDING", T + 5))
    assert "Nothing was paid so far" in page
    assert parse(page) is not None


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = check_target(str(tmp_path / "cost.html"))
    write_page(target, "old")
    write_page(target, "new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["cost.html"]
    with pytest.raises(InputError, match="--html: .* cannot be written"):
        write_page(tmp_path / ("x" * 300), "page")
    assert [path.name for path in tmp_path.iterdir()] == ["cost.html"]


def test_an_impossible_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        check_target(str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        check_target(str(tmp_path / "none" / "cost.html"))


def test_the_table(report: dict[str, Any]) -> None:
    text = run_text(report)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.splitlines()[:5] == [
        "orders-k3x9  SUCCEEDED  config/runs/orders.yaml  ana (research)",
        "cost $0.0070, $0.0016 (19 %) less than on demand ($0.0086)",
        "goodput 26 % of 1m 10s paid; waited 25 s for machines, unpaid",
        "6 steps, 2 of them done again, 600 tokens ($11.67 a million)",
        "2 lost machines cost $0.0022 (31 %): restart 14 s, done again 8.0 s",
    ]
    assert re.search(r"^training +18 s +26 % +█", text, re.MULTILINE)
    assert "4.0 s are unknown" in text


def test_many_runs_are_one_line_each_and_a_sum(report: dict[str, Any]) -> None:
    lines = runs_text([run_row(report), {**run_row(report), "cost_usd": None}]).splitlines()
    assert len(lines) == 4
    assert lines[-1].split()[:3] == ["2", "runs", "6"]
    assert max(map(len, lines)) <= WIDTH


def test_csv(report: dict[str, Any]) -> None:
    lines = as_csv(attempt_rows(report)).splitlines()
    assert lines[0].startswith("run_id,attempt,infra,")
    assert lines[0].endswith("teardown_s,unknown_s")
    assert len(lines) == 4
    assert as_csv([]) == ""
    assert as_csv([{"user": "=1+1", "usd": -1.0}]).splitlines()[1] == "'=1+1,-1.0"


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0.0, "$0.00"), (0.00042, "$0.00042"), (0.007, "$0.0070"), (0.5, "$0.50"), (1234.5, "$1,234.50"),
        (-2.0, "−$2.00"), (None, "–"), (1e-9, "$0.00"),
    ],
)  # fmt: skip
def test_dollars(amount: float | None, text: str) -> None:
    assert usd(amount) == text


def test_durations_and_shares() -> None:
    times = [0.04, 9.96, 59.4, 59.7, 3599.6, 86400 * 3 + 3600]
    assert [duration(one) for one in times] == ["0.0 s", "10 s", "59 s", "1m", "1h", "3d 1h"]
    assert [percent(one) for one in (0.0, 0.004, 0.5, None)] == ["0 %", "0.4 %", "50 %", "–"]
