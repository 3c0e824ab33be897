"""The fake worker of the golden runs: tiny files, and the events that tests/fake_worker.py does not write."""

from spotune.sft.worker import ignore_signals

if __name__ == "__main__":
    ignore_signals()

import sys
from typing import Any

from tests import fake_worker

SOURCE = {"source": "data.jsonl", "rows": 48, "dropped": 1, "truncated": 2, "empty": 1}


class GoldenRank(fake_worker.FakeRank):
    """Adds what the real worker says of rows, of an evaluation, and of a save that failed."""

    def _write(self, event: str, **fields: Any) -> None:
        if event == "rows":
            fields = {"set": "training", "max_length": 1024, "sources": [SOURCE]}
        super()._write(event, **fields)
        if event == "step" and fields["step"] == 2:
            super()._write("predicted", step=2)
        if event == "step" and fields["step"] == 3:
            super()._write("unsaved", step=3, message="No space left on device")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    fake_worker.BULK_BYTES = 64
    fake_worker.FakeRank = GoldenRank  # type: ignore[misc]
    sys.exit(fake_worker.main(sys.argv[1:]))
