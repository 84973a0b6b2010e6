"""Profiles from data sheets: sizes as published, costs near those measured on an H200, and runs that make sense."""

import math
import random
from functools import cache
from statistics import fmean

import pytest
from data_sheets import RESULTS, SHAPES, measured

from dilaserve import models
from dilaserve.config import Config
from dilaserve.errors import ConfigError
from dilaserve.profile.step_cost import Features
from dilaserve.sim import workload
from dilaserve.sim.data_sheet import pretended_model
from dilaserve.sim.published import FOLDER, NAMES
from dilaserve.sim.run import classes, pretended, simulate
from dilaserve.sim.workload import Job

PUBLISHED = {  # parameters in 1e9, K/V bytes of a token, degrees
    "llada-8b": (8.02, 524_288, (1, 2, 4, 8)),
    "dream-7b": (7.62, 57_344, (1, 2, 4)),
    "sdar-8b": (8.19, 147_456, (1, 2, 4, 8)),
    "llada2-mini": (16.26, 40_960, (1, 2, 4)),
}


@cache
def run(name, rate, shared=0, seconds=6.0, answer=64):
    model = pretended_model(name)
    times = ((at, 300, answer) for at in workload.poisson(rate, random.Random(0)))
    jobs: list[Job] = workload.jobs(times, seconds, 4096, (None,), ((2.0, 1.0),), 0)
    jobs = [job._replace(shared=shared) for job in jobs]
    parts = pretended(model.profile, 1, 4096, traits=model.traits, degrees=model.degrees)
    return simulate(Config.of(slo_class=classes([2.0]), max_queue=2048), parts, ["any"], jobs).outcomes


@pytest.mark.parametrize("name", NAMES)
def test_the_config_fields_give_the_published_sizes(name):
    spec = models.outline(FOLDER / name)
    assert (round(spec.parameters / 1e9, 2), 2 * spec.kv_elements, spec.degrees) == PUBLISHED[name]


def test_costs_are_near_what_an_h200_has_measured():
    law = pretended_model(SHAPES).profile.costs["cuda x1"]
    steps = list(measured(RESULTS.read_text()))
    errors = [abs(math.log(law.seconds(step.features) / step.seconds)) for step in steps]
    assert len(errors) == 11
    assert max(errors) < 0.16
    assert fmean(errors) < 0.08


@pytest.mark.parametrize("name", NAMES)
def test_a_run_has_the_published_steps_and_meets_fewer_deadlines_under_load(name):
    calm, busy = run(name, 0.5, seconds=12.0), run(name, 60.0, seconds=2.0)
    model = pretended_model(name).profile
    assert not model.measured
    assert "data sheets" in model.made
    block = model.quality.block_length
    steps = fmean(outcome.usage.steps for outcome in calm)
    firsts = 64 / block if models.outline(FOLDER / name).traits.first_token else 0.0
    expected = firsts + 64 / {"llada-8b": 3.25, "dream-7b": 1.56, "sdar-8b": 2.48, "llada2-mini": 2.55}[name]
    assert steps == pytest.approx(expected, rel=0.25)
    assert fmean(bool(one.met) for one in busy) < fmean(bool(one.met) for one in calm)


def test_prompts_that_begin_alike_save_an_exact_family_time_and_blocks_cost_less_than_a_refresh():
    apart, shared = run("sdar-8b", 0.5, seconds=12.0), run("sdar-8b", 0.5, shared=256, seconds=12.0)
    assert not any(outcome.usage.cached_prompt_tokens for outcome in apart)
    assert max(outcome.usage.cached_prompt_tokens for outcome in shared) == 256
    assert fmean(one.latency for one in shared) < fmean(one.latency for one in apart)
    begun = pretended_model("sdar-8b").profile.costs["cuda x1"].seconds(Features(8, 8 * 364, 364, 4, 1))
    refresh = pretended_model("llada-8b").profile.costs["cuda x1"].seconds(Features(364, 364**2, 364, 32, 1))
    assert begun < refresh / 2


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="only of dream-7b, llada-8b"):
        pretended_model("gpt")
