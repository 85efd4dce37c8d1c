"""Prompt → what the transformer reads: T5's states, CLIP's pooled vector, and how much of the prompt was read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flux_local.model.clip import ClipEncoder
from flux_local.model.graphs import Graphs, recorded
from flux_local.model.t5 import T5Encoder, fastest
from flux_local.model.tokens import Words


@dataclass(frozen=True)
class PromptEmbedding:
    """One prompt, encoded."""

    states: Tensor
    """T5's last hidden states, [1, L, D]. Padding is part of it: FLUX.1 attends to pad tokens."""
    pooled: Tensor
    """CLIP's pooled output, [1, P]."""
    tokens: int
    """T5 tokens read, padding not counted."""
    read: str
    """The part of the prompt that T5 read: all of it, unless it was too long."""
    cut: bool = False
    """Whether a prompt was longer than the encoder that reads it in full: T5, or CLIP where T5 reads another one."""

    @property
    def nbytes(self) -> int:
        return self.states.nbytes + self.pooled.nbytes


Reader = Callable[[Tensor], Tensor]
"""Token numbers [1, L] → what an encoder makes of them."""


class PromptEncoder:
    """Both text encoders of FLUX.1 with their tokenizers. On a GPU they run as CUDA graphs, T5 with fused attention.

    Args:
        device: where they compute; their weights may be elsewhere.
        hooked: whether hooks bring the weights: then neither is a graph.
        packed: whether T5's weights are unpacked for each use: that takes the GPU longer than the host takes to ask for
            it, and a graph would keep the room it needs, where memory is short. Then only CLIP is one.
    """

    def __init__(
        self, words: Words, words_2: Words, clip: ClipEncoder, t5: T5Encoder, device: str,
        hooked: bool = False, packed: bool = False,
    ) -> None:  # fmt: skip
        self.words, self.words_2, self.clip, self.t5 = words, words_2, clip, t5
        self.device = torch.device(device)
        self.max_length = words_2.max_length
        here = self.device.type == "cuda" and not hooked
        self.shorter: Reader = fastest(t5, self.max_length, self.device) if here else t5
        """T5 for what is cut shorter than usual: too rare to have a graph of every length."""
        self.states = recorded(self.shorter, self.device) if here and not packed else self.shorter
        self.pooled: Reader = recorded(clip, self.device, beside=self.states) if here else clip

    def forget(self) -> None:
        """Lets the CUDA graphs go; they are recorded again as they are wanted."""
        for reader in (self.states, self.pooled):
            if isinstance(reader, Graphs):
                reader.forget()

    @torch.inference_mode()
    def encode(self, prompt: str, prompt_2: str | None = None, max_length: int | None = None) -> PromptEmbedding:
        """CLIP reads `prompt`, T5 reads `prompt_2` (or `prompt`), cut or padded to `max_length` tokens of its own."""
        length = min(max_length or self.max_length, self.max_length)
        t5_prompt = prompt if prompt_2 is None else prompt_2
        found = self.words_2(t5_prompt, length)
        read = self.states if length == self.max_length else self.shorter
        states = read(torch.tensor([found.ids], device=self.device))
        pieces = self.words(prompt)
        pooled = self.pooled(torch.tensor([pieces.ids], device=self.device))
        whole = found.count < length or found.end >= len(t5_prompt.rstrip())
        cut = not whole or (prompt_2 is not None and pieces.end < len(prompt.rstrip()))
        return PromptEmbedding(states, pooled, found.count, t5_prompt if whole else t5_prompt[: found.end], cut)


Encode = Callable[[str, str | None, int | None], PromptEmbedding]
"""As `PromptEncoder.encode`."""


class PromptCache:
    """Embeddings of the latest prompts, within so many bytes: repeats and the n pictures of a request share one."""

    def __init__(self, encode: Encode, limit: int) -> None:
        self.encode = encode
        self.limit = limit
        self.bytes = 0
        self.kept: OrderedDict[tuple[str, str | None, int | None], PromptEmbedding] = OrderedDict()

    def __call__(self, prompt: str, prompt_2: str | None = None, max_length: int | None = None) -> PromptEmbedding:
        key = (prompt, prompt_2, max_length)
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        made = self.kept[key] = self.encode(*key)
        self.bytes += made.nbytes
        while self.bytes > self.limit and len(self.kept) > 1:
            _, old = self.kept.popitem(last=False)
            self.bytes -= old.nbytes
        return made
