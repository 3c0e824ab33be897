"""What tokenizing took away, in the report: from the newest attempt, whatever shape somebody's records have."""

from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

from spotune.cost.index import data_rows
from spotune.cost.page import page_of
from spotune.cost.report import build_report
from spotune.cost.tables import WIDTH, run_text
from tests.unit.cost.cases import T, event, three_attempts


def counts(source: str, *numbers: Any) -> dict[str, Any]:
    return {"source": source, **dict(zip(("rows", "dropped", "truncated", "empty"), numbers, strict=True))}


def counted(at: float, name: str, *sources: Any) -> dict[str, Any]:
    return event(at, "rows", set=name, max_length=64, sources=list(sources))


def test_the_newest_attempt_counts_for_each_set() -> None:
    first = [counted(1, "training", counts("a.jsonl", 9, 9, 0, 0)), counted(2, "evaluation", counts("b", 4, 0, 1, 0))]
    second = [counted(3, "training", counts("a.jsonl", 8, 4, 2, 1), counts("b", 3, 0, 0, 0))]
    assert data_rows({2: second, 1: first, 3: []}) == [
        {"source": "a.jsonl", "set": "training", "rows": 8, "dropped": 4, "truncated": 2, "empty": 1},
        {"source": "b", "set": "training", "rows": 3, "dropped": 0, "truncated": 0, "empty": 0},
        {"source": "b", "set": "evaluation", "rows": 4, "dropped": 0, "truncated": 1, "empty": 0},
    ]
    assert data_rows({}) == []


def test_damaged_counts_are_ignored() -> None:
    odd = [
        event(1, "rows"),
        event(1, "rows", set="training", sources="a"),
        event(1, "rows", set=[1], sources=[]),
        counted(2, "training", 3, {"source": 4}, {"source": "a", "rows": "many", "dropped": -1, "truncated": 1e300}),
    ]
    assert data_rows({1: odd}) == [
        {"source": "a", "set": "training", "rows": None, "dropped": None, "truncated": None, "empty": None}
    ]


def test_text_and_page_show_it() -> None:
    found = three_attempts()
    longest = "s3://acme-data/support/2026/conversations-with-everybody.jsonl.gz"
    marks = [
        counted(67, "training", counts(longest, 1_234_567, 1000, 2000, 3), counts("</th>\n", None, None, None, None)),
        counted(67, "evaluation", counts(longest, 100, 0, 0, 0)),
    ]
    events = {**found.events, 3: [*found.events[3], *marks]}
    report = build_report(replace(found, events=events), "SUCCEEDED", T + 1000)
    assert len(report["data_rows"]) == 3
    text = run_text(report)
    assert max(map(len, text.splitlines())) <= WIDTH
    (line,) = (line for line in text.splitlines() if "1,234,567" in line)
    assert line.split()[1:] == ["1,234,567", "1,000", "2,000", "3", "training"]
    assert "training, streamed" in text
    page = page_of(report)
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert "What became of the rows" in [heading.text for heading in root.iter("h2")]
    assert longest in [cell.text for cell in root.iter("th")]
    assert report["phases"] == build_report(found, "SUCCEEDED", T + 1000)["phases"]


def test_a_run_whose_machine_did_not_count_has_no_table() -> None:
    report = build_report(three_attempts(), "SUCCEEDED", T + 1000)
    assert report["data_rows"] == []
    assert "DROPPED" not in run_text(report)
    assert "What became of the rows" not in page_of(report)
