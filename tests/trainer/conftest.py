"""What end-to-end tests share: one process that has imported TRL, to fork ranks from."""

from collections.abc import Iterator

import pytest

from tests.ranks import Nursery


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()
