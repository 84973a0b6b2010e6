"""Runs of the real engine on a simulated machine."""

import functools
import itertools
import random

from dilaserve.config import Config
from dilaserve.engine.engine import Options
from dilaserve.sim import workload
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import classes, pretended, simulate

SECONDS = 20.0


def run(rate=6.0, scale=2.0, devices=2, on_miss="best_effort", seed=0, mix=0.0, **settings):
    """`mix` of the requests have no deadline."""
    profile = llada_8b_h200()
    rng = random.Random(seed)
    times = zip(workload.poisson(rate, rng), itertools.repeat(200), itertools.repeat(128), strict=False)
    jobs = workload.jobs(times, SECONDS, 1024, (None,), ((scale, 1.0 - mix), (None, mix)), seed, on_miss)
    config = Config.of(slo_class=classes([scale]), max_queue=2048, **settings)
    return simulate(config, pretended(profile, devices, 1024, seed=seed), list(profile.quality.tasks), jobs)


known_run = functools.cache(run)  # for tests that only look at what a run has left


async def latency(engine, **wish):
    began = engine.loop.time()
    await engine.generate([0] * 32, Options(max_tokens=128, **wish))
    return engine.loop.time() - began
