"""What a caller may ask for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.config import DecodeConfig
from dilaserve.engine.slo_classes import parse_classes
from dilaserve.engine.submit import Options, resolve, validated
from dilaserve.errors import BadRequest, ConfigError
from dilaserve.types.families import FamilyTraits

DEFAULTS = DecodeConfig()


def settled(prompt_tokens=10, limit=512, **wishes):
    return resolve(validated(Options(**wishes)), prompt_tokens, limit, 123, DEFAULTS)


def test_defaults_fill_what_is_left_open():
    found = settled()
    assert (found.canvas_tokens, found.max_tokens) == (10 + 128, 128)
    assert (found.decoding.rule, found.decoding.confidence_threshold, found.decoding.cache) == (
        "threshold",
        0.9,
        "dual",
    )
    assert found.decoding.seed == 123


def test_the_answer_is_rounded_up_to_blocks_where_there_is_room():
    assert settled(max_tokens=33).canvas_tokens == 10 + 64
    assert settled(limit=60, max_tokens=33).canvas_tokens == 60
    assert settled(limit=60).max_tokens == 50


@pytest.mark.parametrize(
    ("wishes", "rule"),
    [
        (dict(confidence_threshold=0.5), "threshold"),
        (dict(num_denoising_steps=16), "steps"),
        (dict(factor=1.5), "factor"),
        (dict(decode="factor"), "factor"),
    ],
)
def test_the_unmasking_rule_follows_from_the_option_given(wishes, rule):
    assert settled(**wishes).decoding.rule == rule


@pytest.mark.parametrize(
    ("wishes", "param"),
    [
        (dict(max_tokens=0), "max_tokens"),
        (dict(max_tokens=503), "max_tokens"),
        (dict(max_tokens=10**12), "max_tokens"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=2.5), "temperature"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"),
        (dict(seed=2**70), "seed"),
        (dict(confidence_threshold=1.5), "confidence_threshold"),
        (dict(block_length=0), "block_length"),
        (dict(num_denoising_steps=3), "num_denoising_steps"),
        (dict(num_denoising_steps=0), "num_denoising_steps"),
        (dict(top_k=-2), "top_k"),
        (dict(min_p=1.5), "min_p"),
        (dict(max_tokens=8, min_tokens=9), "min_tokens"),
        (dict(min_tokens=503), "min_tokens"),
        (dict(stop_token_ids=(1,) * 33), "stop_token_ids"),
        (dict(decode="steps"), "num_denoising_steps"),
        (dict(confidence_threshold=0.5, num_denoising_steps=8), "num_denoising_steps"),
        (dict(decode="factor", confidence_threshold=0.5), "confidence_threshold"),
        (dict(stop=("a",) * 17), "stop"),
        (dict(stop=("",)), "stop"),
        (dict(stop="end"), "stop"),
        (dict(max_tokens=10**400), "max_tokens"),
        (dict(user="t" * 513), "user"),
        (dict(refresh_interval=-1), "refresh_interval"),
    ],
)
def test_what_cannot_be_honoured_is_named(wishes, param):
    with pytest.raises(BadRequest) as caught:
        settled(**wishes)
    assert caught.value.param == param


def test_more_steps_than_tokens_are_one_token_a_step():
    assert settled(max_tokens=32, num_denoising_steps=10**12).decoding.num_denoising_steps == 32


def test_an_answer_without_a_limit_is_as_long_as_it_must_be():
    assert settled(min_tokens=200).max_tokens == 200


def test_sixteen_stop_strings_are_allowed():
    settled(stop=("a",) * 16)


@pytest.mark.parametrize("wishes", [dict(max_tokens=503), dict()])
def test_what_is_too_long_is_told_in_the_words_that_gateways_look_for(wishes):
    with pytest.raises(BadRequest, match="maximum context length is 512 tokens") as caught:
        settled(10 if wishes else 512, **wishes)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("prompt_tokens", [0, 512, 600])
def test_a_prompt_must_leave_room(prompt_tokens):
    with pytest.raises(BadRequest) as caught:
        settled(prompt_tokens)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("text", ["a=0x", "a=0ms", "a=1e3x", "a", "a=2x,a=3x", "a=" + "9" * 400 + "x", "=2x", "a=2x*0"])
def test_classes_without_a_deadline_in_time_are_named(text):
    with pytest.raises(ConfigError, match="--slo-class"):
        parse_classes(text)


@given(
    st.integers(1, 600),
    st.integers(2, 600),
    st.builds(
        Options,
        max_tokens=st.none() | st.integers(-5, 700),
        block_length=st.none() | st.integers(-2, 700),
        num_denoising_steps=st.none() | st.integers(-2, 700),
    ),
)
def test_a_settled_canvas_always_fits(prompt_tokens, limit, options):
    try:
        found = resolve(validated(options), prompt_tokens, limit, 0, DEFAULTS)
    except BadRequest:
        return
    assert prompt_tokens + found.max_tokens <= found.canvas_tokens <= limit


@given(
    st.sampled_from(("prompt", "start")),
    st.integers(1, 600),
    st.integers(2, 600),
    st.integers(1, 700) | st.just(2**31),
    st.none() | st.integers(1, 64),
)
def test_a_block_is_no_longer_than_the_canvas_and_its_grid_stays(grid, prompt_tokens, limit, length, max_tokens):
    traits, options = FamilyTraits(attention="block", grid=grid), Options(max_tokens=max_tokens, block_length=length)
    try:
        found = resolve(validated(options), prompt_tokens, limit, 0, DEFAULTS, traits)
    except BadRequest:
        return
    origin = prompt_tokens if grid == "prompt" else 0
    asked, taken = (set(range(origin, found.canvas_tokens, one)) for one in (length, found.decoding.block_length))
    assert found.decoding.block_length <= found.canvas_tokens
    assert taken == asked
