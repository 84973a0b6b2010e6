"""What the scheduler expects of requests of exact families, against what the simulated machine takes for them alone."""

import asyncio
import random
from itertools import pairwise
from statistics import fmean

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilaserve.config import Config
from dilaserve.engine.engine import Engine, Options
from dilaserve.planner.operating_points import unloaded
from dilaserve.planner.step_pace import Kind, Stepping, blocks, paced
from dilaserve.profile.forecast import Forecast
from dilaserve.sim.clock import VirtualLoop
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended
from dilaserve.types import FamilyTraits

BLOCK = FamilyTraits(attention="block", grid="start")
CAUSAL = FamilyTraits(attention="causal", first_token=True)
REQUESTS = 24


def profile():
    """All requests are as fast as their kind is in the mean."""
    known = llada_8b_h200()
    return msgspec.structs.replace(known, quality=msgspec.structs.replace(known.quality, spread=0.0))


async def alone(traits, prompt, answer, most):
    """(expected, taken): mean seconds of requests that come one after the other; `most` tokens a step."""
    rng, expected, taken = random.Random(0), [], []
    config = Config.of(max_num_batched_tokens=most)
    async with Engine(config, assemble=pretended(profile(), 1, 8192, traits=traits)) as engine:
        engine.scheduler.estimates.forecast.learns = False
        for _ in range(REQUESTS):
            began, ids = engine.loop.time(), [rng.randrange(1000) for _ in range(prompt)]
            stream = await engine.submit(ids, Options(max_tokens=answer, ignore_eos=True))
            while not engine.scheduler.requests:  # noqa: ASYNC110
                await asyncio.sleep(0)
            expected += [state.seconds for state in engine.scheduler.requests.values()]
            async for _ in stream:
                pass
            taken.append(engine.loop.time() - began)
    return fmean(expected), fmean(taken)


@pytest.mark.parametrize(
    ("traits", "prompt", "answer", "most"),
    [
        pytest.param(FamilyTraits(), 200, 248, 8192, id="full"),
        pytest.param(BLOCK, 200, 248, 8192, id="a first block that begins in the prompt"),
        pytest.param(BLOCK, 4000, 64, 8192, id="a long prompt"),
        pytest.param(BLOCK, 4000, 64, 600, id="a long prompt in chunks"),
        pytest.param(CAUSAL, 200, 248, 8192, id="first tokens"),
        pytest.param(CAUSAL, 4000, 64, 600, id="first tokens behind a prompt in chunks"),
    ],
)
def test_a_request_alone_takes_as_long_as_the_scheduler_and_the_planner_expect(traits, prompt, answer, most):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        expected, taken = runner.run(alone(traits, prompt, answer, most))
    assert expected == pytest.approx(taken, rel=0.05)
    known, kind, stepping = profile(), Kind(prompt + answer, answer), Stepping(traits, most)
    planned = unloaded(known.costs["cuda x1"], Forecast(known.quality), kind, stepping=stepping)
    assert planned == pytest.approx(taken, rel=0.08)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([BLOCK, CAUSAL, msgspec.structs.replace(BLOCK, block_length=4)]),
    st.integers(1, 4000),
    st.integers(1, 600),
    st.sampled_from([512, 8192]),
)
def test_company_and_longer_prompts_make_lives_longer(traits, prompt, answer, most):
    known, kind, stepping = profile(), Kind(prompt + answer, answer), Stepping(traits, most)
    law, forecast = known.costs["cuda x1"], Forecast(known.quality)
    block = blocks(kind, 32, stepping)
    ahead = forecast.ahead("any", 0, 0, *block.masked)
    lives = paced(law, kind, ahead, 6, block.length, 0.0, stepping).life
    assert all(one < two for one, two in pairwise(lives))
    longer = paced(law, kind._replace(canvas=kind.canvas + 512), ahead, 6, block.length, 0.0, stepping).life
    assert all(longer > lives)
