"""What the scheduler expects of requests of exact families, against what the simulated machine takes for them alone."""

import asyncio
import random
from statistics import fmean

import msgspec
import pytest

from dilaserve.config import Config
from dilaserve.engine.engine import Engine, Options
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
def test_a_request_alone_takes_as_long_as_is_expected(traits, prompt, answer, most):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        expected, taken = runner.run(alone(traits, prompt, answer, most))
    assert expected == pytest.approx(taken, rel=0.05)
