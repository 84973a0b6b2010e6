"""The bundled model's tokenizer: bytes, marks, and the words that the tasks use over and over."""

import functools
import itertools
import random
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dilaserve.tasks.conversation import Conversation, Conversations
from dilaserve.tasks.everyday import CITIES, GOODS, PEOPLE, WORDS
from recipe.sizes import VOCAB

SPECIALS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "<|eot_id|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|unused|>",
)
BOS, EOS, MASK, EOT, USER, ASSISTANT, SYSTEM = range(256, 263)
ROLES = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
TEMPLATE = (
    "<|startoftext|>{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECES = r"[0-9]| ?\p{L}+| ?[^\s\p{L}0-9]+|\s"  # every digit by itself, words and signs with the space before them
LOOKED_AT = 30_000  # conversations whose words are counted
OFTEN = 60  # times that a word stands in them, to be a token
KEPT: list[Path] = []
MIX = {"add": 0.2, "chain": 0.22, "word": 0.13, "sort": 0.13, "reverse": 0.06, "json": 0.05, "compare": 0.08}
MIX |= {"contains": 0.13}


@functools.cache
def tokenizer() -> Tokenizer:
    """The tokenizer of `KEPT`, the checkpoint that a run goes on from, or a new one."""
    return Tokenizer.from_file(str(KEPT[0] / "tokenizer.json")) if KEPT else made_anew()


def made_anew() -> Tokenizer:
    """Id n < 256 is byte n, so that every text has ids.

    A word is a token as a whole or goes byte by byte (no merges), so that other words are always spelled out.
    """
    letters = bytes_to_unicode()
    vocab = {letters[byte]: byte for byte in range(256)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    first = 256 + len(SPECIALS)
    vocab |= {word: first + i for i, word in enumerate(common_words(made.pre_tokenizer, VOCAB - first))}
    marks = dict(zip(SPECIALS, range(256, first), strict=True))
    made.model = models.BPE(vocab=vocab | marks, merges=[], ignore_merges=True)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return made


def common_words(pieces: pre_tokenizers.PreTokenizer, most: int) -> list[str]:
    """Pieces of two characters or more that are frequent in conversations.

    Left out are words that people want spelled: a model does not see the letters of a token.
    """
    counts = Counter[str]()
    for conversation in itertools.islice(Conversations(random.Random(0), MIX), LOOKED_AT):
        for text in texts(conversation):
            counts.update({piece for piece, _ in pieces.pre_tokenize_str(text) if len(piece) > 1})
    for word in (*WORDS, *PEOPLE, *CITIES, *GOODS, "lamu"):
        counts.pop(word, None), counts.pop(f"\u0120{word}", None)
    return sorted(piece for piece, count in counts.most_common(most) if count >= OFTEN)


def texts(conversation: Conversation) -> list[str]:
    said = [message.content for message in conversation.messages]
    return [*said, conversation.text, conversation.answer]


def bytes_to_unicode() -> dict[int, str]:
    """The letter that byte-level tokenizers write for each byte (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def ids(text: str) -> list[int]:
    found: list[int] = tokenizer().encode(text, add_special_tokens=False).ids
    return found


def prompt_ids(conversation: Conversation) -> list[int]:
    """As the server writes it: by the chat template, or plain text as it is."""
    if not conversation.messages:
        return ids(conversation.text)
    found = [BOS]
    for role, content in conversation.messages:
        found += [ROLES[role], *ids(content), EOT]
    return [*found, ASSISTANT]
