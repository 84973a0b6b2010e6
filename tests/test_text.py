"""Text out of tokens: once, in order, whole characters, and no piece of a stop string."""

import checkpoints
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dilaserve.errors import BadRequest, CheckpointError
from dilaserve.text import Detokenizer, StopStrings, Text

UNICODE = "plain, ümläut, 漢字, 👩‍👩‍👧, é"


@pytest.fixture(scope="module")
def text(random_model):
    found = Text(random_model)
    found.load_template()
    return found


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
    assert detokenizer.push(text.encode("a") + first) == ""
    assert detokenizer.flush() == "a\ufffd"


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


def test_the_chat_template_marks_the_turns(text):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    ids = text.encode_chat(messages)
    assert ids[0] == checkpoints.BOS
    assert ids.count(checkpoints.EOT) == 2
    assert text.render(messages).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_model_without_a_template_says_so(tmp_path, random_model):
    (tmp_path / "tokenizer.json").write_text((random_model / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    text = Text(tmp_path)
    text.load_template()
    with pytest.raises(BadRequest, match="no chat template"):
        text.encode_chat([{"role": "user", "content": "hi"}])


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        Text(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Text(tmp_path)
