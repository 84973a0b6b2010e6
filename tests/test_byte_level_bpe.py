"""Tokenizers published as vocab.json and merges.txt: the same ids as transformers and as a plain loop."""

import json
import random
from pathlib import Path

import pytest
import slow_bpe
from http_requests import CHAT, EIGHT, client_of, post
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from dilaserve import models
from dilaserve.errors import CheckpointError
from dilaserve.models.checkpoint import Checkpoint
from dilaserve.tokenizer.detokenizer import Detokenizer
from dilaserve.tokenizer.tokenizer import Text

TEXTS = [
    "",
    " ",
    "   \n  \n\n x  ",
    "Hello, world!",
    "the quick brown fox isn't lazy; WE'LL see, They'Ve DONE it, I'M sure y'all'd know 'S",
    "12345 67890 3.14159 1,000,000 ½ ² ①",
    "cafe\u0301 naïve \u1100\u1161\u11a8 Å Å \u0344 ﬁ",  # NFC composes these, and keeps the ligature
    "漢字とひらがな 한국어 العربية हिन्दी 👩‍👩‍👧 🙂",
    "tabs\t\tand\r\nlines\n\n\n\nmore   ",
    "def f(x):\n    return x**2  # comment\n",
    "\u00a0non\u2003breaking\u200bspaces\ufeff",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|mask|><|mask|> b <tool_call>{}</tool_call> <|im_start |> <|imstart|>",
    "e\u0301<|endoftext|>\u0301e",
    "\x00\x01\x7f\ud7ff",
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return slow_bpe.write(tmp_path_factory.mktemp("models") / "bpe")


@pytest.fixture(scope="module")
def text(directory):
    found = Text(directory)
    found.load_template()
    yield found
    found.close()


@pytest.fixture(scope="module")
def slow(directory):
    return slow_bpe.SlowBPE(directory)


@pytest.mark.parametrize("written", TEXTS)
def test_the_ids_are_those_of_transformers_and_of_a_plain_loop(written, directory, text, slow):
    theirs = Qwen2Tokenizer.from_pretrained(directory)
    ids = text.encode(written)
    assert ids == theirs(written).input_ids == slow.encode(written)
    assert text.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == slow.decode(ids)


PARTS = st.sampled_from(
    ["'s", "'LL", " ", "\n", "\r\n", "é", "e\u0301", "漢", "7", "²", "the", "Ω", "!!", *slow_bpe.SPECIALS]
)


# Python's NFC and the library's are of different releases of Unicode, which differ in characters that are new.
ASSIGNED = st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=8)


@given(st.lists(st.one_of(PARTS, ASSIGNED), max_size=12).map("".join), st.data())
def test_any_text_has_the_ids_of_the_plain_loop_and_comes_back_however_it_is_cut(text, slow, written, data):
    ids = text.encode(written)
    assert ids == slow.encode(written)
    detokenizer, out, rest = Detokenizer(text), "", ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        out += detokenizer.push(rest[:size])
        rest = rest[size:]
    assert out + detokenizer.flush() == slow.decode(ids)


def test_any_ids_are_decoded_as_by_the_plain_loop_whole_and_in_pieces(text, slow):
    """A diffusion model writes ids that no encoder would, such as parts of characters."""
    rng = random.Random(3)
    for _ in range(200):
        ids = [rng.randrange(text.highest_id() + 1) for _ in range(rng.randint(1, 12))]
        detokenizer = Detokenizer(text)
        assert text.decode(ids) == slow.decode(ids)
        assert "".join(detokenizer.push([id]) for id in ids) + detokenizer.flush() == slow.decode(ids)


def test_the_tables_of_an_older_release_give_the_same_tokenizer(directory, tmp_path, text):
    """Without `added_tokens_decoder` ids stand in added_tokens.json and special tokens in special_tokens_map.json."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    table = {token["content"]: int(id) for id, token in config.pop("added_tokens_decoder").items()}
    (tmp_path / "added_tokens.json").write_text(json.dumps(dict(reversed(table.items()))))
    special = {"eos_token": {"content": config.pop("eos_token")}, "mask_token": config.pop("mask_token")}
    special["additional_special_tokens"] = [{"content": one} for one in config.pop("additional_special_tokens")]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    old = Text(tmp_path)
    for written in TEXTS:
        assert old.encode(written) == text.encode(written)
        assert old.decode(old.encode(written)) == text.decode(text.encode(written))
    assert old.stop_ids() == text.stop_ids()


def test_the_chat_template_and_the_end_tokens_are_those_of_the_configuration(text, slow):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hé?"}]
    written = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhé?<|im_end|>\n<|im_start|>assistant\n"
    assert text.encode_chat(messages) == slow.encode(written)
    assert set(text.stop_ids()) == {slow.added["<|im_end|>"], slow.added["<|endoftext|>"]}


def change(directory, tmp_path, name, value):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if isinstance(value, dict):
        value = json.dumps(json.loads((directory / name).read_text()) | value)
    (tmp_path / name).write_text(value)
    return tmp_path


GAP = {"added_tokens_decoder": {"700": {"content": "<|mask|>", "special": True}}}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tokenizer_config.json", GAP, r"<\|mask\|> of .* would get the id 550, but its files say 700"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, None),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "must be an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "a whole number as its id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"550": {"content": ""}}}, "must have a content"),
        ("tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"}, "'GPT2Tokenizer' is none of .*save_pretrained"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("vocab.json", "{", r"vocab\.json and merges\.txt in .* cannot be read"),
        ("vocab.json", '{"a": 0}', r"vocab\.json and merges\.txt in .* cannot be read"),
        ("merges.txt", "#version: 0.2\n", None),
        ("merges.txt", "#version: 0.2\nnowhere tobefound\n", r"vocab\.json and merges\.txt in .* cannot be read"),
        ("merges.txt", "a\n", r"vocab\.json and merges\.txt in .* cannot be read"),
    ],
)
def test_files_that_do_not_fit_each_other_are_named(directory, tmp_path, name, value, words):
    changed = change(directory, tmp_path, name, value)
    if words is None:  # a tokenizer all the same
        assert Text(changed).encode("a") == Text(directory).encode("a")
        return
    with pytest.raises(CheckpointError, match=words):
        Text(changed)


def test_a_vocabulary_that_lacks_bytes_is_named(directory, tmp_path):
    changed = change(directory, tmp_path, "merges.txt", "")
    (changed / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(CheckpointError, match=r"vocab\.json has no token for 255 of the 256 bytes"):
        Text(changed)


def test_a_file_that_is_none_is_named(directory, tmp_path):
    changed = change(directory, tmp_path, "merges.txt", "")
    (changed / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json, nor vocab\.json and merges\.txt"):
        Text(changed)
    with pytest.raises(CheckpointError, match=r"^there is no model directory /nowhere$"):
        Text(Path("/nowhere"))
    (changed / "merges.txt").mkdir()
    with pytest.raises(CheckpointError, match=r"merges\.txt cannot be read: it is not a regular file"):
        Text(changed)


def test_a_mask_token_is_found_in_the_table_of_added_tokens(tmp_path):
    model = slow_bpe.make(tmp_path / "model")
    assert Checkpoint(model).added_token("<|mdm_mask|>") == 258
    with pytest.raises(CheckpointError, match=r"no token <\|mask\|> was added to the tokenizer"):
        Checkpoint(model).added_token("<|mask|>")


async def test_a_model_with_such_a_tokenizer_answers_over_http(tmp_path):
    model = slow_bpe.make(tmp_path / "model")
    assert models.describe(Checkpoint(model)).mask_id == 258
    async with client_of(model) as client:
        question = EIGHT | {"messages": [{"role": "user", "content": "Héllo"}]}
        status, answer, _ = await post(client, CHAT, question)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 8)
        async with client.post("/tokenize", json={"prompt": "a<|eot_id|>é"}) as counted:
            assert (await counted.json())["count"] == 4
