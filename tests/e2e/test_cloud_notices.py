"""A cloud's own notice, without a signal: real training, and a metadata service on loopback."""

import json
from pathlib import Path

from tests.e2e.test_attempts import Script, material  # noqa: F401 - a fixture
from tests.unit.guard.metadata_server import Headers, Reply, serve


def test_a_machine_whose_metadata_says_that_it_goes(material: Path, tmp_path: Path) -> None:  # noqa: F811
    preempted, steps = False, ("--max_steps", "120")  # some seconds, for a service that is asked every second

    def answer(method: str, path: str, headers: Headers) -> Reply:
        return 200, "TRUE" if preempted else "FALSE"

    script = Script(f"file://{tmp_path}/bucket", "spot", material / "run.yaml")
    with serve(answer) as service:
        script.environ["SKYPILOT_CLUSTER_INFO"] = '{"cloud": "GCP", "cluster_name": "spot"}'
        script.environ["GCE_METADATA_HOST"] = f"127.0.0.1:{service.port}"
        first = script.start(*steps)
        script.wait_for_step(first, 8)
        preempted = True
        assert first.wait(300) == 75, script.log()
        noticed = script.json(script.keys.progress)
        assert noticed["phase"] == "preempted"
        assert noticed["step"] < 120
        assert f"0001-{noticed['step']:08d}" in script.commits
        assert "gcp instance/preempted" in [event["source"] for event in notices(script, 1)]
        assert script.run(*steps) == 75  # the same machine again: it leaves before it has made a step
        assert script.json(script.keys.progress)["step"] <= noticed["step"]
        preempted = False
        assert script.run(*steps) == 0, script.log()
    certificate = script.json(script.keys.completed)
    # The second start may have left before it claimed an attempt.
    assert (certificate["attempt"] in (2, 3), certificate["step"]) == (True, 120)


def notices(script: Script, attempt: int) -> list[dict[str, str]]:
    parts = [key for key in script.store.keys(script.keys.attempts) if f"/{attempt:04d}/events-0-" in key]
    events = [json.loads(line) for key in parts for line in (script.store.read(key) or b"").splitlines()]
    return [event for event in events if event["event"] == "notice"]
