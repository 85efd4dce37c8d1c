"""Our text encoders, tokenizers and autoencoder against those of transformers and diffusers, with the same weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_local.model.autoencoder import AutoencoderKL
from flux_local.model.clip import ClipEncoder
from flux_local.model.flux1 import AUTOENCODER, CLIP_L
from flux_local.model.parts import Held, built
from flux_local.model.tokens import Words, clip_words, t5_words
from tests.servers import MODEL

TEXTS = (
    "", " ", "a large red star on a blue background", "two   spaces\n\ta tab", "NAÏVE café ﬁ Ⅷ 深圳 😀",
    "it's 1234 o'clock", "<|endoftext|> in the middle </s> and <pad>", "word " * 300, "\u0000\u200b", "\u2581under",
)  # fmt: skip


def theirs(name: str, folder: Path) -> Any:
    from transformers import CLIPTokenizer, T5TokenizerFast

    return (CLIPTokenizer if name == "clip" else T5TokenizerFast).from_pretrained(folder, local_files_only=True)


def agree(words: Words, tokenizer: Any, text: str, length: int | None = None) -> None:
    expected = tokenizer(
        text, padding="max_length", truncation=True, max_length=length or words.max_length, return_offsets_mapping=True
    )
    found = words(text, length)
    assert found.ids == expected["input_ids"], text
    assert found.count == sum(expected["attention_mask"]), text
    assert found.end == max((end for _, end in expected["offset_mapping"][: found.count]), default=0), text


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's tokenizer as FLUX.1's own folder has it: without `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("clip")
    model = json.loads((MODEL / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    how = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {name: {**how, "content": "<|endoftext|>"} for name in ("eos_token", "unk_token")}
    special |= {"bos_token": {**how, "content": "<|startoftext|>"}}
    config = special | {"pad_token": "<|endoftext|>", "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["clip", "t5", "clip in two files"])
def test_the_same_token_numbers(name: str, two_files: Path) -> None:
    kind = name.split()[0]
    folder = {"clip": MODEL / "tokenizer", "t5": MODEL / "tokenizer_2"}.get(name, two_files)
    words, tokenizer = (clip_words if kind == "clip" else t5_words)(folder), theirs(kind, folder)
    assert words.max_length == tokenizer.model_max_length
    for text in TEXTS:
        for length in (None, 7):
            agree(words, tokenizer, text, length)

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=60))
    def any_text(text: str) -> None:
        agree(words, tokenizer, text)

    any_text()


def test_a_tokenizer_that_is_none_is_said_to_be(tmp_path: Path) -> None:
    for read in (clip_words, t5_words):
        with pytest.raises((OSError, ValueError)):
            read(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        clip_words(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    for read in (clip_words, t5_words):
        with pytest.raises(ValueError, match="is no tokenizer"):
            read(tmp_path)


@pytest.mark.parametrize(("end", "activation"), [(2, "quick_gelu"), (250, "gelu")])
def test_clip_is_transformers_own(end: int, activation: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
    config = CLIP_L | sizes | {"num_attention_heads": 4, "eos_token_id": end, "hidden_act": activation}
    expected = CLIPTextModel(CLIPTextConfig(**config)).eval()
    ours = ClipEncoder(config)
    ours.load_state_dict(expected.state_dict())
    ids = torch.randint(3, 240, (1, 77))
    ids[0, 20:] = 250 if end == 250 else 299
    torch.testing.assert_close(ours(ids), expected(ids).pooler_output, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The tiled_encode implementation")
@pytest.mark.parametrize("more", [{}, {"mid_block_add_attention": False, "use_quant_conv": True,
                                       "use_post_quant_conv": True, "layers_per_block": 1}])  # fmt: skip
def test_the_autoencoder_is_diffusers_own_to_the_bit(more: dict[str, Any]) -> None:
    from diffusers import AutoencoderKL as Theirs

    torch.manual_seed(0)
    config = AUTOENCODER | {"block_out_channels": [32, 32, 64, 64], "sample_size": 64} | more
    expected = Theirs.from_config(config).eval()
    ours = AutoencoderKL(config).eval()
    ours.load_state_dict(expected.state_dict())
    pictures, latents = torch.rand(2, 3, 72, 120) * 2 - 1, torch.randn(2, 16, 9, 15)
    with torch.no_grad():
        assert torch.equal(ours.encode(pictures), expected.encode(pictures).latent_dist.mean)
        assert torch.equal(ours.decode(latents), expected.decode(latents).sample)
        tiled, tiles = expected.tiled_encode(pictures).latent_dist.mean, expected.tiled_decode(latents).sample
        torch.testing.assert_close(ours.tiled_encode(pictures), tiled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.tiled_decode(latents), tiles, rtol=1e-5, atol=1e-5)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="AttnUpDecoderBlock2D"):
        AutoencoderKL(AUTOENCODER | {"up_block_types": ["AttnUpDecoderBlock2D"] * 4})
    with pytest.raises(ValueError, match="silly"):
        ClipEncoder(CLIP_L | {"hidden_act": "silly"})


def test_a_part_takes_what_it_has_names_for() -> None:
    def make(config: Any) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2))

    state = {"0.weight": torch.ones(3, 2), "1.weight": torch.ones(2, 2), "1.bias": torch.ones(2), "more": torch.ones(1)}
    module = built(make, {}, Held({f"old.{name}": tensor for name, tensor in state.items()}),
                   lambda name: name.removeprefix("old."))  # fmt: skip
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(KeyError):
        built(make, {}, Held({}))


def test_a_start_imports_neither_library() -> None:
    """They take longer than all the rest of a start."""
    code = (
        "import sys; from pathlib import Path; from flux_local.model.loader import load; "
        f"load(Path({str(MODEL)!r})).text.encode('a star'); "
        "print([name for name in ('diffusers', 'transformers', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
