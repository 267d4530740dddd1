from actors.lease import Outcome
from actors.patience import Patience


def test_before_anything_is_measured_the_first_unit_may_take_long():
    assert Patience(tokens_per_unit=100, first_s=77.0).deadline_s() == 77.0


def test_the_deadline_follows_the_slowest_recent_unit():
    patience = Patience(tokens_per_unit=1000, floor_s=1.0, factor=10.0)
    patience.learn(Outcome("u", tokens=100, score_s=0.9, store_s=0.1))
    assert patience.deadline_s() == 1.0 + 10.0 * 0.01 * 1000
    for _ in range(32):
        patience.learn(Outcome("u", tokens=1000, score_s=1.0))
    assert patience.deadline_s() == 1.0 + 10.0 * 1.0


def test_a_warm_up_or_a_probe_sets_a_deadline_before_any_unit_is_done():
    patience = Patience(tokens_per_unit=1000, first_s=600.0, floor_s=1.0, factor=10.0, first_store_s=7.0)
    patience.learn(Outcome("warm-up", tokens=100, score_s=0.1))
    assert patience.deadline_s() == 1.0 + 7.0 + 10.0 * 1.0
    patience.learn(Outcome("u", tokens=1000, score_s=0.5, store_s=0.5))
    assert patience.deadline_s() == 1.0 + 10.0 * 1.0


def test_units_that_were_found_committed_teach_nothing():
    patience = Patience(tokens_per_unit=10, first_s=5.0)
    patience.learn(Outcome("u"))
    assert patience.deadline_s() == 5.0
