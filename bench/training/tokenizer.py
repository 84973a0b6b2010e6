"""The tokenizer of the bundled model: bytes, marks, and the words that its tasks use over and over."""

import functools
import random
from collections import Counter

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from dilaserve.profile.problems import TASKS, training
from training.network import VOCAB

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
BOS, EOS, MASK, EOT, USER, ASSISTANT = range(256, 262)
TEMPLATE = (
    "<|startoftext|>{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECES = r"[0-9]| ?\p{L}+| ?[^\s\p{L}0-9]+|\s"  # every digit by itself, words and signs with the space before them


@functools.cache
def tokenizer() -> Tokenizer:
    """Bytes, marks, and the words that the tasks use over and over; id n < 256 is byte n, so that every text has ids.

    A word is a token as a whole or goes byte by byte (no merges), so that made-up words are always spelled out.
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
    words = common_words(made.pre_tokenizer, VOCAB - 256 - len(SPECIALS))
    vocab |= {word: 256 + len(SPECIALS) + i for i, word in enumerate(words)}
    made.model = models.BPE(
        vocab=vocab | dict(zip(SPECIALS, range(256, 264), strict=True)), merges=[], ignore_merges=True
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return made


def common_words(pieces: pre_tokenizers.PreTokenizer, most: int) -> list[str]:
    """Pieces of two characters or more that stand in at least one of 400 problems of a task, made-up words aside."""
    rng, counts = random.Random(0), Counter[str]()
    for name in TASKS:
        stream = training(name, rng, lambda: 1.0)
        for _ in range(2000):
            problem = next(stream)
            for text in (problem.prompt, problem.answer):
                counts.update({piece for piece, _ in pieces.pre_tokenize_str(text) if len(piece) > 1})
    return sorted(piece for piece, count in counts.most_common(most) if count >= 5 * len(TASKS))


def bytes_to_unicode() -> dict[int, str]:
    """The letter that byte-level tokenizers write for each byte (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
