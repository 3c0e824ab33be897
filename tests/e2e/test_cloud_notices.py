"""A cloud's own notice, without a signal: the script, a fake worker, and a metadata service on loopback."""

from pathlib import Path

from tests.script import FakeScript, fake_config
from tests.unit.guard.metadata_server import Headers, Reply, serve
from tests.waiting import ended


def test_a_machine_whose_metadata_says_that_it_goes(tmp_path: Path) -> None:
    preempted = False

    def answer(method: str, path: str, headers: Headers) -> Reply:
        return 200, "TRUE" if preempted else "FALSE"

    script = FakeScript(f"file://{tmp_path}/bucket", "spot", fake_config(tmp_path / "material"))
    with serve(answer) as service:
        script.environ["SKYPILOT_CLUSTER_INFO"] = '{"cloud": "GCP", "cluster_name": "spot"}'
        script.environ["GCE_METADATA_HOST"] = f"127.0.0.1:{service.port}"
        first = script.start_and_stop_after(8)
        preempted = True
        script.wait_until_told_to_stop(first)
        script.allow_all()
        assert ended(first) == 75, script.log()
        noticed = script.json(script.keys.progress)
        assert (noticed["phase"], noticed["step"]) == ("preempted", 9)
        assert "0001-00000009" in script.commits
        assert [event["source"] for event in script.events(1, "notice")] == ["gcp instance/preempted"]
        script.allow(9)
        second = script.start()  # the same machine again: it leaves before it has made a step
        assert ended(second) == 75, script.log()
        assert script.json(script.keys.progress)["step"] <= 9
        preempted = False
        script.allow_all()
        assert script.run() == 0, script.log()
    certificate = script.json(script.keys.completed)
    assert certificate["step"] == 24
    # The second start may have left before it claimed an attempt.
    assert certificate["attempt"] in (2, 3)
