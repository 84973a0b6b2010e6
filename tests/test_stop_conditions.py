"""Where an answer ends: end tokens, stop tokens and stop strings, not before `min_tokens`, in any batch."""

import asyncio
import random

import checkpoints
import pytest
import pytest_asyncio
from parity import teach_an_end

from dilaserve import Config, Engine, Options
from dilaserve.errors import BadRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")
WISH = dict(max_tokens=24, block_length=8, confidence_threshold=0.5)
HOT = dict(temperature=0.9, top_p=0.95)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory):
    """On a model that likes to end."""
    directory = checkpoints.make(tmp_path_factory.mktemp("models") / "ending", seed=11)
    teach_an_end(directory)
    async with Engine(Config.of(model=str(directory), devices="cpu")) as engine:
        yield engine


def prompts(count, seed=1):
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(3, 40))] for _ in range(count)]


async def crowd(engine, wishes):
    return await asyncio.gather(*(engine.generate(prompt, Options(**(WISH | wish))) for prompt, wish in wishes))


async def test_a_stop_token_ends_the_answer_and_is_part_of_it_only_on_demand(engine):
    asked = prompts(3)
    full = await crowd(engine, [(prompt, dict(ignore_eos=True)) for prompt in asked])
    stops = [(answer.token_ids[5 + 6 * i], answer.token_ids[9]) for i, answer in enumerate(full)]
    wish = [dict(ignore_eos=True, stop_token_ids=stop) for stop in stops]
    cut = await crowd(engine, list(zip(asked, wish, strict=True)))
    shown = [one | dict(include_stop_str_in_output=True) for one in wish]
    longer = await crowd(engine, list(zip(asked, shown, strict=True)))
    for whole, stop, short, more in zip(full, stops, cut, longer, strict=True):
        end = min(whole.token_ids.index(id) for id in stop)
        assert (short.token_ids, short.finish_reason) == (whole.token_ids[:end], "stop")
        assert (more.token_ids, more.finish_reason) == (whole.token_ids[: end + 1], "stop")
        assert more.text == engine.detokenize(more.token_ids)


@pytest.mark.parametrize("how", [{}, HOT, dict(cache="none")])
async def test_no_answer_ends_before_its_least_number_of_tokens(engine, how):
    asked = prompts(6, seed=2)
    wishes = [(prompt, how | dict(min_tokens=4 * i, seed=i)) for i, prompt in enumerate(asked)]
    free = await crowd(engine, [(prompt, how | dict(seed=i)) for i, prompt in enumerate(asked)])
    found = await crowd(engine, wishes)
    assert any(len(answer.token_ids) < 4 * i for i, answer in enumerate(free))
    for i, answer in enumerate(found):
        assert len(answer.token_ids) >= 4 * i
        assert checkpoints.EOS not in answer.token_ids
    assert found[0].token_ids == free[0].token_ids
    alone = [(await crowd(engine, [wish]))[0] for wish in wishes[3:5]]
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in found[3:5]]


async def test_a_stop_token_is_not_chosen_before_the_least_number_of_tokens_either(engine):
    (prompt,) = prompts(1, seed=3)
    (full,) = await crowd(engine, [(prompt, dict(ignore_eos=True))])
    stop = full.token_ids[3]
    (answer,) = await crowd(engine, [(prompt, dict(ignore_eos=True, stop_token_ids=(stop,), min_tokens=12))])
    assert len(answer.token_ids) >= 12
    assert stop not in answer.token_ids


async def test_draws_are_narrowed_and_do_not_depend_on_other_rows(engine):
    asked = prompts(6, seed=4)
    narrow = [dict(top_k=1), dict(min_p=1.0), dict(top_k=5), dict(min_p=0.1), dict(top_k=-1), dict(top_k=3, min_p=0.2)]
    wishes = [
        (prompt, dict(temperature=1.5, seed=i, ignore_eos=True) | narrow[i % 6]) for i, prompt in enumerate(asked)
    ]
    together = await crowd(engine, wishes)
    alone = [(await crowd(engine, [wish]))[0] for wish in wishes[2:4]]
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in together[2:4]]
    greedy = await crowd(engine, [(prompt, dict(ignore_eos=True)) for prompt in asked])
    for i, (drawn, best) in enumerate(zip(together, greedy, strict=True)):
        assert (drawn.token_ids == best.token_ids) == (i % 6 in (0, 1))  # one token is left to draw from


async def test_a_stop_string_counts_after_the_least_number_of_tokens_and_is_shown_on_demand(engine):
    (prompt,) = prompts(1, seed=5)
    (full,) = await crowd(engine, [(prompt, dict(ignore_eos=True, max_tokens=96))])
    pieces = [engine.detokenize([id]) for id in full.token_ids]
    again = next(i for i in range(2, 50) if pieces[i].isascii() and pieces[i] in pieces[i + 1 :] and pieces[i].strip())
    later = pieces.index(pieces[again], again + 1)
    first = pieces.index(pieces[again])
    base = dict(ignore_eos=True, max_tokens=96, stop=(pieces[again],))
    cuts = [dict(), dict(include_stop_str_in_output=True), dict(min_tokens=first), dict(min_tokens=again + 1)]
    found = await crowd(engine, [(prompt, base | cut) for cut in cuts])
    cut_at = "".join(pieces[:first]), "".join(pieces[: first + 1]), "".join(pieces[:first])
    assert tuple(answer.text for answer in found[:3]) == cut_at
    assert {answer.finish_reason for answer in found} == {"stop"}
    assert found[3].text.startswith("".join(pieces[: again + 1]))
    assert found[3].text == "".join(pieces[:later])


async def test_what_ends_no_answer_is_refused_by_name(engine):
    for wish, param in [
        (dict(min_tokens=25), "min_tokens"),
        (dict(min_tokens=-1), "min_tokens"),
        (dict(stop_token_ids=(checkpoints.VOCAB,)), "stop_token_ids"),
        (dict(stop_token_ids=(-1,)), "stop_token_ids"),
        (dict(stop_token_ids=(1,) * 33), "stop_token_ids"),
        (dict(top_k=-2), "top_k"),
        (dict(min_p=1.01), "min_p"),
        (dict(min_p=float("nan")), "min_p"),
    ]:
        with pytest.raises(BadRequest) as caught:
            await engine.submit([1, 2, 3], Options(**(WISH | wish)))
        assert caught.value.param == param
