"""Between text and token ids: encoding, the chat template, and decoding."""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import DecodeStream

from dilaserve.errors import BadRequest, CheckpointError, DilaserveError, RequestFailed, shortened
from dilaserve.system import files
from dilaserve.tokenizer import byte_level_bpe
from dilaserve.tokenizer.chat_template import ChatTemplate, find, shown
from dilaserve.tokenizer.panics import contained
from dilaserve.tokenizer.template_process import Reply

log = logging.getLogger(__name__)
TURN_ENDS = (
    "<|eot_id|>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|role_end|>",
)  # tokens that end a turn, where a model has them
UNFINISHED = "\ufffd"  # what a decoder shows for part of a character
LONGEST = 2**18  # characters, or ids, that are encoded or decoded at once, if the canvas does not hold more
DENSE = 64  # characters a token, more than texts have
COMPOSED = (
    4  # characters that NFC joins into one, at most: so many are in the longest canonical decomposition (UAX #15)
)
MARKS = 64  # characters that a message costs besides what it holds
LONG = 16384  # characters, or ids, from which the interpreter's lock is let go


class Text:
    """A checkpoint's tokenizer and chat template. Encoding and decoding are safe from several threads."""

    def __init__(self, directory: Path, chat_template: str | Path | None = None) -> None:
        self.directory, self.given = directory, chat_template  # what --chat-template says; see `chat_template.find`
        self.tokenizer = read_tokenizer(directory)
        self.longest = longest_token(self.tokenizer)
        self.template: ChatTemplate | None = None
        self.untemplated = "its chat template is not loaded yet"  # why there is no template
        self.closed = False

    def load_template(self) -> None:
        """Read the chat template and try it; takes a second. Raises `CheckpointError` for one that is broken."""
        found = find(self.directory, self.given)
        if isinstance(found, str):
            self.untemplated = found
            log.warning("%s serves no chats: %s", self.directory, found)
            return
        self.template = ChatTemplate(found)
        if self.closed:  # meanwhile
            self.template.close()
        else:
            self.try_template(self.template)

    def try_template(self, template: ChatTemplate) -> None:
        """A template that is broken is found here, and not by the first who chats."""
        reply = template.render([{"role": "user", "content": "Hello"}])
        if reply.text is not None:
            return
        where = shown(self.given or self.directory)
        if not reply.on_purpose:  # else the template may want other messages
            raise CheckpointError(f"the chat template in {where} is broken: {reply.reason}")
        log.warning("the chat template in %s rejects a single message: %s", where, reply.reason)

    def close(self) -> None:
        """End what renders the chat template; blocks for a moment."""
        self.closed = True
        if self.template:
            self.template.close()

    def highest_id(self) -> int:
        return max(self.tokenizer.get_vocab().values(), default=0)

    def stop_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a turn: those that do so in many models, and the tokenizer's own."""
        found = {token: self.tokenizer.token_to_id(token) for token in (*TURN_ENDS, *end_tokens(self.directory))}
        for token in (token for token, id in found.items() if id is None and token not in TURN_ENDS):
            log.warning("the tokenizer in %s does not know its own eos_token %r", self.directory, token)
        return tuple(id for id in found.values() if id is not None)

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Raises `BadRequest` for a text that has more than `limit` tokens for sure, before any work."""
        return self.ids(text, limit, True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], limit: int | None = None) -> list[int]:
        """The rendered conversation with the mark that opens the assistant's turn; raises `BadRequest`."""
        return self.ids(self.render(messages, limit), limit, False)

    def ids(self, text: str, limit: int | None, special: bool) -> list[int]:
        """The library holds the interpreter's lock while it encodes, except in batches. Those wait for its threads,
        and with them for other long texts, so that short ones do without.
        """
        if limit is not None and self.longest is not None and len(text) > limit * self.longest:
            raise BadRequest(
                f"this model's maximum context length is {limit} tokens, and a prompt of {len(text)} characters leaves "
                "no room for an answer; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        check_length(len(text), limit)
        with tokenizing():
            if len(text) < LONG:
                return list(self.tokenizer.encode(text, add_special_tokens=special).ids)
            return list(self.tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)

    def render(self, messages: Sequence[Mapping[str, str]], limit: int | None = None) -> str:
        """The conversation as the chat template writes it. Blocking; raises `BadRequest`."""
        return accepted(self.template_for(messages, limit).render(messages))

    def knows_role(self, role: str) -> bool:
        """Whether the chat template speaks of this role."""
        return self.template is not None and role in self.template.source.template

    async def rendered(self, messages: Sequence[Mapping[str, str]], limit: int | None = None) -> str:
        """`render` without blocking."""
        return accepted(await self.template_for(messages, limit).rendered(messages))

    def template_for(self, messages: Sequence[Mapping[str, str]], limit: int | None) -> ChatTemplate:
        """The template, if there is one and the conversation is not too long to be rendered."""
        if self.template is None:
            raise BadRequest(
                f"this model serves no chats: {self.untemplated}, or use /v1/completions", param="messages"
            )
        check_length(sum(map(characters, messages)), limit)
        return self.template

    def decode(self, ids: Iterable[int]) -> str:
        """Text without special tokens."""
        listed = list(ids)
        with tokenizing():
            if len(listed) < LONG:
                return str(self.tokenizer.decode(listed, skip_special_tokens=True))
            return str(self.tokenizer.decode_batch([listed], skip_special_tokens=True)[0])

    def decode_more(self, stream: DecodeStream, ids: list[int]) -> str | None:
        """The next piece of a text that is decoded as it grows; None while it ends within a character."""
        with tokenizing():
            piece: str | None = stream.step(self.tokenizer, ids)
            return piece


@contextlib.contextmanager
def tokenizing() -> Iterator[None]:
    """Whatever the tokenizers library raises fails the one request, and is logged; a panic too."""
    try:
        with contained():
            yield
    except DilaserveError:
        raise
    except Exception as error:
        log.exception("the tokenizer has failed")
        raise RequestFailed(
            "the tokenizer failed on this request; the log says why", code="tokenizer_failed"
        ) from error


def check_length(length: int, limit: int | None) -> None:
    """No text is worked on that no canvas of `limit` tokens holds; raises `BadRequest`."""
    if length > (most := max(LONGEST, DENSE * (limit or 0))):
        raise BadRequest(
            f"a text of {length} characters is too long; send at most {most} at a time",
            param="prompt",
            code="context_length_exceeded",
        )


def characters(message: Mapping[str, Any]) -> int:
    """How much there is to render of a message."""
    return MARKS + sum(len(value) for value in message.values() if isinstance(value, str))


def accepted(reply: Reply) -> str:
    if reply.text is None:
        raise BadRequest(f"the chat template rejects these messages: {shortened(reply.reason)}", param="messages")
    return reply.text


def read_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory, without what was set in it for training alone. Raises `CheckpointError`."""
    file = directory / "tokenizer.json"
    try:
        if files.present(file):
            tokenizer = from_file(file)
        elif byte_level_bpe.present(directory):
            tokenizer = byte_level_bpe.read(directory)
        elif not files.present(directory):
            raise CheckpointError(f"there is no model directory {directory}")
        else:
            raise CheckpointError(f"{directory} holds no tokenizer.json, nor vocab.json and merges.txt in its place")
    except OSError as error:
        raise CheckpointError(f"{error.filename or file} cannot be read: {error.strerror}") from error
    tokenizer.no_truncation()  # as transformers does with both at every call
    tokenizer.no_padding()
    return tokenizer


def from_file(file: Path) -> Tokenizer:
    """Raises `CheckpointError`, and `OSError` for a file that cannot be read."""
    files.size(file, files.MOST_TABLE)
    try:
        with contained():
            return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def end_tokens(directory: Path) -> list[str]:
    """The tokenizer's own end tokens, by the files where they may stand, as text or as a token with its traits."""
    found = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = files.read_json_if_present(directory / name).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token and not isinstance(token, str):
            raise CheckpointError(f"{directory / name}: eos_token must be a token's text")
        found += [token] if token else []
    return list(dict.fromkeys(found))


def longest_token(tokenizer: Tokenizer) -> int | None:
    """Characters of text that one token stands for, at most; None where no such bound is known.

    There is one where every byte of a text comes out in some token: byte-level BPE that has all bytes, so that a token
    is spelled with one letter a byte, behind nothing that drops, joins or swallows characters. NFC does join some.
    """
    model, cuts = tokenizer.model, tokenizer.truncation is not None
    composes = isinstance(tokenizer.normalizer, normalizers.NFC)
    normalizes = tokenizer.normalizer is not None and not composes
    if normalizes or cuts or not isinstance(model, models.BPE) or tokenizer.pre_tokenizer is None:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    stages = json.loads(tokenizer.pre_tokenizer.__getstate__())
    stages = stages["pretokenizers"] if stages["type"] == "Sequence" else [stages]
    kinds = [stage["type"] for stage in stages]
    if kinds.count("ByteLevel") != 1 or not set(kinds) <= {"ByteLevel", "Split", "Digits"}:
        return None
    if any(stage.get("behavior") == "Removed" for stage in stages):
        return None
    added = tokenizer.get_added_tokens_decoder().values()
    letters = pre_tokenizers.ByteLevel.alphabet()
    if any(token.lstrip or token.rstrip for token in added) or not tokenizer.get_vocab(False).keys() >= set(letters):
        return None
    return max(map(len, tokenizer.get_vocab())) * (COMPOSED if composes else 1)
