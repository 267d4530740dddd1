import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.training import Schedule
from student.losses.schedules import coefficient_at


def curve(schedule: Schedule, steps: int) -> list[float]:
    return [round(coefficient_at(schedule, step, steps), 6) for step in range(steps)]


def test_a_number_is_constant() -> None:
    assert coefficient_at(0.4, 3, 10) == 0.4


def test_each_kind_has_its_curve() -> None:
    assert curve(Schedule(value=2.0), 3) == [2.0, 2.0, 2.0]
    assert curve(Schedule(value=2.0, kind="constant", warmup=0.5), 4) == [1.0, 2.0, 2.0, 2.0]
    assert curve(Schedule(value=2.0, kind="linear", final=0.5), 4) == [1.75, 1.5, 1.25, 1.0]
    assert curve(Schedule(value=2.0, kind="cosine"), 2) == [1.0, 0.0]
    assert curve(Schedule(value=2.0, kind="wsd", warmup=0.2, decay=0.4), 5) == [2.0, 2.0, 2.0, 1.0, 0.0]


def test_a_final_above_one_increases_the_coefficient() -> None:
    assert curve(Schedule(value=0.5, kind="linear", final=3.0), 4) == [0.75, 1.0, 1.25, 1.5]
    assert curve(Schedule(value=0.5, kind="wsd", decay=0.5, final=2.0), 4) == [0.5, 0.5, 0.75, 1.0]
    assert curve(Schedule(value=0.5, kind="cosine", final=2.0), 2) == [0.75, 1.0]


@given(
    kind=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    steps=st.integers(1, 50),
)
def test_it_rises_during_warmup_then_falls_to_final(
    kind: str, warmup: float, decay: float, final: float, steps: int
) -> None:
    final = 0.0 if kind == "constant" else final
    schedule = Schedule(value=1.0, kind=kind, warmup=warmup, decay=decay, final=final)
    values = [coefficient_at(schedule, step, steps) for step in range(steps)]
    top = round(warmup * steps)
    assert values[:top] == sorted(values[:top])
    assert values[top:] == sorted(values[top:], reverse=True)
    assert all(min(final, 1 / steps) - 1e-9 <= value <= 1.0 + 1e-9 for value in values)
    falls = kind in ("linear", "cosine") or (kind == "wsd" and round(decay * steps) > 0)
    if falls and top < steps:
        assert values[-1] == pytest.approx(final, abs=1e-9)
