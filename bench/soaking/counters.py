"""The counters of /metrics after a run, beside what the clients saw."""

import asyncio
import time
from collections import Counter

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from soaking.figures import Figure

SETTLED_WITHIN = 60.0  # seconds until requests whose clients left are gone
Metrics = dict[str, float]  # by name, with its labels' values behind


async def settled(session: aiohttp.ClientSession) -> Metrics:
    """The metrics once nothing runs or waits any more, or when that takes too long."""
    began = time.monotonic()
    while True:
        metrics = await read(session)
        idle = not metrics["dilaserve_requests_running"] and not metrics["dilaserve_requests_waiting"]
        if idle or time.monotonic() - began > SETTLED_WITHIN:
            return metrics
        await asyncio.sleep(0.5)


async def read(session: aiohttp.ClientSession) -> Metrics:
    async with session.get("/metrics") as response:
        families = text_string_to_metric_families(await response.text())
        return {" ".join([one.name, *one.labels.values()]): one.value for family in families for one in family.samples}


def added_up(metrics: Metrics, seen: Counter[str], killed: int) -> list[Figure]:
    """Each figure is one sum that must hold. `seen`: fates of requests with a deadline, as their clients were told."""
    told = {fate: round(metrics[f"dilaserve_deadlines_total {fate}"]) for fate in ("met", "missed", "declined")}
    ended_early = seen["declined"] + seen["given up"]
    rows = ("steps and rows of steps", metrics["dilaserve_steps_total"], metrics["dilaserve_step_rows_total"])
    seconds = (
        "seconds wasted and spent",
        metrics["dilaserve_wasted_seconds_total"],
        metrics["dilaserve_device_seconds_total"],
    )
    lost = ("workers lost and kills", metrics["dilaserve_workers_lost_total"], killed)
    return [
        equal("requests running", metrics["dilaserve_requests_running"], 0),
        equal("requests waiting", metrics["dilaserve_requests_waiting"], 0),
        equal("deadlines met", told["met"], seen["met"]),
        equal(
            "deadlines missed, declined or given up", told["missed"] + told["declined"], seen["missed"] + ended_early
        ),
        equal("deadlines, all fates", sum(told.values()), seen.total()),
        *(
            Figure(what, f"{less:g}, {more:g}", "the first at most the second", less <= more)
            for what, less, more in (rows, seconds, lost)
        ),
    ]


def equal(what: str, counted: float, right: float) -> Figure:
    return Figure(f"counted {what}", f"{counted:g}", f"{right:g}, as clients saw", counted == right)
