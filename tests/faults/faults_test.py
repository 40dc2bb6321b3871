"""The fault suite, short: every fault once, and twenty kills at random moments; `make faults` is the long version."""

import catalogue
import chance
import pytest
from suite import Suite, table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Suite(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", catalogue.FAULTS)
def test_a_fault_loses_nothing(name: str, suite: Suite) -> None:
    outcome = catalogue.FAULTS[name](suite)
    assert outcome.as_expected, table([outcome])


@pytest.mark.timeout(1200)
def test_twenty_random_kills_lose_nothing(suite: Suite) -> None:
    fell, outcome = chance.random_kills(suite, 20)
    assert outcome.as_expected, table([outcome])
    assert len(set(fell)) > 3  # not always in the same place
