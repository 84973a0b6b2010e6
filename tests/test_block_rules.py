"""The rules of blocks: parts of a canvas, what a step computes, how many tokens it unmasks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.models.attention import by_grain
from dilaserve.models.spans import PackedSpan
from dilaserve.scheduler.request_state import quotas_of
from dilaserve.scheduler.rules.blocks import Part, parts
from dilaserve.scheduler.rules.quotas import dream_shares, even, falling_times, mdlm, steps_per_block
from dilaserve.scheduler.rules.step_kind import View, Work, work
from dilaserve.types import Decoding, FamilyTraits, Request, Span
from dilaserve.worker.step_arrays import columns_of, visible_keys

FULL, BLOCK, CAUSAL = FamilyTraits(), FamilyTraits(attention="block"), FamilyTraits(attention="causal")
FRESH, STALE = View(100, 40, 72, 100), View(100, 40, 72, 0)


@pytest.mark.parametrize(
    ("cache", "view", "expected"),
    [
        ("none", FRESH, Work(0, 100, 100, True, 100)),
        ("none", STALE, Work(0, 100, 100, True, 100)),
        ("prefix", STALE, Work(0, 100, 100, True, 100)),
        ("prefix", FRESH, Work(40, 60, 100, False, 100)),
        ("dual", STALE, Work(0, 100, 100, True, 100)),
        ("dual", FRESH, Work(40, 32, 100, False, 100)),
    ],
)
def test_a_cache_kind_says_what_a_step_computes(cache, view, expected):
    assert work(cache, view, FULL, 32) == expected


@pytest.mark.parametrize(
    ("traits", "view", "expected"),
    [
        (BLOCK, View(100, 64, 96, 0), Work(0, 96, 96, True, 64, 32, 64)),  # the prompt and the first block
        (BLOCK, View(100, 64, 96, 32), Work(32, 64, 96, True, 64, 32, 64)),  # a finished block and the next
        (BLOCK, View(100, 64, 96, 64), Work(64, 32, 96, False, 64)),
        (BLOCK, View(100, 64, 96, 32, first=True), Work(32, 32, 64, True, 64, 32, 64)),
        (CAUSAL, View(100, 41, 73, 0, first=True), Work(0, 41, 41, True, 41, 1, 41)),
        (CAUSAL, View(100, 41, 73, 41), Work(41, 32, 73, False, 41)),
        (BLOCK, View(200, 128, 160, 0, limit=70), Work(0, 64, 64, True, 64, 32, 128, chunk=True)),
        (BLOCK, View(200, 128, 160, 64, limit=70), Work(64, 64, 128, True, 128, 32, 128, chunk=True)),
        (BLOCK, View(200, 128, 160, 0, limit=8), Work(0, 32, 32, True, 32, 32, 128, chunk=True)),
        (BLOCK, View(200, 128, 160, 96, limit=40), Work(96, 32, 128, True, 128, 32, 128, chunk=True)),
        (CAUSAL, View(100, 41, 73, 0, first=True, limit=30), Work(0, 30, 30, True, 30, 1, 41, chunk=True)),
        (CAUSAL, View(100, 41, 73, 30, first=True, limit=30), Work(30, 11, 41, True, 41, 1, 41)),
    ],
)
def test_exact_kv_are_written_on_the_way_into_the_next_block(traits, view, expected):
    assert work("exact", view, traits, 32) == expected


@given(st.sampled_from(["none", "prefix", "dual"]), st.integers(1, 500), st.data())
def test_every_step_covers_the_active_block_and_stays_on_the_canvas(cache, canvas, data):
    start = data.draw(st.integers(0, canvas - 1))
    end = data.draw(st.integers(start + 1, canvas))
    todo = work(cache, View(canvas, start, end, data.draw(st.sampled_from((0, canvas)))), FULL, 32)
    assert 0 <= todo.start <= start
    assert end <= todo.start + todo.length <= canvas == todo.keys


def request(prompt, answer, **decoding):
    found = Decoding(**decoding)
    length = found.block_length
    begin = prompt if found.traits.grid == "prompt" else prompt // length * length
    canvas = begin + -(-(prompt + answer - begin) // length) * length
    return Request(
        id="",
        row=0,
        generation=0,
        prompt_tokens=prompt,
        canvas_tokens=canvas,
        max_tokens=answer,
        arrived_at=0.0,
        decoding=found,
    )


@pytest.mark.parametrize(
    ("prompt", "answer", "traits", "expected"),
    [
        (5, 8, dict(), [(5, 9, 5, 9, 0), (9, 13, 9, 13, 1)]),
        (5, 4, dict(grid="start"), [(5, 8, 4, 8, 0), (8, 12, 8, 12, 1)]),
        (4, 4, dict(grid="start"), [(4, 8, 4, 8, 0)]),
        (
            5,
            8,
            dict(first_token=True),
            [(5, 6, 5, 9, 0, True), (6, 9, 5, 9, 0), (9, 10, 9, 13, 1, True), (10, 13, 9, 13, 1)],
        ),
        (
            6,
            4,
            dict(first_token=True, grid="start", part_length=2),
            [(6, 8, 4, 8, 0), (8, 9, 8, 12, 1, True), (9, 10, 8, 12, 1), (10, 12, 8, 12, 1)],
        ),
    ],
)
def test_the_parts_of_a_canvas(prompt, answer, traits, expected):
    wanted = request(prompt, answer, block_length=4, traits=FamilyTraits(**traits))
    assert parts(wanted) == [Part(*one) for one in expected]


traits = st.builds(
    FamilyTraits,
    attention=st.sampled_from(("full", "block", "causal")),
    grid=st.sampled_from(("prompt", "start")),
    first_token=st.booleans(),
    part_length=st.sampled_from((None, 1, 3, 8)),
    schedule=st.sampled_from(("even", "block", "mdlm", "dream")),
    steps_per_block=st.booleans(),
)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 40), traits)
def test_the_parts_hold_each_mask_once_from_left_to_right(prompt, answer, length, traits):
    wanted = request(prompt, answer, block_length=length, traits=traits)
    found, at = parts(wanted), prompt
    for part in found:
        assert part.start == at
        assert part.block_start <= part.start < part.end <= part.block_end
        at = part.end
    assert at == wanted.canvas_tokens
    assert [part.block for part in found] == sorted(part.block for part in found)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 20), st.integers(1, 64), traits)
def test_the_rules_that_count_fill_each_part(prompt, answer, length, steps, traits):
    wanted = request(prompt, answer, block_length=length, traits=traits, rule="steps", num_denoising_steps=steps)
    found = parts(wanted)
    for part, shares in zip(found, quotas_of(wanted, found), strict=True):
        assert sum(shares) == part.masks
        assert min(shares) >= 1


@given(st.integers(1, 64), st.integers(1, 128))
def test_the_schedule_of_dream_adds_up_too(masks, steps):
    shares = dream_shares(masks, steps)
    assert sum(shares) == masks
    assert min(shares) >= 1
    assert len(shares) <= min(masks, steps)


@pytest.mark.parametrize(
    ("total", "parts", "expected"), [(32, 32, [1] * 32), (32, 5, [7, 7, 6, 6, 6]), (3, 5, [1, 1, 1, 0, 0]), (8, 1, [8])]
)
def test_quotas_are_even_and_the_larger_come_first(total, parts, expected):
    assert even(total, parts) == expected


@pytest.mark.parametrize(
    ("masks", "steps", "expected"), [(32, 5, [6, 6, 7, 6, 7]), (8, 8, [1] * 8), (5, 1, [5]), (2, 40, [1, 1])]
)
def test_the_linear_schedule_rounds_half_to_even_and_leaves_out_empty_steps(masks, steps, expected):
    assert mdlm(masks, steps) == expected


@given(st.integers(1, 64), st.integers(1, 128))
def test_the_linear_schedule_adds_up(masks, steps):
    shares = mdlm(masks, steps)
    assert sum(shares) == masks
    assert min(shares) >= 1
    assert len(shares) <= min(masks, steps)


@given(st.integers(0, 2000), st.integers(1, 200))
def test_quotas_add_up_and_differ_by_one_at_most(total, parts):
    shares = even(total, parts)
    assert sum(shares) == total
    assert shares == sorted(shares, reverse=True)
    assert max(shares) - min(shares) <= 1


@given(st.integers(1, 500), st.integers(1, 50))
def test_every_block_gets_a_step(steps, blocks):
    assert len(steps_per_block(steps, blocks)) == blocks
    assert min(steps_per_block(steps, blocks)) >= 1


@pytest.mark.parametrize("steps", [1, 2, 5, 64, 333])
def test_the_times_of_dreams_schedule_are_those_of_torch(steps):
    assert np.array_equal(falling_times(steps), torch.linspace(1, 1e-3, steps + 1).numpy())


@given(st.integers(0, 20), st.integers(0, 30), st.integers(0, 12), st.integers(1, 8))
def test_queries_before_the_open_block_see_their_own_run_and_those_in_it_see_all(start, before, block, grain):
    """As an attention mask, and as the runs of a call that takes several."""
    origin, length = start + before, max(1, before + block)
    end = start + length
    seen = []
    for query in range(start, end):
        run_end = origin - (origin - query - 1) // grain * grain
        seen.append(end if query >= origin else min(run_end, end))
    expected = torch.arange(end) < torch.tensor(seen)[:, None]
    hidden = by_grain(PackedSpan(0, length, 0, end, grain, start - origin), torch.device("cpu"))
    columns = columns_of([Span(0, 0, 0, start, length, end, origin, end, 0, 0, grain, origin)])
    _, lengths, keys, _ = visible_keys(columns)
    assert torch.equal(hidden[0, 0] == 0, expected)
    assert np.repeat(keys, lengths).tolist() == seen
    found = []
    for queries, last, causal in zip(
        *(field.tolist() for field in visible_keys(columns, causal=True)[1:]), strict=True
    ):
        found += range(last - queries + 1, last + 1) if causal else [last] * queries
    assert found == seen
