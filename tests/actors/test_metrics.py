import re

from actors.lease import Outcome
from actors.metrics import CrewMetrics, TeacherMetrics


def test_names_suit_prometheus_and_end_in_a_unit():
    metrics = [*vars(TeacherMetrics("a")).values(), *vars(CrewMetrics("a")).values()]
    names = [metric.info["name"] for metric in metrics]
    assert len(names) == len(set(names)) == 9
    for name in names:
        assert re.fullmatch(r"stillhouse_capture_[a-z_]+", name)
        assert name.endswith(("_total", "_units", "_replicas", "_per_token", "_per_s", "_share"))


def test_a_unit_without_rows_can_be_recorded():
    TeacherMetrics("a").record(Outcome("u"), wait_share=0.0)
