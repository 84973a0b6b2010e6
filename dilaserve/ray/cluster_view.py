"""What all nodes report, as one report: metrics with a label of the node, statistics, and plans."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from dilaserve.types import Quote

Json = dict[str, Any]
NODE = "node"  # the label
SUMS = ("arrivals", "answered", "met", "late", "declined", "tokens", "running", "waiting")  # of a second's history
WORST = ("p50", "p90", "p99", "budget_used", "accuracy_drop")  # the highest of all nodes
LOWEST = ("threshold", "lowest_threshold")


def metrics(reports: Iterable[tuple[str, bytes]]) -> bytes:
    """One exposition of all, each sample labelled with its node."""
    families: dict[str, Metric] = {}
    for node, text in reports:
        for family in text_string_to_metric_families(text.decode()):
            if not family.samples:
                continue  # the door's own have such names
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [one._replace(labels={NODE: node, **one.labels}) for one in family.samples]
    registry = CollectorRegistry()
    registry.register(Given(families.values()))
    return generate_latest(registry)


class Given(Collector):
    """Metrics as they are."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        yield from self.families


def best(quotes: Sequence[Quote]) -> Quote:
    """Of quotes for one request: that which keeps its deadline with most slack, or else is admitted and ends first.
    Requests are counted over all.
    """

    def rank(quote: Quote) -> tuple[bool, bool, float, float]:
        slack = -math.inf if quote.slack is None else quote.slack
        return bool(quote.met), quote.admitted, slack, -math.inf if quote.finish is None else -quote.finish

    found = max(quotes, key=rank)
    counts = {name: sum(getattr(one, name) for one in quotes) for name in ("running", "waiting")}
    return msgspec.structs.replace(found, **counts)


def plans(reports: Sequence[tuple[str, Json]]) -> Json:
    return {"nodes": dict(sorted(reports))}


def stats(reports: Sequence[tuple[str, Json]]) -> Json:
    """In the shape of one node's: counts are sums, latencies the worst, devices are named with their node."""
    reports = sorted(reports)
    first = reports[0][1]
    return {
        "now": max(one["now"] for _, one in reports),
        "version": first["version"],
        "model": first["model"],
        "requests": requests([one["requests"] for _, one in reports]),
        "budget": budget([one["budget"] for _, one in reports]),
        "plan": plan(reports),
        "history": history([one["history"] for _, one in reports]),
        "timelines": timelines(reports),
        "nodes": {node: one["requests"] for node, one in reports},
    }


def requests(all: Sequence[Json]) -> Json:
    """Counts, and counts by name, summed."""
    found: Json = {}
    for name, value in all[0].items():
        values = [one[name] for one in all]
        found[name] = dict(sum(map(Counter, values), Counter())) if isinstance(value, Mapping) else sum(values)
        if isinstance(value, Mapping):
            found[name] = {key: found[name].get(key, 0) for key in value} | found[name]
    return found


def budget(all: Sequence[Json]) -> Json:
    answers = sum(one["answers"] for one in all)
    mean = sum(one["mean_drop"] * one["answers"] for one in all) / max(1, answers)
    used = [one["used"] for one in all if one["used"] is not None]
    return {**all[0], "mean_drop": round(mean, 6), "used": max(used, default=None), "answers": answers}


def plan(reports: Sequence[tuple[str, Json]]) -> Json:
    """Groups over the devices of all nodes, in the order of the nodes."""
    devices: list[str] = []
    groups: list[list[int]] = []
    changes: list[Json] = []
    for node, report in reports:
        one = report["plan"]
        groups += [[len(devices) + rank for rank in group] for group in one["groups"]]
        devices += [f"{node} {device}" for device in one["devices"]]
        changes += [{**change, "reason": f"{node}: {change['reason']}"} for change in one["history"]]
    every = [report["plan"] for _, report in reports]
    return {
        **every[0],
        "plan": " + ".join(one["plan"] for one in every),
        "wanted": " + ".join(one["wanted"] for one in every),
        "auto": all(one["auto"] for one in every),
        "groups": groups,
        "devices": devices,
        "history": sorted(changes, key=lambda change: -change["at"]),
    }


def history(all: Sequence[Json]) -> Json:
    """Seconds of all nodes side by side, those that ended in the same second together."""
    seconds: dict[int, list[Json]] = {}
    for columns in all:
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            seconds.setdefault(int(row["at"]), []).append(row)
    rows = [second(rows) for _, rows in sorted(seconds.items())]
    return {name: [row[name] for row in rows] for name in all[0]}


def second(rows: Sequence[Json]) -> Json:
    merged: Json = {"at": max(row["at"] for row in rows)}
    for name in rows[0]:
        known = [row[name] for row in rows if row[name] is not None]
        if name in SUMS:
            merged[name] = sum(known)
        elif name in WORST:
            merged[name] = max(known, default=None)
        elif name in LOWEST:
            merged[name] = min(known, default=None)
    return merged


def timelines(reports: Sequence[tuple[str, Json]]) -> list[Json]:
    """Of all requests, with ranks counted over the devices of all nodes."""
    found: list[Json] = []
    devices = 0
    for _, report in reports:
        found += [one | {"ranks": [devices + rank for rank in one["ranks"]]} for one in report["timelines"]]
        devices += len(report["plan"]["devices"])
    return found
