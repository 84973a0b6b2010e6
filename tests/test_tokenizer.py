"""Text out of tokens: once, in order, whole characters, and no piece of a stop string."""

import json
import sys
import threading
import unicodedata

import checkpoints
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dilaserve.errors import BadRequest, CheckpointError
from dilaserve.tokenizer.detokenizer import Detokenizer
from dilaserve.tokenizer.stop_strings import StopStrings
from dilaserve.tokenizer.tokenizer import COMPOSED, LONG, LONGEST, Text, longest_token

UNICODE = "plain, ümläut, 漢字, 👩‍👩‍👧, é"


@pytest.fixture(scope="module")
def text(random_model):
    found = Text(random_model)
    found.load_template()
    yield found
    found.close()


@given(st.text(max_size=40), st.data())
def test_text_comes_out_whole_however_the_tokens_are_cut(text, wanted, data):
    ids, out = Detokenizer(text), []
    encoded = text.encode(wanted.replace("<|", ""))
    while encoded:
        size = data.draw(st.integers(1, len(encoded)))
        out.append(ids.push(encoded[:size]))
        encoded = encoded[size:]
    assert "".join(out) + ids.flush() == wanted.replace("<|", "")
    assert not any("\ufffd" in piece for piece in out)


def test_part_of_a_character_waits_for_the_rest(text):
    ids, detokenizer = text.encode("é漢"), Detokenizer(text)
    assert [detokenizer.push([id]) for id in ids] == ["", "é", "", "", "漢"]


def test_broken_bytes_come_out_at_the_end(text):
    detokenizer = Detokenizer(text)
    first = text.encode("漢")[:1]
    assert detokenizer.push(text.encode("a") + first) == "a"
    assert detokenizer.flush() == "\ufffd"


@given(st.text(max_size=30), st.data())
def test_what_is_shown_of_some_tokens_does_not_depend_on_how_many_come_together(text, wanted, data):
    ids = text.encode(wanted.replace("<|", ""))
    ids, singly, together = ids[: data.draw(st.integers(0, len(ids)))], Detokenizer(text), Detokenizer(text)
    shown = "".join([singly.push([id]) for id in ids])
    cut = data.draw(st.integers(0, len(ids)))
    assert together.push(ids[:cut]) + together.push(ids[cut:]) == shown
    assert together.flush() == singly.flush()


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_text_is_cut_at_the_stop_string_that_is_complete_first_and_none_of_it_leaks(whole, stops, data):
    filtered, shown, rest = StopStrings(stops), "", whole
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown += filtered.push(rest[:size])
        rest = rest[size:]
        assert not any(stop in shown for stop in stops)
    shown += filtered.flush()
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    assert filtered.found == bool(ends)
    assert shown == (whole[: min(ends)[1]] if ends else whole)


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=16),
    st.booleans(),
    st.integers(0, 20),
    st.data(),
)
def test_stop_strings_that_end_in_what_is_passed_over_do_not_count(whole, stops, include, early, data):
    filtered, shown, rest = StopStrings(stops, include), "", whole
    while rest:
        spared = early - (len(whole) - len(rest))
        size = data.draw(st.integers(1, min(spared, len(rest)) if spared > 0 else len(rest)))
        shown += (filtered.pass_over if spared > 0 else filtered.push)(rest[:size])
        rest = rest[size:]
    shown += filtered.flush()
    places = [(at + len(stop), at) for stop in stops for at in range(len(whole)) if whole.startswith(stop, at)]
    end, start = min((place for place in places if place[0] > early), default=(len(whole), len(whole)))
    assert filtered.found == any(place[0] > early for place in places)
    assert shown == whole[: end if include else start]


def test_the_chat_template_marks_the_turns(text):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    ids = text.encode_chat(messages)
    assert ids[0] == checkpoints.BOS
    assert ids.count(checkpoints.EOT) == 2
    assert text.render(messages).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_missing_or_broken_tokenizer_is_named(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        Text(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Text(tmp_path)
    panics = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(text.tokenizer.to_str()) | panics))
    with pytest.raises(CheckpointError, match="cannot be read: the library panicked: Precompiled"):
        Text(tmp_path)


def test_a_long_text_lets_other_threads_run_and_is_the_same_tokens(text):
    long, go, ran = "hello wörld " * LONG, threading.Lock(), []
    go.acquire()
    other = threading.Thread(target=lambda: ran.append(go.acquire()))
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # nobody runs unless somebody lets go
    try:
        go.release()
        ids = text.encode(long)
        assert ran
    finally:
        sys.setswitchinterval(interval)
    other.join()
    assert ids == text.encode("hello wörld ") * LONG
    assert text.decode(ids) == long


def test_a_text_that_is_too_long_for_sure_is_refused_before_it_is_encoded(text):
    longest = len("<|start_header_id|>")
    assert text.longest == longest
    assert len(text.encode("a" * 8 * longest, 8)) == 8 * longest
    assert len(text.encode("a" * 1000)) == 1000
    with pytest.raises(BadRequest, match="no room") as caught:
        text.encode("a" * (8 * longest + 1), 8)
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    with pytest.raises(BadRequest, match="no room"):
        text.encode_chat([{"role": "user", "content": "a" * 8 * longest}], 8)


def test_no_text_is_encoded_that_is_longer_than_any_canvas(text):
    with pytest.raises(BadRequest, match=f"send at most {LONGEST} at a time"):
        text.encode("a" * (LONGEST + 1))


@pytest.mark.parametrize("state", ["enable_truncation", "enable_padding"])
def test_what_training_set_in_the_tokenizer_changes_no_prompt(tmp_path, text, state):
    """transformers sets both anew at every call; the library obeys what was saved."""
    saved = Tokenizer.from_str(text.tokenizer.to_str())
    saved.enable_truncation(4) if state == "enable_truncation" else saved.enable_padding(length=64)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert Text(tmp_path).encode("hello world") == text.encode("hello world")
    assert Text(tmp_path).longest == text.longest


def byte_level(**changes) -> Tokenizer:
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    found = Tokenizer(changes.pop("model", models.BPE(vocab=letters | {"Ġa": 256}, merges=[("Ġ", "a")])))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for name, value in changes.items():
        setattr(found, name, value)
    return found


@given(st.text(max_size=40))
def test_no_token_stands_for_more_characters_than_the_longest(written):
    tokenizer = byte_level()
    assert longest_token(tokenizer) == 2
    assert len(written) <= 2 * len(tokenizer.encode(written).ids)


def test_nfc_joins_four_characters_at_most():
    """Each character of a text gives one or more of NFD, and each of NFC is four of those or fewer."""
    assert max(len(unicodedata.normalize("NFD", chr(code))) for code in range(sys.maxunicode + 1)) == COMPOSED
    tokenizer = byte_level(normalizer=normalizers.NFC())
    assert longest_token(tokenizer) == 2 * COMPOSED
    greek = "\u03b1\u0313\u0300\u0345" * 10
    assert len(tokenizer.encode(greek).ids) == 30
    assert len(greek) <= 2 * COMPOSED * 30


@given(st.text(st.sampled_from("aé\u0301\u0323\u1100\u1161\u11a8漢Å"), max_size=40))
def test_no_token_stands_for_more_than_the_longest_behind_nfc(written):
    tokenizer = byte_level(normalizer=normalizers.NFC())
    assert len(written) <= 2 * COMPOSED * len(tokenizer.encode(written).ids)


def test_tokenizers_that_swallow_text_have_no_longest_token():
    stages = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
    assert longest_token(byte_level(pre_tokenizer=pre_tokenizers.Sequence(stages))) is None
    assert longest_token(byte_level(pre_tokenizer=pre_tokenizers.Whitespace())) is None
    assert longest_token(byte_level(normalizer=normalizers.NFKC())) is None
    assert longest_token(byte_level(model=models.BPE(vocab={"a": 0}, merges=[]))) is None
    assert longest_token(byte_level(model=models.WordLevel(vocab={"a": 0}, unk_token="a"))) is None
    cut, swallowing = byte_level(), byte_level()
    cut.enable_truncation(8)
    swallowing.add_tokens([AddedToken("<gap>", rstrip=True)])
    assert (longest_token(cut), longest_token(swallowing)) == (None, None)
