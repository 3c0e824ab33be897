"""The contender without spotune trains on the same rows."""

from pathlib import Path

import pytest
import yaml

from drill.plainrun import plain_config
from spotune.core.errors import InputError
from tests import tiny


def test_plain_gets_the_rows_of_data(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(12))
    config = {
        "model_name_or_path": "m",
        "data": [{"source": str(tmp_path / "rows.jsonl"), "format": "messages"}],
        "use_cpu": True,
        "bf16": False,
        "profiles": {"dev": {"max_steps": 5}},
    }
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    found = plain_config(str(tmp_path / "x.yaml"), "dev", ("learning_rate=0.1",), tmp_path / "plain")
    assert found == {
        "model_name_or_path": "m", "use_cpu": True, "bf16": False, "max_steps": 5, "learning_rate": 0.1,
        "dataset_name": str(tmp_path / "plain" / "rows"),
    }  # fmt: skip
    assert len((tmp_path / "plain" / "rows" / "train.jsonl").read_text().splitlines()) == 12
    (tmp_path / "y.yaml").write_text(yaml.safe_dump({"model_name_or_path": "m", "dataset_name": "d"}))
    with pytest.raises(InputError, match="dataset_streaming"):
        plain_config(str(tmp_path / "y.yaml"), "", ("dataset_streaming=true",), tmp_path)
