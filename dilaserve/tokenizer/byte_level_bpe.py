"""The tokenizer of directories that hold vocab.json and merges.txt and no tokenizer.json.

They come with a Python class, which is never run. The classes in `CLASSES` all do the same, which is built here:

1. byte-level BPE from vocab.json and merges.txt, without an unknown token;
2. text is brought to NFC, then cut by `PIECES`, and each piece is merged on its own;
3. added tokens have the ids that tokenizer_config.json states, which must continue those of vocab.json.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from dilaserve.errors import CheckpointError
from dilaserve.system import files
from dilaserve.system.files import read_json_if_present
from dilaserve.tokenizer.panics import contained

VOCABULARY, MERGES = "vocab.json", "merges.txt"
CONFIG, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")  # tokenizer_class of tokenizer_config.json
PIECES = (  # pieces of text that are merged on their own, as those classes have it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TRAITS = ("special", "lstrip", "rstrip", "normalized", "single_word")  # of an added token, true or false


def present(directory: Path) -> bool:
    """Whether both files are there; raises `OSError` where that cannot be found out."""
    return files.present(directory / VOCABULARY) and files.present(directory / MERGES)


def read(directory: Path) -> Tokenizer:
    """The tokenizer of such a directory. Raises `CheckpointError`, and `OSError` for a file that cannot be read."""
    check_class(directory)
    for name in (VOCABULARY, MERGES):
        files.size(directory / name, files.MOST_TABLE)
    try:
        with contained():
            tokenizer = Tokenizer(models.BPE.from_file(str(directory / VOCABULARY), str(directory / MERGES)))
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{VOCABULARY} and {MERGES} in {directory} cannot be read: {reason}") from error
    if lacking := set(pre_tokenizers.ByteLevel.alphabet()) - tokenizer.get_vocab().keys():  # they would be left out
        raise CheckpointError(
            f"{directory / VOCABULARY} has no token for {len(lacking)} of the 256 bytes; is it whole?"
        )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    add(tokenizer, directory)
    return tokenizer


def check_class(directory: Path) -> None:
    """Other tokenizers are published in the same two files and cut texts otherwise, which no error would show."""
    found = read_json_if_present(directory / CONFIG).get("tokenizer_class")
    if found is not None and found not in CLASSES:
        raise CheckpointError(
            f"{directory} holds no tokenizer.json, and its tokenizer_class {found!r} is none of {', '.join(CLASSES)}; "
            "write a tokenizer.json with transformers' save_pretrained"
        )


def add(tokenizer: Tokenizer, directory: Path) -> None:
    """Add the added tokens; each must get the id that its file says, because the weights know it by that."""
    for id, token in sorted(added_tokens(directory).items()):
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if (found := tokenizer.token_to_id(token.content)) != id:
            raise CheckpointError(
                f"the token {token.content} of {directory} would get the id {found}, but its files say {id}; "
                f"is {VOCABULARY} whole, and are all added tokens in {CONFIG}?"
            )


def added_tokens(directory: Path) -> dict[int, AddedToken]:
    """Tokens by id from `added_tokens_decoder` of tokenizer_config.json, else from added_tokens.json.

    The latter has no traits: those named in special_tokens_map.json are special. Raises `CheckpointError`.
    """
    config = read_json_if_present(directory / CONFIG)
    if table := config.get("added_tokens_decoder"):
        return by_id(directory / CONFIG, table)
    special = named(config) | named(read_json_if_present(directory / SPECIALS))
    listed = read_json_if_present(directory / ADDED)
    return by_id(
        directory / ADDED,
        {id: {"content": token, "special": token in special, "normalized": False} for token, id in listed.items()},
    )


def by_id(file: Path, table: Any) -> dict[int, AddedToken]:
    """The table of added tokens, checked."""
    if not isinstance(table, dict):
        raise CheckpointError(f"{file}: added_tokens_decoder must be an object")
    found = {}
    for id, token in table.items():
        content = token.get("content") if isinstance(token, dict) else None
        if type(id) not in (int, str) or not str(id).isdecimal() or not isinstance(content, str) or not content:
            raise CheckpointError(f"{file}: an added token must have a content and a whole number as its id")
        special = token.get("special") is True
        traits = {"normalized": not special} | {name: token[name] is True for name in TRAITS if name in token}
        found[int(id)] = AddedToken(content, **traits)
    return found


def named(fields: dict[str, Any]) -> set[str]:
    """Texts of the special tokens that tokenizer_config.json or special_tokens_map.json name: of one each, or lists."""
    tokens: list[Any] = [token for name, token in fields.items() if name.endswith("_token")]
    listed = fields.get("additional_special_tokens")
    tokens += listed if isinstance(listed, list) else []
    contents = [token.get("content") if isinstance(token, dict) else token for token in tokens]
    return {content for content in contents if isinstance(content, str)}
