"""A program that trains like a run does, without a library: for the harness's own tests. It takes a third of a second.

    python program.py HOME STEPS

It keeps its step in HOME/../bucket, saves on every other step, heeds SIGTERM, can be held, and has a child in a group
of its own, as guards have. What it is told to get wrong is in HOME/../fault. In the stage that LINGER names it stays
until it is told to leave, or another machine has finished the run: a kill that is due there finds it there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from spotune.core.errors import PREEMPTED
from spotune.core.io import failpoint
from spotune.core.protocol import EventLog

STEP_S = 0.02


def main(home: Path, steps: int) -> int:
    bucket = home.parent / "bucket"
    bucket.mkdir(parents=True, exist_ok=True)
    fault = home.parent / "fault"
    told = fault.read_text() if fault.exists() else ""
    told_to_leave: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told_to_leave.append(number))
    if (bucket / "result").exists():
        return 0

    def linger(stage: str) -> None:
        while os.environ.get("LINGER") == stage and not (bucket / "result").exists():
            if told_to_leave and told != "deaf":
                return
            time.sleep(STEP_S)

    log = EventLog(bucket / f"events-{time.time_ns()}.jsonl")
    log.phase("load")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
    failpoint("claimed")
    linger("start")
    time.sleep(5 * STEP_S)
    kept = bucket / "step"
    done = int(kept.read_text()) if kept.exists() else 0
    log.write("plan", max_steps=steps)
    for step in range(done + 1, steps + 1):
        time.sleep(STEP_S)
        log.write("step", step=step)
        linger("train")
        if told_to_leave or step % 2 == 0:
            log.phase("save")
            linger("save")
            time.sleep(STEP_S / 2)
            part = bucket / f"part-{os.getpid()}"
            part.write_text(str(step))
            part.replace(kept)
            failpoint("committed")
            log.write("save", step=step)
        if told_to_leave:
            child.kill()
            child.wait()
            return PREEMPTED
        if told == "crash" and step == steps // 2:
            return 1
        if told == "hang":
            fault.unlink()
            time.sleep(600)
    log.phase("teardown")
    linger("end")
    time.sleep(10 * STEP_S)
    (bucket / "result").write_text(json.dumps({"steps": steps, "wrong": told == "diverge" and done > 0}))
    time.sleep(STEP_S)
    child.kill()
    child.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
