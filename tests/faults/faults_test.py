"""The fault suite, short: every fault once, and some kills at random moments; `make faults` is the long version."""

import catalogue
import chance
import pytest
from suite import Suite, table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Without data workers but where one dies: each process would start another."""
    return Suite(tmp_path_factory.mktemp("faults"), workers=0)


@pytest.mark.parametrize("name", catalogue.FAULTS)
def test_a_fault_loses_nothing(name: str, suite: Suite) -> None:
    outcome = catalogue.FAULTS[name](suite)
    assert outcome.as_expected, table([outcome])


def test_random_kills_lose_nothing(suite: Suite) -> None:
    fell, outcome = chance.random_kills(suite, 8)
    assert outcome.as_expected, table([outcome])
    assert len(set(fell)) > 2  # not always in the same place
