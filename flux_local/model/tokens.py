"""Text → token numbers, with a model folder's own tokenizers, as transformers' `CLIPTokenizer` and `T5Tokenizer` do.

The work is the `tokenizers` library's, which starts at once; transformers' classes around it bring seconds of imports.
Knows nothing of what the numbers stand for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

FILE = "tokenizer.json"
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Tokens:
    """A text in `length` numbers, of which the first `count` are no padding; it was read up to character `end`."""

    ids: list[int]
    count: int
    end: int


class Words:
    """One tokenizer. What a text has too many is cut, before the token that ends every text."""

    def __init__(self, tokenizer: Tokenizer, pad: int, max_length: int) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer, self.pad, self.max_length = tokenizer, pad, max_length

    def __call__(self, text: str, length: int | None = None) -> Tokens:
        length = length or self.max_length
        found = self.tokenizer.encode(text)
        ids, offsets = found.ids, found.offsets
        if len(ids) > length:
            ids, offsets = [*ids[: length - 1], ids[-1]], offsets[: length - 1]
        end = max((after for _, after in offsets), default=0)
        return Tokens(ids + [self.pad] * (length - len(ids)), len(ids), end)


def clip_words(folder: Path) -> Words:
    """CLIP's, from `tokenizer.json` or from `vocab.json` and `merges.txt`.

    Raises:
        OSError, ValueError: a file is missing or is not what it should be.
    """
    config = read(folder / "tokenizer_config.json")
    start, end = named(config, "bos_token", "<|startoftext|>"), named(config, "eos_token", "<|endoftext|>")
    path = folder / FILE
    tokenizer = from_file(path) if path.is_file() else byte_pairs(folder, start, end, named(config, "unk_token", end))
    return Words(tokenizer, number(tokenizer, named(config, "pad_token", end)), limit(config, 77))


def t5_words(folder: Path) -> Words:
    """T5's, from `tokenizer.json`, or from `spiece.model`, which takes transformers and its seconds.

    Raises:
        OSError, ValueError: a file is missing or is not what it should be.
    """
    config = read(folder / "tokenizer_config.json")
    if (path := folder / FILE).is_file():
        tokenizer = from_file(path)
    elif not (folder / "spiece.model").is_file():
        raise FileNotFoundError(f"{folder} has neither {FILE} nor spiece.model")
    else:
        from transformers import T5TokenizerFast

        tokenizer = T5TokenizerFast.from_pretrained(folder, local_files_only=True).backend_tokenizer
    return Words(tokenizer, number(tokenizer, named(config, "pad_token", "<pad>")), limit(config, 512))


def byte_pairs(folder: Path, start: str, end: str, unknown: str) -> Tokenizer:
    """The tokenizer that transformers makes of CLIP's two files."""
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocabulary, merges):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has neither {FILE} nor {path.name}")
    try:
        model = BPE.from_file(
            str(vocabulary), str(merges), unk_token=unknown, end_of_word_suffix="</w>", continuing_subword_prefix="",
            fuse_unk=False,
        )  # fmt: skip
    except Exception as error:  # the library raises no other
        raise ValueError(f"{folder} holds no tokenizer: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (start, end)])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, number(tokenizer, end)), (start, number(tokenizer, start)), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def from_file(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other
        raise ValueError(f"{path} is no tokenizer: {error}") from error


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def named(config: dict[str, Any], name: str, usual: str) -> str:
    """A special token as a configuration names it, by itself or with how it is to be found."""
    token = config.get(name) or usual
    return str(token["content"] if isinstance(token, dict) else token)


def number(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer lacks {token}")
    return int(found)


def limit(config: dict[str, Any], usual: int) -> int:
    """The most tokens of a text; a configuration may have transformers' huge number for "not known"."""
    found = int(config.get("model_max_length") or usual)
    return usual if found > 1 << 20 else found
