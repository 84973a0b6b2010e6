"""What routing amounts to: the share of each node, and what decisions cost; as text and as a file."""

from collections.abc import Sequence

import msgspec

from dilaserve.sim.layout import Layout
from dilaserve.sim.nodes import REPORT_EVERY, RoutingCosts
from dilaserve.sim.run import Outcome


class NodeShare(msgspec.Struct, frozen=True, kw_only=True):
    """One node: the requests that it was sent after the warm-up, and the share of their deadlines that were met."""

    node: int
    devices: int
    requests: int
    attainment: float | None


class RoutingReport(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds are those of the machine that simulates, but `delay` (virtual, one way) and `report_every` (virtual).

    `decisions_per_second`: of virtual time, as requests arrive, so what a real router would have to decide.
    `seconds_per_quote` is None where no node was asked for one.
    """

    rule: str
    delay: float
    report_every: float
    decisions_per_second: float
    seconds_per_decision: float
    quotes_per_second: float
    seconds_per_quote: float | None
    nodes: tuple[NodeShare, ...]


def routing_report(
    outcomes: Sequence[Outcome], costs: RoutingCosts, nodes: Layout, seconds: float, warm_up: float
) -> RoutingReport:
    """Of `seconds` of arrivals, of which the first `warm_up` are left out of what nodes did."""
    mine: list[list[Outcome]] = [[] for _ in nodes.devices]
    for outcome in outcomes:
        if outcome.at >= warm_up:
            mine[outcome.node].append(outcome)
    return RoutingReport(
        rule=nodes.rule,
        delay=nodes.delay,
        report_every=REPORT_EVERY,
        decisions_per_second=costs.decisions / seconds,
        seconds_per_decision=costs.deciding / max(1, costs.decisions),
        quotes_per_second=costs.quotes / seconds,
        seconds_per_quote=costs.quoting / costs.quotes if costs.quotes else None,
        nodes=tuple(share(node, nodes.devices[node], part) for node, part in enumerate(mine)),
    )


def share(node: int, devices: int, outcomes: Sequence[Outcome]) -> NodeShare:
    timed = [bool(outcome.met) for outcome in outcomes if outcome.scale is not None]
    met = sum(timed) / len(timed) if timed else None
    return NodeShare(node=node, devices=devices, requests=len(outcomes), attainment=met)


def lines(report: RoutingReport) -> list[str]:
    counts = [node.requests for node in report.nodes]
    met = [100 * node.attainment for node in report.nodes if node.attainment is not None]
    deadlines = f", {min(met):.1f} to {max(met):.1f} % of their deadlines met" if met else ""
    decision, rate = report.seconds_per_decision, report.decisions_per_second
    found = [
        f"{len(counts)} nodes by {report.rule}, {1000 * report.delay:g} ms away: {min(counts)} to {max(counts)} "
        f"requests each{deadlines}",
        f"router: {rate:.1f} decisions a second, {1e6 * decision:.1f} µs each here: {100 * rate * decision:.2f} % of "
        "one core",
    ]
    if report.seconds_per_quote is not None:
        quotes = f"quotes: {report.quotes_per_second:.1f} a second, {1e6 * report.seconds_per_quote:.0f} µs each"
        found.append(f"{quotes} on their nodes")
    return found
