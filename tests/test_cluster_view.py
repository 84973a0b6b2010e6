"""Reports of several nodes as one, and how many nodes a backlog asks for."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from dilaserve.ray import cluster_view
from dilaserve.ray.scaling import SLACK, nodes_wanted

TEXT = b"""# HELP dilaserve_steps_total Denoising steps
# TYPE dilaserve_steps_total counter
dilaserve_steps_total{kind="refresh"} %d
# HELP dilaserve_wait_seconds Waits
# TYPE dilaserve_wait_seconds histogram
dilaserve_wait_seconds_bucket{le="1.0"} 1.0
dilaserve_wait_seconds_bucket{le="+Inf"} 2.0
dilaserve_wait_seconds_count 2.0
dilaserve_wait_seconds_sum 3.0
"""


def test_metrics_of_all_nodes_are_one_exposition_with_a_label_of_the_node():
    merged = cluster_view.metrics([("a", TEXT % 3), ("b", TEXT % 4)]).decode()
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    steps = {one.labels["node"]: one.value for one in families["dilaserve_steps"].samples}
    assert steps == {"a": 3.0, "b": 4.0}
    assert families["dilaserve_steps"].type == "counter"
    waits = families["dilaserve_wait_seconds"]
    assert waits.type == "histogram"
    assert len(waits.samples) == 8
    assert merged.count("# HELP dilaserve_steps") == 1


def node(name, running, at, p99):
    history = {"at": [at, at + 1.0], "running": [running, 0], "p99": [p99, None], "threshold": [0.9, None]}
    return name, {
        "now": at + 2.0,
        "version": "1",
        "model": {"name": "m"},
        "requests": {"running": running, "waiting": 1, "fates": {"answered": running, "failed": 0}},
        "budget": {"limit": 0.9, "mean_drop": running / 10, "used": 0.5, "answers": running},
        "plan": {
            "plan": "1x2",
            "wanted": "1x2",
            "auto": True,
            "groups": [[0, 1]],
            "devices": ["cpu", "cpu"],
            "history": [{"at": at, "reason": "the start"}],
        },
        "history": history,
        "timelines": [{"id": name, "ranks": (0, 1)}],
    }


def test_statistics_of_all_nodes_have_the_shape_of_one():
    merged = cluster_view.stats([node("b", 3, 10.25, 2.0), node("a", 1, 10.5, 1.0)])
    assert merged["requests"] == {"running": 4, "waiting": 2, "fates": {"answered": 4, "failed": 0}}
    assert merged["budget"]["mean_drop"] == 0.25
    assert merged["plan"]["groups"] == [[0, 1], [2, 3]]
    assert merged["plan"]["devices"] == ["a cpu", "a cpu", "b cpu", "b cpu"]
    assert [one["ranks"] for one in merged["timelines"]] == [[0, 1], [2, 3]]
    assert merged["history"] == {
        "at": [10.5, 11.5],
        "running": [4, 0],
        "p99": [2.0, None],
        "threshold": [0.9, None],
    }
    assert set(node("a", 1, 0.0, 1.0)[1]) <= set(merged)


BACKLOGS = st.lists(st.floats(0.0, 100.0), min_size=1, max_size=8)


@given(BACKLOGS, st.floats(0.5, 20.0), st.integers(1, 4), st.integers(0, 8))
def test_nodes_follow_the_backlog_within_their_bounds(backlogs, target, least, more):
    present, most, total = len(backlogs), least + more, sum(backlogs)
    wanted = nodes_wanted(backlogs, present, target, least, most)
    assert least <= wanted <= most
    if wanted < most:
        assert total <= wanted * target * (1 + 1e-9)
    if max(least, present) < wanted:  # and no more than that takes
        assert total > (wanted - 1) * target * (1 - 1e-9)
    if least < wanted < min(present, most):
        assert wanted == present - 1
        assert total < SLACK * target * wanted


@given(BACKLOGS, st.floats(0.5, 20.0))
def test_a_node_that_has_gone_is_not_wanted_back_at_once(backlogs, target):
    present = len(backlogs)
    wanted = nodes_wanted(backlogs, present, target, 1, 16)
    if wanted < present:
        assert nodes_wanted([sum(backlogs) / wanted] * wanted, wanted, target, 1, 16) <= wanted
