"""The engine against the reference loops, token for token: float32, CPU, temperature 0, real worker processes."""

import asyncio

import checkpoints
import msgspec
import pytest
import pytest_asyncio
from parity import answers, asked, expect, some_requests, teach_an_end, wishes
from reference_loops import CASES, Llada, cache_of

from dilaserve import Config, Engine, Options
from dilaserve.models.checkpoint import locate
from dilaserve.profile.problems import TASKS, held_out

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(random_model):
    """Of one worker; no test changes it."""
    async with Engine(Config.of(model=str(random_model), devices="cpu")) as engine:
        yield engine


async def test_the_authors_cases_one_by_one_and_all_at_once(author_model):
    def arguments(case):
        how = {"threshold": case["threshold"]} if case.get("threshold") else {"steps": case["steps"]}
        return dict(
            prompt=case["prompt"],
            gen_length=case["gen_length"],
            block_length=case["block_length"],
            cache=cache_of(case),
            **how,
        )

    requests = [arguments(case) for case in CASES]
    async with Engine(Config.of(model=str(author_model), devices="cpu")) as engine:
        alone = [await engine.generate(*asked(**request)) for request in requests]
        together = await answers(engine, requests)
    assert [list(completion.token_ids) for completion in alone] == [case["expected"] for case in CASES]
    assert [list(completion.token_ids) for completion in together] == [case["expected"] for case in CASES]
    assert [c.usage.steps for c in alone] == [case.get("nfe_reference", case["steps"]) for case in CASES]


async def test_mixed_requests_get_the_reference_answers(engine, random_model):
    requests = some_requests(60, seed=1)
    completions = await answers(engine, requests, stagger=True)
    expect(Llada(random_model), requests, completions)


async def test_mixed_requests_on_two_devices_get_the_reference_answers(random_model):
    requests = some_requests(60, seed=1)
    async with Engine(Config.of(model=str(random_model), devices="cpu,cpu")) as engine:
        completions = await answers(engine, requests, stagger=True)
    expect(Llada(random_model), requests, completions)


async def test_rows_that_queue_and_steps_that_are_split_change_nothing(random_model):
    requests = some_requests(40, seed=2)
    config = Config.of(model=str(random_model), devices="cpu", max_num_seqs=3, max_num_batched_tokens=150)
    async with Engine(config) as engine:
        completions = await answers(engine, requests)
    expect(Llada(random_model), requests, completions)


async def test_grouped_query_attention_shards_and_a_small_pool(tmp_path):
    directory = checkpoints.make(tmp_path / "grouped", seed=7, layers=3, width=48, heads=6, kv_heads=2, shards=3)
    requests = some_requests(20, seed=3)
    async with Engine(Config.of(model=str(directory), devices="cpu", kv_cache_tokens=320)) as engine:
        completions = await answers(engine, requests)
    expect(Llada(directory), requests, completions)


async def test_a_request_alone_and_in_a_batch_gives_the_same_tokens_and_confidences(engine):
    requests = some_requests(30, seed=4)
    alone = [await engine.generate(*asked(**request)) for request in requests]
    together = await answers(engine, requests)
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.confidences == pytest.approx(other.confidences, rel=1e-4)


async def test_refreshing_at_every_step_is_no_cache_at_all(engine, random_model):
    requests = [request | {"cache": "none"} for request in some_requests(12, seed=8)]
    for cache in ("prefix", "dual"):
        how = {"cache": cache, "refresh_interval": 1}
        always = [(prompt, msgspec.structs.replace(options, **how)) for prompt, options in wishes(requests)]
        completions = await asyncio.gather(*(engine.generate(*wish) for wish in always))
        expect(Llada(random_model), requests, completions)


async def test_an_answer_cut_inside_a_block_is_the_beginning_of_the_whole_block(engine):
    requests = [request | {"steps": None, "threshold": 0.7, "factor": None} for request in some_requests(12, seed=9)]
    whole = await answers(engine, requests)
    cut = await answers(engine, [request | {"gen_length": request["gen_length"] - 3} for request in requests])
    assert [answer.token_ids for answer in cut] == [answer.token_ids[:-3] for answer in whole]


async def test_the_bundled_model_answers_as_the_reference_does():
    model = Llada(locate("dilaserve-tiny"))
    problems = [problem for task in TASKS for problem in held_out(task, 2, seed=3)]
    settings = [dict(cache=cache, threshold=0.8) for cache in ("none", "prefix", "dual")]
    async with Engine(Config.of(devices="cpu")) as engine:
        prompts = [await engine.tokenize([{"role": "user", "content": problem.prompt}]) for problem in problems]
        requests = [
            dict(prompt=prompt, gen_length=64, block_length=32, **settings[i % 3]) for i, prompt in enumerate(prompts)
        ]
        completions = await answers(engine, requests)
    expect(model, requests, completions)


async def test_sampling_depends_on_the_seed_and_not_on_the_batch(engine):
    requests = [asked(**request) for request in some_requests(12, seed=5)]
    hot = [
        (prompt, Options(max_tokens=o.max_tokens, cache=o.cache, temperature=0.8, top_p=0.9, seed=i, ignore_eos=True))
        for i, (prompt, o) in enumerate(requests)
    ]
    alone = [(await engine.generate(*request)).token_ids for request in hot]
    together = await asyncio.gather(*(engine.generate(*request) for request in hot))
    prompt, options = hot[0]
    other = await engine.generate(prompt, Options(max_tokens=options.max_tokens, temperature=0.8, seed=99))
    assert [completion.token_ids for completion in together] == alone
    assert other.token_ids != alone[0]


async def test_mask_tokens_in_the_prompt_are_left_alone(engine, random_model):
    prompt = [5, checkpoints.MASK, 70, checkpoints.MASK, checkpoints.MASK]
    requests = [
        dict(prompt=prompt, gen_length=32, block_length=16, cache=cache, threshold=0.7)
        for cache in ("none", "prefix", "dual")
    ]
    completions = await answers(engine, requests)
    text = await engine.tokenize("a<|mdm_mask|>b")
    stream = await engine.submit(prompt, Options(max_tokens=16))
    assert [chunk async for chunk in stream][-1].finish_reason == "length"
    assert engine.table.canvas[stream.request.row, : len(prompt)].tolist() == prompt
    assert text == [ord("a") - 33 + 0, checkpoints.MASK, ord("b") - 33 + 0]
    expect(Llada(random_model), requests, completions)


async def test_an_answer_ends_at_its_first_end_token_and_says_what_the_full_canvas_says(tmp_path):
    directory = checkpoints.make(tmp_path / "ending", seed=11)
    teach_an_end(directory)
    requests = [request | {"threshold": 0.6, "steps": None, "factor": None} for request in some_requests(30, seed=6)]
    async with Engine(Config.of(model=str(directory), devices="cpu")) as engine:
        full = await answers(engine, requests)
        cut = await asyncio.gather(
            *(
                engine.generate(prompt, msgspec.structs.replace(options, ignore_eos=False))
                for prompt, options in (asked(**request) for request in requests)
            )
        )
    ended = 0
    for whole, short in zip(full, cut, strict=True):
        ids = list(whole.token_ids)
        end = ids.index(checkpoints.EOS) if checkpoints.EOS in ids else len(ids)
        ended += end < len(ids)
        assert list(short.token_ids) == ids[:end]
        assert short.finish_reason == ("stop" if end < len(ids) else "length")
        assert short.usage.steps <= whole.usage.steps
    assert ended >= 10
