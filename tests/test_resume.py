"""Answers that go on behind tokens which their client has: the whole is that of an answer without a break."""

import asyncio
import os
import signal

import block_checkpoints
import checkpoints
import family_checkpoints
import gemma_passes
import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from scheduler_builders import request
from scheduler_world import opening
from worker_faults import wait_for_plan
from worker_waits import until

from dilaserve import BadRequest, Config, Engine, Options
from dilaserve.engine.answer_text import AnswerText, cutting
from dilaserve.engine.resume import whole_tokens
from dilaserve.engine.submit import ResolvedOptions
from dilaserve.types import FamilyTraits

TOKENS = 22
RULES = {
    "threshold": dict(confidence_threshold=0.4),
    "steps": dict(num_denoising_steps=12),
    "dynamic": dict(confidence_threshold=0.6, num_denoising_steps=9),
    "sequential": dict(num_denoising_steps=11),
    "entropy": dict(num_denoising_steps=11),
    "margin": dict(num_denoising_steps=11),
    "factor": dict(factor=1.5),
}
FULL, EXACT = ("none", "prefix", "dual"), ("exact",)
FAMILIES = {"bundled": FULL, "DreamModel": FULL, "SDARForCausalLM": EXACT, "Fast_dLLM_QwenForCausalLM": EXACT}
GEMMA = "DiffusionGemmaForBlockDiffusion"
OLD_NAMES = ("deadline", "tenant")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Its name, and a model of it."""
    name = request.param
    if name == "bundled":
        return name, Config().model.model
    return name, str(block_checkpoints.make(tmp_path_factory.mktemp("models") / name, name))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(family):
    async with Engine(Config.of(model=family[1], devices="cpu", port=0)) as engine:
        yield engine


def resumed(options, ids):
    fields = {name: getattr(options, name) for name in options.__struct_fields__ if name not in OLD_NAMES}
    return Options(**fields | {"resume_token_ids": tuple(ids)})


async def cut_everywhere(engine, prompt, options, cuts=None):
    """Ask for the answer, and for the rest of it behind each of its beginnings; both together are the answer."""
    whole = await engine.generate(prompt, options)
    ids = whole.token_ids
    cuts = range(1, len(ids) + 1) if cuts is None else cuts
    rest = await asyncio.gather(*(engine.generate(prompt, resumed(options, ids[:cut])) for cut in cuts))
    for cut, answer in zip(cuts, rest, strict=True):
        said = AnswerText(engine.text, cutting(options))
        before = said.push(ids[:cut])
        wanted = () if said.stops.found else ids[cut:]  # tokens that came with the end of a stop string, behind it
        assert (answer.token_ids, before + answer.text) == (wanted, whole.text), cut
        assert (answer.finish_reason, answer.stop) == (whole.finish_reason, whole.stop), cut
        assert answer.confidences == pytest.approx(whole.confidences[cut:][: len(wanted)], abs=1e-3)
        assert (answer.completion_tokens, answer.usage.resumed_tokens) == (len(wanted), cut)
        assert answer.usage.steps <= whole.usage.steps
    return whole, rest


@given(
    prompt=st.integers(1, 80),
    answer=st.integers(1, 80),
    length=st.integers(1, 40),
    traits=st.builds(
        FamilyTraits,
        grid=st.sampled_from(("prompt", "start")),
        part_length=st.sampled_from((None, 3)),
        first_token=st.booleans(),
    ),
    data=st.data(),
)
def test_engine_and_scheduler_agree_on_which_blocks_are_whole(prompt, answer, length, traits, data):
    wanted = request(0, prompt, answer, traits=traits, block_length=length)
    wanted = msgspec.structs.replace(wanted, resumed_tokens=data.draw(st.integers(0, answer - 1)))
    resolved = ResolvedOptions(prompt + answer, answer, wanted.decoding)
    assert whole_tokens(resolved, prompt, wanted.resumed_tokens) == opening(wanted) - prompt
    assert whole_tokens(resolved, prompt, answer) == answer


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("rule", RULES)
async def test_the_whole_is_the_same_wherever_it_is_cut(family, engine, rule, ends):
    if rule not in engine.model.traits.rules:
        with pytest.raises(BadRequest, match="does not decode by"):
            await engine.generate("Sort: 3 1 2", Options(decode=rule, **RULES[rule]))
        return
    for cache in FAMILIES[family[0]]:
        options = Options(
            decode=rule, max_tokens=TOKENS, block_length=8, cache=cache, ignore_eos=not ends, **RULES[rule]
        )
        whole, rest = await cut_everywhere(engine, "Sort: 3 1 2", options)
        if not ends:
            assert (len(whole.token_ids), rest[-1].usage.steps) == (TOKENS, 0)
            assert rest[15].usage.steps < whole.usage.steps


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("knobs", [dict(), dict(top_p=0.9, top_k=20), dict(refresh_interval=2)], ids=str)
async def test_draws_go_on_where_they_were(family, engine, knobs):
    if knobs.get("refresh_interval") and FAMILIES[family[0]] == EXACT:
        knobs = dict(min_tokens=12)
    options = Options(max_tokens=TOKENS, block_length=8, temperature=1.0, seed=5, confidence_threshold=0.3, **knobs)
    await cut_everywhere(engine, "Sort: 3 1 2", options)


@pytest.mark.asyncio(loop_scope="module")
async def test_text_goes_on_within_characters_and_stop_strings(engine):
    """The random models write parts of characters; each stop string is one of the answer's own, and straddles cuts."""
    options = Options(max_tokens=TOKENS, block_length=8, temperature=1.0, ignore_eos=True, seed=3)
    whole, _ = await cut_everywhere(engine, "Sort: 3 1 2", options)
    text = whole.text
    for start in range(0, len(text) - 3, 3):
        for shown in (False, True):
            stopping = Options(
                max_tokens=TOKENS,
                block_length=8,
                temperature=1.0,
                ignore_eos=True,
                seed=3,
                stop=(text[start : start + 3], "absent"),
                include_stop_str_in_output=shown,
                min_tokens=start % 5,
            )
            stopped, _ = await cut_everywhere(engine, "Sort: 3 1 2", stopping)
            assert stopped.finish_reason == "length" or stopped.stop == text[start : start + 3]


@pytest.mark.asyncio(loop_scope="module")
async def test_tokens_that_end_the_answer_end_it_at_once(engine):
    options = dict(max_tokens=TOKENS, block_length=8, ignore_eos=True)
    ids = (await engine.generate("Sort: 3 1 2", Options(**options))).token_ids
    place = max(place for place in range(TOKENS) if ids[place] not in ids[:place])
    for shown in (False, True):
        stops = Options(**options, stop_token_ids=(ids[place],), include_stop_str_in_output=shown)
        whole = await engine.generate("Sort: 3 1 2", stops)
        assert (len(whole.token_ids), whole.finish_reason) == (place + shown, "stop")
        rest = await engine.generate("Sort: 3 1 2", resumed(stops, ids[: place + 1]))
        assert (rest.token_ids, rest.finish_reason, rest.usage.steps) == ((), "stop", 0)
        before = AnswerText(engine.text, cutting(stops)).push(ids[: place + shown])
        assert before + rest.text == whole.text
    later = Options(**options, stop_token_ids=(ids[place],), min_tokens=place + 1)
    assert (await engine.generate("Sort: 3 1 2", resumed(later, ids[: place + 1]))).usage.steps > 0


@pytest.mark.asyncio(loop_scope="module")
async def test_an_open_block_shows_its_known_tokens_as_masks_until_they_are_back(engine):
    options = Options(max_tokens=16, block_length=8, include_canvas=True, ignore_eos=True, num_denoising_steps=16)
    whole = [chunk async for chunk in engine.stream("Sort: 3 1 2", options)]
    ids = [id for chunk in whole for id in chunk.token_ids]
    rest = [chunk async for chunk in engine.stream("Sort: 3 1 2", resumed(options, ids[:11]))]
    shapes = [[(c.canvas.start, c.canvas.masked) for c in chunks if c.canvas] for chunks in (whole, rest)]
    assert shapes[1] == shapes[0][-len(shapes[1]) :]
    assert [id for chunk in rest for id in chunk.token_ids] == ids[11:]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("ids", "more", "words"),
    [
        ((10**6,), {}, "outside the whole numbers"),
        ((-1,), {}, "outside the whole numbers"),
        ((5, "mask"), {}, "holds the mask token"),
        ((5,) * 9, {"max_tokens": 8}, "holds 9 tokens, and max_tokens"),
        ((1.5,), {}, "resume_token_ids"),
        ("abc", {}, "resume_token_ids"),
    ],
)
async def test_what_no_answer_can_begin_with_is_refused(engine, ids, more, words):
    ids = tuple(engine.mask_id if id == "mask" else id for id in ids) if isinstance(ids, tuple) else ids
    with pytest.raises(BadRequest, match=words) as caught:
        await engine.generate("hello", Options(resume_token_ids=ids, **more))
    assert caught.value.param.startswith("resume_token_ids")
    assert len(engine.consumer.free) == engine.table.rows


@pytest.mark.asyncio(loop_scope="module")
async def test_blocks_that_begin_as_noise_go_on_behind_whole_ones(tmp_path):
    gemma_passes.doubled(tmp_path / "gemma")
    checkpoints.write_tokenizer(tmp_path / "gemma")
    async with Engine(Config.of(model=str(tmp_path / "gemma"), devices="cpu", port=0)) as engine:
        length = engine.model.traits.block_length
        options = Options(max_tokens=3 * length, seed=7, ignore_eos=True, num_denoising_steps=6)
        whole, _ = await cut_everywhere(engine, "Sort: 3 1 2", options, [length, 2 * length, 3 * length])
        with pytest.raises(BadRequest, match=f"within a block of {length} tokens, and this model writes a block at"):
            await engine.generate("Sort: 3 1 2", resumed(options, whole.token_ids[: length + 1]))


@pytest.mark.asyncio(loop_scope="module")
async def test_edited_blocks_go_on_behind_whole_ones(tmp_path):
    model = family_checkpoints.published(tmp_path / "model", "LLaDA2MoeModelLM")
    async with Engine(Config.of(model=str(model), devices="cpu", port=0)) as engine:
        options = Options(
            max_tokens=24, block_length=8, editing_threshold=0.2, confidence_threshold=0.3, ignore_eos=True
        )
        grid = len(await engine.tokenize("Sort: 3 1 2")) % 8
        begin = 8 - grid if engine.model.traits.grid == "start" else 8
        whole, _ = await cut_everywhere(engine, "Sort: 3 1 2", options, [begin, begin + 8, 24])
        with pytest.raises(BadRequest, match="tokens may be replaced until their block is finished"):
            await engine.generate("Sort: 3 1 2", resumed(options, whole.token_ids[: begin + 1]))


@pytest.mark.asyncio(loop_scope="module")
async def test_tokens_that_the_model_would_not_choose_are_put_back_and_seen(engine):
    options = Options(max_tokens=TOKENS, block_length=8, ignore_eos=True)
    whole = await engine.generate("Sort: 3 1 2", options)
    other = tuple((id + 7) % 200 for id in whole.token_ids[:11])
    async with await engine.submit("Sort: 3 1 2", resumed(options, other)) as stream:
        rest = [id for chunk in await stream.whole() for id in chunk.token_ids]
        row, first = stream.request.row, stream.prompt_tokens
    assert engine.table.canvas[row, first : first + TOKENS].tolist() == [*other, *rest]
    assert not engine.table.resumed[row]
    again = await engine.generate("Sort: 3 1 2", resumed(options, [*other, *rest[:3]]))
    assert list(again.token_ids) == rest[3:]


@pytest.mark.asyncio(loop_scope="module")
async def test_a_tp_group_goes_on_in_several_steps_a_launch(family):
    async with Engine(Config.of(model=family[1], devices="cpu,cpu", plan="1x2", port=0, steps_per_launch=4)) as engine:
        for how in (dict(confidence_threshold=0.4), dict(temperature=1.0, seed=2, top_k=9)):
            options = Options(max_tokens=TOKENS, block_length=8, ignore_eos=True, **how)
            await cut_everywhere(engine, "Sort: 3 1 2", options)


@pytest.mark.asyncio(loop_scope="module")
async def test_killed_workers_and_changes_of_plan_change_nothing_of_what_goes_on(family):
    cache = "exact" if FAMILIES[family[0]] == EXACT else "none"  # where K/V lost within a block change nothing
    options = Options(max_tokens=60, block_length=20, cache=cache, ignore_eos=True, confidence_threshold=0.95)
    async with Engine(Config.of(model=family[1], devices="cpu,cpu", plan="2x1", port=0)) as engine:
        whole = (await engine.generate("Sort: 3 1 2", options)).token_ids
        cuts = [7, 15, 19, 33, 39] * 3

        async def under_way():
            begun = engine.profile.steps + 6
            rest = [asyncio.create_task(engine.generate("Sort: 3 1 2", resumed(options, whole[:cut]))) for cut in cuts]
            await until(lambda: engine.profile.steps >= begun)
            return rest

        rest = await under_way()
        os.kill(engine.executor.workers[1].process.pid, signal.SIGKILL)
        answers = await asyncio.gather(*rest)
        await wait_for_plan(engine)
        rest = await under_way()
        await engine.replan("1x2")
        answers += await asyncio.gather(*rest)
        assert [answer.token_ids for answer in answers] == [whole[cut:] for cut in cuts * 2]
        assert any(answer.usage.restarts for answer in answers)
