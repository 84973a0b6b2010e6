"""A byte-level BPE tokenizer in plain Python, as published for vocab.json and merges.txt, and a directory with one.

Nothing here calls the tokenizers library except to train the tiny vocabulary.
"""

import functools
import json
import unicodedata
from pathlib import Path

import checkpoints
import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog, isn't it? We'll see what they've done; I'm sure you'd know.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n",
    "schöne Grüße aus Köln, déjà vu, naïve façade, año nuevo, Ελληνικά γράμματα, русский текст",
    "漢字とひらがなとカタカナ、한국어 텍스트, العربية, हिन्दी, 👩‍👩‍👧 🙂🙃",
    "123 4567 3.14159 1,000,000 x=42;  y  =  7\t\ttabs\r\nlines\n\n\nmore",
] * 3
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
PLAIN = ("<tool_call>", "</tool_call>")  # added, but no special tokens
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIELDS = {
    "tokenizer_class": "DreamTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    "bos_token": "<|beginoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "mask_token": "<|mask|>",
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "chat_template": TEMPLATE,
}


def write(directory: Path, size: int = 600) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json as Dream has them, trained on a few lines."""
    directory.mkdir(parents=True, exist_ok=True)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    found = json.loads(trained.to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(found["vocab"]))
    merges = [" ".join(pair) for pair in found["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    first = len(found["vocab"])
    traits = dict(lstrip=False, rstrip=False, normalized=False, single_word=False)
    table = {
        str(first + i): {"content": token, "special": token in SPECIALS, **traits}
        for i, token in enumerate((*SPECIALS, *PLAIN))
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(FIELDS | {"added_tokens_decoder": table}))
    return directory


def make(directory: Path) -> Path:
    """A whole tiny checkpoint whose tokenizer is one letter a byte in the two files, ids as `checkpoints.make` has."""
    checkpoints.make(directory)
    fast = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(fast["model"]["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    table = {str(token.pop("id")): token for token in fast["added_tokens"]}
    about = json.loads((directory / "tokenizer_config.json").read_text())
    about |= {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": table}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    return directory


def letters() -> dict[int, str]:
    """GPT-2's letter for each byte: itself where it can be printed, else one from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class SlowBPE:
    """Encodes and decodes as the published Python class does."""

    def __init__(self, directory: Path) -> None:
        self.vocabulary = json.loads((directory / "vocab.json").read_text())
        lines = (directory / "merges.txt").read_text().split("\n")[1:]
        self.ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines) if line}
        table = json.loads((directory / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        self.added = {token["content"]: int(id) for id, token in table.items()}
        self.special = {int(id) for id, token in table.items() if token["special"]}
        self.texts = {id: token for token, id in self.vocabulary.items()}
        self.bytes = {letter: byte for byte, letter in letters().items()}

    def encode(self, text: str) -> list[int]:
        cut = regex.split("(" + "|".join(map(regex.escape, sorted(self.added, key=len, reverse=True))) + ")", text)
        ids: list[int] = []
        for part in cut:
            if part in self.added:
                ids.append(self.added[part])
                continue
            for piece in regex.findall(PIECES, unicodedata.normalize("NFC", part)):
                ids += [self.vocabulary[token] for token in self.merged(piece)]
        return ids

    @functools.cache  # noqa: B019
    def merged(self, piece: str) -> list[str]:
        word = [letters()[byte] for byte in piece.encode()]
        while len(word) > 1:
            rank, at = min((self.ranks.get((word[i], word[i + 1]), 10**9), i) for i in range(len(word) - 1))
            if rank == 10**9:
                break
            word[at : at + 2] = [word[at] + word[at + 1]]
        return word

    def decode(self, ids: list[int]) -> str:
        """Without special tokens."""
        out, names = b"", {id: token for token, id in self.added.items()}
        for id in ids:
            if id in self.special:
                continue
            out += names[id].encode() if id in names else bytes(self.bytes[letter] for letter in self.texts[id])
        return out.decode(errors="replace")
