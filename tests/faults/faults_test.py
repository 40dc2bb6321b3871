"""The fault suite, short: every fault once, and twenty kills at random moments. `make faults` is the long version."""

import pytest
import suite as faults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> faults.Suite:
    return faults.Suite(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_fault_loses_nothing(name: str, suite: faults.Suite) -> None:
    outcome = faults.FAULTS[name](suite)
    assert outcome.as_expected, faults.table([outcome])


def test_twenty_kills_at_random_moments_lose_nothing(suite: faults.Suite) -> None:
    fell, outcome, _ = faults.random_kills(suite, 20)
    assert len(fell) == 20
    assert outcome.as_expected
