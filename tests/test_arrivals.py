"""What the scheduler tells the planner of arrivals: flows of like requests, and outcomes under a plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.planner.planner import CLASSES, few
from dilaserve.scheduler.arrivals import WINDOW, Seen, Traffic
from dilaserve.types import Flow


def test_outcomes_count_for_the_plan_under_which_the_request_came_and_ended():
    traffic = Traffic()
    traffic.changed(10.0)
    traffic.ended(arrived_at=9.0, met=True, now=11.0)
    traffic.ended(arrived_at=11.0, met=True, now=12.0)
    assert traffic.outcome(12.0) == (0, 0)
    traffic.ended(arrived_at=12.0, met=False, now=14.0)
    assert traffic.outcome(10.0 + WINDOW) == (1, 2)
    assert traffic.outcome(18.0) == (0, 1)


def test_flows_are_the_means_of_alike_arrivals():
    traffic = Traffic()
    for canvas, answer, tightness in ((456, 200, 2.0), (460, 240, 2.1), (456, 200, None), (900, 200, 2.0)):
        traffic.arrived(Seen(0.0, canvas, answer, tightness))
    found = [(flow.canvas_tokens, flow.answer_tokens, flow.tightness, flow.rate) for flow in traffic.flows(1.0)]
    assert found == [(456, 200, None, 1.0), (458, 220, pytest.approx(2.05), 2.0), (900, 200, 2.0, 1.0)]


FLOWS = st.builds(
    Flow,
    canvas_tokens=st.integers(64, 4000),
    answer_tokens=st.integers(1, 64),
    tightness=st.sampled_from([None, 0.5, 1.0, 3.0]),
    rate=st.floats(0.0, 20.0),
)


@given(st.lists(FLOWS, max_size=12))
def test_classes_are_few_and_carry_all_the_traffic(flows):
    found = few(flows)
    assert len(found) <= CLASSES
    assert sum(flow.rate for flow in found) == pytest.approx(sum(flow.rate for flow in flows))
