"""The text side of the embedded model: tokenizers trained on its own sentences, and two thin encoders.

The classes are those of FLUX.1 (CLIP with byte-level BPE, T5 with a Unigram vocabulary), so that nothing that loads
the real model needs to know the difference.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from .drawings import COLOURS, SHAPES, WHOLE, World, random_scene
from .sentences import IDLE, OTHER_NAMES, describe

T5_LENGTH = 32
CLIP_LENGTH = 77
SENTENCES = 20_000
WORD = re.compile("[A-Za-z]+")
END, FREQUENT = "</w>", 8  # what ends a word in CLIP's vocabulary; how often a pair is met to become one token
# Words that no drawing uses, so that a sentence with them still reads as words and not as letters.
OTHER_WORDS = re.findall(
    r"\S+",
    """
    navy magenta middle upper lower center centre corner bright dark light pale deep some one three many small large
    photo painting cat dog house tree sun sky sea mountain flower face person car city night day red-hot
    ring pentagon rectangle oval and with the in at to of by near behind
    """,
)


def sentences(seed: int) -> Iterator[str]:
    rng = random.Random(f"{seed} sentences")
    for _ in range(SENTENCES):
        yield describe(random_scene(rng, 128, 128, world=WHOLE), rng, WHOLE).text
        yield " ".join(rng.sample(OTHER_WORDS + list(COLOURS) + list(SHAPES), 6))


def clip_tokenizer(seed: int) -> CLIPTokenizer:
    """Byte-level BPE: any text has tokens, known words have one."""
    blank = CLIPTokenizer().backend_tokenizer
    words: Counter[str] = Counter()
    for line in sentences(seed):
        pieces = blank.pre_tokenizer.pre_tokenize_str(blank.normalizer.normalize_str(line))
        words.update(piece for piece, _ in pieces)
    merges = byte_pairs(words)
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*bytes_, *(byte + END for byte in bytes_), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=CLIP_LENGTH
    )


def byte_pairs(words: Counter[str]) -> list[tuple[str, str]]:
    """Merges of byte-pair encoding (arXiv 1508.07909): the neighbours met most often, down to FREQUENT times.

    Among equals the first in the alphabet, so that the same words give the same numbers in every process; the trainer
    of `tokenizers` lets a hash table decide.
    """
    spelt = {word: [*word[:-1], word[-1] + END] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        met: Counter[tuple[str, str]] = Counter()
        for word, parts in spelt.items():
            for pair in pairwise(parts):
                met[pair] += words[word]
        best = min(met, key=lambda pair: (-met[pair], pair), default=None)
        if best is None or met[best] < FREQUENT:
            return merges
        merges.append(best)
        for parts in spelt.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1


def t5_tokenizer(seed: int) -> T5TokenizerFast:
    """Unigram over whole words, scored by the logarithm of their share, and characters to spell the rest.

    The usual pruning of sub-word pieces is left out: on so small a language it takes common words apart.
    What no piece can spell becomes `<unk>`.
    """
    words = Counter(word for line in sentences(seed) for word in WORD.findall(line))
    for word in list(words):
        words.setdefault(word.capitalize(), 1)
    total = sum(words.values())
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [("▁" + word, math.log(count / total)) for word, count in sorted(words.items())]
    letter = math.log(1 / total) - 1.0
    taken = {piece for piece, _ in vocabulary}
    spelling = ["▁", *string.ascii_letters, *string.digits, *string.punctuation, "s", "es", "er", "ing", "ed", "ly"]
    vocabulary += [(piece, letter) for piece in dict.fromkeys(spelling) if piece not in taken]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=T5_LENGTH)


def words_of(world: World, seed: int, count: int = 5000) -> set[str]:
    """Those of a world's sentences, as they are written there."""
    rng = random.Random(f"{seed} words")
    scenes = (random_scene(rng, 128, 128, world=world) for _ in range(count))
    return {word for scene in scenes for word in WORD.findall(describe(scene, rng, world).text)}


@torch.no_grad()
def lend_words(
    world: World, seed: int, clip: tuple[CLIPTokenizer, CLIPTextModel], t5: tuple[T5TokenizerFast, T5EncoderModel]
) -> None:
    """Gives each known word that the world's sentences never use the embedding of one that they do, in place.

    Of that which means the same (of both names' first words, "beside" and "next to" being "left of"), whatever the
    case of its letters, or of IDLE: so "A TINY crimson disc" is read as "a small red circle", without training.
    """
    used = words_of(world, seed)
    meant = {other.split()[0]: name.split()[0] for name, others in OTHER_NAMES.items() for other in others}
    for (tokenizer, encoder), before, after, heard in (
        (clip, "", END, {word.lower() for word in used}),
        (t5, "▁", "", used),
    ):
        ids, rows = tokenizer.get_vocab(), encoder.get_input_embeddings().weight
        for piece, index in ids.items():
            word = piece.removeprefix(before).removesuffix(after)
            if piece == before + word + after and len(word) > 1 and WORD.fullmatch(word) and word not in heard:
                name = meant.get(word.lower(), word.lower())
                rows[index] = rows[ids[before + (name if name in heard else IDLE) + after]]


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Pooled prompt: [batch, 64]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=1.0,
        )
    )


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Prompt embedding: [batch, 32, 96]."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=96,
            d_kv=24,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=False,
        )
    )
