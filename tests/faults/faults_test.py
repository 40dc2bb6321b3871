"""The fault suite, short: every fault and attack once, and some random kills; `make faults` is the long version."""

import catalogue
import chance
import helpers
import pytest
import trials
from attacks import ATTACKS
from suite import Suite, table

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Without data workers but where one dies: each process would start another."""
    return Suite(tmp_path_factory.mktemp("faults"), workers=0)


# One of each kind: a rank that dies, a save cut off, one that fails, a batch left out. Damage: tests/survive_test.py.
_QUICK = ("kill_one", "killed_in_commit", "disk_full_of_one", "nan")


@pytest.mark.parametrize("name", helpers.long_but(_QUICK, catalogue.FAULTS))
def test_a_fault_loses_nothing(name: str, suite: Suite) -> None:
    outcome = catalogue.FAULTS[name](suite)
    assert outcome.as_expected, table([outcome])


@pytest.mark.long
def test_twenty_random_kills_lose_nothing(suite: Suite) -> None:
    fell, outcome = chance.random_kills(suite, 20)
    assert outcome.as_expected, table([outcome])
    assert len(set(fell)) > 3  # not always in the same place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> trials.Place:
    return trials.Place(tmp_path_factory.mktemp("attacks") / "place", trials=1)


@pytest.mark.parametrize("name", helpers.long_but(("folder_taken",), ATTACKS))
def test_an_attack_is_answered_in_one_line_or_by_the_same_result(name: str, place: trials.Place) -> None:
    try:
        tally = ATTACKS[name](place)
    except PermissionError as error:
        pytest.skip(str(error))
    assert tally.tried
    assert not tally.bad, "\n\n".join(tally.bad)
