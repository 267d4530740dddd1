from actors.replicas.timeouts import Timeouts
from actors.replicas.work import WorkResult


def test_before_anything_is_measured_the_first_unit_may_take_long():
    assert Timeouts(tokens_per_item=100, first_call_s=77.0).call_s() == 77.0


def test_the_timeout_follows_the_slowest_recent_unit():
    timeouts = Timeouts(tokens_per_item=1000, floor_s=1.0, factor=10.0)
    timeouts.learn(WorkResult("u", tokens=100, engine_s=0.9, store_s=0.1))
    assert timeouts.call_s() == 1.0 + 10.0 * 0.01 * 1000
    for _ in range(32):
        timeouts.learn(WorkResult("u", tokens=1000, engine_s=1.0))
    assert timeouts.call_s() == 1.0 + 10.0 * 1.0


def test_a_warm_up_or_a_part_of_a_unit_sets_a_timeout_before_any_unit_is_done():
    timeouts = Timeouts(tokens_per_item=1000, first_call_s=600.0, floor_s=1.0, factor=10.0, first_store_s=7.0)
    timeouts.learn(WorkResult("warm-up", tokens=100, engine_s=0.1))
    assert timeouts.call_s() == 1.0 + 7.0 + 10.0 * 1.0
    timeouts.learn(WorkResult("u", tokens=1000, engine_s=0.5, store_s=0.5))
    assert timeouts.call_s() == 1.0 + 10.0 * 1.0


def test_units_that_were_committed_already_are_not_measured():
    timeouts = Timeouts(tokens_per_item=10, first_call_s=5.0)
    timeouts.learn(WorkResult("u"))
    assert timeouts.call_s() == 5.0
