"""How the environment is read: as people and scripts leave it there."""

from dataclasses import replace

import pytest

from spotune.core.environment import RunEnvironment, check_bucket, read_grace
from spotune.core.errors import InputError

GIVEN = {
    "SPOTUNE_HOME": "/tmp/home",
    "SPOTUNE_BUCKET": "s3://bucket/place",
    "SPOTUNE_RUN_ID": "a-run",
    "SPOTUNE_CONFIG": "c.yaml",
    "SPOTUNE_PROFILE": "dev",
    "SPOTUNE_SAVE_EVERY": "5m",
    "SPOTUNE_STATUS_FILE": "/tmp/status",
    "SPOTUNE_ATTEMPT": "3",
    "SPOTUNE_BUCKET_PATIENCE": "10m",
    "SPOTUNE_ALLOW_CONFIG_CHANGE": "1",
    "SPOTUNE_GPU_SHARE": "0.5",
    "SPOTUNE_KIND": "dev",
    "SPOTUNE_TEAM": "search",
    "SPOTUNE_USER": "ann",
    "SPOTUNE_GRACE_S": "30",
}


@pytest.mark.parametrize("around", ["{}\n", " {}", "{}\r\n", "\t{} \n\n"])
def test_blanks_around_a_value_are_none_of_it(around: str) -> None:
    spoilt = {name: around.format(value) for name, value in GIVEN.items()}
    assert RunEnvironment.read(spoilt) == RunEnvironment.read(GIVEN)


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("unseen", ["\n", "\x1b[0m", "\u200b", "\u2028"])
def test_a_control_character_inside_is_refused(name: str, unseen: str) -> None:
    value = GIVEN[name]
    with pytest.raises(InputError) as raised:
        RunEnvironment.read({**GIVEN, name: value[:1] + unseen + value[1:] + "x"})
    assert str(raised.value).startswith(f"{name}: ")
    assert "control character" in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_value_of_blanks_is_not_set() -> None:
    assert RunEnvironment.read({**GIVEN, "SPOTUNE_BUCKET": " \n"}).bucket == "file:///tmp/home/bucket"
    found = RunEnvironment.read(GIVEN)
    assert RunEnvironment.read({**GIVEN, "SPOTUNE_TEAM": "\n"}) == replace(found, team="")
    assert read_grace({"SPOTUNE_GRACE_S": "\n"}) is None


def test_a_bucket_of_the_settings_is_read_alike() -> None:
    assert check_bucket("gs://b/x/\n") == "gs://b/x"
    with pytest.raises(InputError, match="control character"):
        check_bucket("gs://b/\nx", "config/spotune.yaml: bucket")
