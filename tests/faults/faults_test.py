"""The fault suite, short: every fault once. `make faults` kills at random moments besides."""

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
