"""A planner that fails, and one whose process dies."""

import asyncio
import itertools
import logging

import pytest
from planner_examples import LAWS, PROFILE, SINGLE, demand
from virtual_time import run_on_virtual_time

from dilaserve import Config, Engine
from dilaserve.planner.planner import Planner, Setup
from dilaserve.planner.process import PlannerGone, PlannerProcess
from dilaserve.plans import parsed
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended
from dilaserve.types import PlanReady


class FailingPlanner(Planner):
    """Fails at some of its questions."""

    def __init__(self, fails):
        super().__init__({}, llada_8b_h200().quality)
        self.fails, self.asked = fails, []

    def __call__(self, demand):
        self.asked.append(asyncio.get_running_loop().time())
        if len(self.asked) in self.fails:
            raise ValueError("a matrix is singular")
        return PlanReady(parsed("1x2", 2, demand.degrees), "well")


def test_a_planner_that_fails_is_asked_again_and_that_is_logged(caplog):
    async def planned():
        async with Engine(Config.of(), assemble=pretended(llada_8b_h200(), 2, 1024), planner=planner) as engine:
            await asyncio.sleep(20.0)
            return len(engine.plan.groups)

    planner = FailingPlanner({1, 2, 4})
    with caplog.at_level(logging.ERROR):
        assert run_on_virtual_time(planned()) == 1
    gaps = [round(later - earlier, 3) for earlier, later in itertools.pairwise(planner.asked)]
    assert gaps[:4] == [2.0, 4.0, 2.0, 2.0]
    again = "the planner has failed; the plan stays as it is, and it is asked again in {} s"
    assert caplog.messages == [again.format(seconds) for seconds in (2, 4, 2)]


def test_a_planner_whose_process_dies_counts_as_one_that_fails():
    profile = llada_8b_h200()
    planner_process = PlannerProcess({1: profile.costs["cuda x1"]}, profile.quality, Setup())
    planner_process.advise = lambda demand: None
    with pytest.raises(PlannerGone, match="has died or does not answer"):
        planner_process(None)


def test_the_planner_in_its_own_process_answers_alike_and_outlives_its_process():
    setup = Setup()
    with PlannerProcess(LAWS, PROFILE.quality, setup) as planner_process:
        wanted = demand({0.8: 6.0}, SINGLE)
        inline = Planner(LAWS, PROFILE.quality, setup).advise(wanted)
        assert planner_process.advise(wanted) == inline
        planner_process.learned({1: LAWS[1]}, PROFILE.quality)
        assert planner_process.advise(wanted).plan is None
        dead = planner_process.process
        dead.kill()
        dead.wait()
        assert planner_process.advise(wanted) is None
        assert "8x1" in planner_process.advise(wanted).reason
    assert planner_process.process is None
