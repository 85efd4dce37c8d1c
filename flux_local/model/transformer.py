"""FLUX.1's transformer, our own: the weights of diffusers' `FluxTransformer2DModel`, laid out for speed.

What does not change between steps is computed once a picture, in a `Condition`: the prompt through the context
embedder, and the modulation of every block for all steps, which depends on time, guidance and the pooled prompt alone.
A step is then matrix products and the few operations of `ops`. Knows nothing of schedules, guidance rules or seeds.

The architecture is that of Black Forest Labs' FLUX.1 (double blocks, in which text and image have weights of their own
and attend together, then single blocks, in which attention and MLP run side by side).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_local.model import fp8_attention
from flux_local.model.embeddings import rotary_table, sinusoids
from flux_local.model.geometry import Geometry
from flux_local.model.graphs import Graphs, recorded
from flux_local.model.layers import Layers, Linear
from flux_local.model.ops import Activation, Layout, Ops, Site, Vectors, part
from flux_local.model.text import PromptEmbedding

MLP_RATIO = 4
TIMESTEPS = 1000
"""The transformer's time runs from 0 to this, and guidance is multiplied by it; sigma is a thousandth."""

Branch = Callable[[Activation, Tensor, Layout], Tensor]
"""Normalised rows, the rotary table and the layout → what is added to the residual stream."""


@dataclass(frozen=True)
class Stream:
    """What a double block has for the text, and again for the image."""

    qkv: Linear
    out: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class DoubleBlock:
    text: Stream
    image: Stream
    norm: Tensor
    """[2, 2, head size]: for text and image, the weights of the query's and the key's RMSNorm."""
    scales: Tensor
    """[2]: of query and key, where attention is in fp8."""


@dataclass(frozen=True)
class SingleBlock:
    qkv_up: Linear
    """Query, key, value and the MLP's hidden layer: [7·D, D]."""
    norm: Tensor
    """[1, 2, head size]."""
    scales: Tensor
    """[2]."""
    out: Linear
    """Attention's output and the MLP's hidden layer, back: [D, 5·D]."""


@dataclass(frozen=True)
class Condition:
    """All that the transformer has to know of one picture's prompt, schedule and guidance."""

    context: Tensor
    """[text, D]."""
    modulation: Tensor
    """[steps, vectors, D]."""


class FluxTransformer:
    """Noisy latents and a condition in, velocity out."""

    def __init__(
        self,
        geometry: Geometry,
        layers: Layers,
        ops: Ops | None = None,
        fp8: bool = False,
        fp8_attention: bool = False,
        work: int = 0,
    ) -> None:
        """
        Args:
            fp8: whether the blocks' products take fp8 rows.
            fp8_attention: whether attention takes fp8 too.
            work: bytes that a pass takes at its largest, `memory.step_work`.
        """
        self.geometry = geometry
        self.ops = ops or Ops()
        self.image_in = layers.linear("x_embedder")
        self.text_in = layers.linear("context_embedder")
        embedders = ["timestep_embedder", "guidance_embedder"] if geometry.guided else ["timestep_embedder"]
        self.scalars_in = [layers.mlp(f"time_text_embed.{name}") for name in embedders]
        self.pooled_in = layers.mlp("time_text_embed.text_embedder")
        self.modulation = modulation(geometry, layers)
        self.doubles = [double_block(layers, f"transformer_blocks.{i}") for i in range(geometry.double_blocks)]
        self.singles = [single_block(layers, f"single_transformer_blocks.{i}") for i in range(geometry.single_blocks)]
        self.out = layers.linear("proj_out")
        self.sites = sites(geometry)
        self.fp8 = fp8
        """Whether what blocks take is put into fp8 where it is made."""
        self.fp8_attention = fp8_attention
        self.dtype, self.device = self.image_in.weight.dtype, self.image_in.weight.device
        self.run = recorded(self.forward, self.device, work)

    @property
    def attention_by(self) -> str:
        """Whose attention this is."""
        return f"fp8 {self.ops.attention_quantised_by}" if self.fp8_attention else self.ops.attention_by

    @property
    def recordings(self) -> int:
        """CUDA graphs tried so far."""
        return self.run.pool.recordings if isinstance(self.run, Graphs) else 0

    @torch.inference_mode()
    def condition(self, prompt: PromptEmbedding, sigmas: Sequence[float], guidance: float) -> Condition:
        """Everything about a picture that its steps share.

        Args:
            sigmas: the noise level at the beginning of each step.
            guidance: the distilled guidance scale; without effect on a model that has no such input.
        """
        # Rounded to the model's precision before the division and after it, as diffusers' FluxPipeline does.
        times = (torch.tensor(sigmas, dtype=torch.float32) * TIMESTEPS).to(self.dtype) / TIMESTEPS
        scalars = [times.to(self.device) * TIMESTEPS]
        if self.geometry.guided:
            scalars.append(torch.full_like(scalars[0], guidance) * TIMESTEPS)
        embedded = sum(
            embed(sinusoids(values).to(self.dtype)) for embed, values in zip(self.scalars_in, scalars, strict=True)
        )
        embedded = embedded + self.pooled_in(prompt.pooled.to(self.dtype))
        vectors = self.modulation(F.silu(embedded))
        return Condition(
            self.text_in(prompt.states[0].to(self.dtype)),
            vectors.view(len(sigmas), -1, self.geometry.width),
        )

    @torch.inference_mode()
    def velocity(
        self, latents: Tensor, conditions: Sequence[Condition], steps: Sequence[int], width: int, height: int
    ) -> Tensor:
        """[B, tokens, 64] → the same: the velocity of each picture at its own step.

        Args:
            latents: of one canvas of `width` × `height` pixels.
            conditions: one a picture, of one prompt length.
            steps: which row of its modulation each picture is at.
        """
        context = torch.stack([c.context for c in conditions])
        vectors = torch.stack([c.modulation[step] for c, step in zip(conditions, steps, strict=True)])
        return self.run(latents, context, vectors, self.rotary(width, height, context.shape[1]))

    def forward(self, latents: Tensor, context: Tensor, modulation: Tensor, rotary: Tensor) -> Tensor:
        """One pass, of tensors alone: nothing here depends on their values, so that it can be captured in a graph.

        Args:
            latents: [B, tokens, 64].
            context: [B, text, D].
            modulation: [B, vectors, D].
            rotary: [text + tokens, head size / 2, 2].
        """
        layout = Layout(len(latents), context.shape[1], latents.shape[1])
        x = self.buffer(layout, self.geometry.width)
        x[: layout.text_rows] = context.flatten(0, 1)
        self.image_in.into(x[layout.text_rows :], latents.flatten(0, 1))
        ops, sites = self.ops, self.sites
        norm = ops.modulated_norm_quantised if self.fp8 else ops.modulated_norm
        add_norm = ops.add_norm_quantised if self.fp8 else ops.add_norm
        branches = self.branches()
        normed: Activation = norm(x, modulation, layout, sites[0])
        for branch, site in zip(branches[:-1], sites[1:-1], strict=True):
            normed = add_norm(x, branch(normed, rotary, layout), modulation, layout, site)
        last = ops.add_norm(x, branches[-1](normed, rotary, layout), modulation, layout, sites[-1])
        return self.out(last[layout.text_rows :]).view(layout.batch, layout.image, -1)

    def branches(self) -> list[Branch]:
        """All that is added to the residual stream, in the order of the pass."""
        found: list[Branch] = []
        for double in self.doubles:
            found += [partial(self.attend, double), partial(self.feed_forward, double)]
        return found + [partial(self.attend_and_feed_forward, single) for single in self.singles]

    def attend(self, block: DoubleBlock, x: Activation, rotary: Tensor, layout: Layout) -> Tensor:
        """[rows, D] → [rows, D]: both streams attend to both."""
        width = self.geometry.width
        qkv = each_stream(block.text.qkv, block.image.qkv, self.buffer(layout, 3 * width), x, layout)
        attended = self.attention(qkv, block, rotary, layout)
        rows: Activation = self.ops.quantised(attended) if self.fp8 else attended
        return each_stream(block.text.out, block.image.out, self.buffer(layout, width), rows, layout)

    def feed_forward(self, block: DoubleBlock, x: Activation, _: Tensor, layout: Layout) -> Tensor:
        """[rows, D] → [rows, D]: each stream through its own MLP."""
        width = self.geometry.width
        hidden = self.buffer(layout, MLP_RATIO * width)
        active: Activation = hidden
        if self.fp8:
            each_stream(block.text.up, block.image.up, hidden, x, layout)
            active = self.ops.gelu_quantised(hidden, None)
        else:
            for layer, rows in zip((block.text.up, block.image.up), layout.streams, strict=True):
                layer.gelu_into(hidden[rows], part(x, rows), self.ops.linear_gelu)
        return each_stream(block.text.down, block.image.down, self.buffer(layout, width), active, layout)

    def attend_and_feed_forward(self, block: SingleBlock, x: Activation, rotary: Tensor, layout: Layout) -> Tensor:
        """[rows, D] → [rows, D]. In fp8 one product makes query, key, value and the MLP's hidden layer, and what makes
        the next product's rows has the GELU in it; else two make them, so that the hidden layer's has it."""
        width = self.geometry.width
        if self.fp8:
            both = block.qkv_up(x)
            attended = self.attention(both, block, rotary, layout)
            return block.out(self.ops.gelu_quantised(both[:, 3 * width :], attended))
        qkv, up = block.qkv_up.divided(3 * width)
        hidden = self.buffer(layout, MLP_RATIO * width)
        up.gelu_into(hidden, x, self.ops.linear_gelu)
        return block.out.of_both(self.attention(qkv(x), block, rotary, layout), hidden)

    def attention(self, qkv: Tensor, block: DoubleBlock | SingleBlock, rotary: Tensor, layout: Layout) -> Tensor:
        """[rows, ≥ 3·D] → [rows, D]; `qkv` is written to."""
        heads, size = self.geometry.heads, self.geometry.head_size
        if self.fp8_attention:
            fp8 = self.ops.heads_quantised(qkv, heads, block.norm, rotary, block.scales, layout)
            out = self.buffer(layout, self.geometry.width)
            self.ops.attention_quantised(fp8, layout, out)
            return out
        self.ops.norm_rotate_(qkv, heads, block.norm, rotary, layout)
        return self.ops.attention(qkv, heads, size, layout)

    def linears(self) -> list[Linear]:
        """All matrix products, those that it shares with a twin among them."""
        found = [self.image_in, self.text_in, self.modulation, self.out]
        for embedder in (*self.scalars_in, self.pooled_in):
            found += [embedder.first, embedder.second]
        for double in self.doubles:
            for stream in (double.text, double.image):
                found += [stream.qkv, stream.out, stream.up, stream.down]
        return found + [linear for single in self.singles for linear in (single.qkv_up, single.out)]

    def buffer(self, layout: Layout, columns: int) -> Tensor:
        return torch.empty(layout.rows, columns, dtype=self.dtype, device=self.device)

    def with_blocks(
        self, convert: Callable[[Linear], Linear], fp8: bool, fp8_attention: bool = False
    ) -> FluxTransformer:
        """The same with every matrix product of the blocks converted; all else is shared.

        Args:
            fp8: whether the products take fp8 rows.
            fp8_attention: whether attention takes fp8 too.
        """

        def stream(s: Stream) -> Stream:
            return Stream(convert(s.qkv), convert(s.out), convert(s.up), convert(s.down))

        twin = copy.copy(self)
        twin.doubles = [replace(b, text=stream(b.text), image=stream(b.image)) for b in self.doubles]
        twin.singles = [replace(b, qkv_up=convert(b.qkv_up), out=convert(b.out)) for b in self.singles]
        twin.fp8, twin.fp8_attention = fp8, fp8_attention
        twin.run = recorded(twin.forward, twin.device, beside=self.run)
        return twin

    def forget(self) -> None:
        """Lets the CUDA graphs go, and the memory that they hold; they are recorded again as they are wanted."""
        if isinstance(self.run, Graphs):
            self.run.forget()

    def with_plain_operations(self) -> FluxTransformer:
        """The same without kernels and graphs."""
        twin = copy.copy(self)
        twin.ops, twin.run = Ops(), twin.forward
        return twin

    def rotary(self, width: int, height: int, text: int) -> Tensor:
        """`rotary_table` of a canvas."""
        return rotary_table(self.geometry.rotary_axes, width, height, text, self.device)


def each_stream(text: Linear, image: Linear, out: Tensor, x: Activation, layout: Layout) -> Tensor:
    """The text's rows through one layer, the image's through another, into one buffer; returns that."""
    for layer, rows in zip((text, image), layout.streams, strict=True):
        layer.into(out[rows], part(x, rows))
    return out


def sites(geometry: Geometry) -> list[Site]:
    """Where in the modulation table each normalisation finds its vectors, in the order of the pass.

    The table has, for each double block, six vectors of the image and six of the text (shift, scale, gate of the
    attention; shift, scale, gate of the MLP), for each single block three, then scale and shift of the last
    normalisation. A site's gate is that of the branch which ended just before it.
    """
    norms, gates = list[tuple[tuple[int, int], tuple[int, int]]](), list[tuple[int, int]]()
    at = 0
    for _ in range(geometry.double_blocks):
        image, text = at, at + 6
        for branch in (0, 3):
            norms.append(((text + branch, text + branch + 1), (image + branch, image + branch + 1)))
            gates.append((text + branch + 2, image + branch + 2))
        at += 12
    for _ in range(geometry.single_blocks):
        norms.append(((at, at + 1), (at, at + 1)))
        gates.append((at + 2, at + 2))
        at += 3
    norms.append(((at + 1, at), (at + 1, at)))
    return [
        Site(Vectors(*text, gate=gate[0]), Vectors(*image, gate=gate[1]))
        for (text, image), gate in zip(norms, [(-1, -1), *gates], strict=True)
    ]


def modulation(geometry: Geometry, layers: Layers) -> Linear:
    """The modulation layers of all blocks as one, in the order that `sites` describes."""
    names = []
    for i in range(geometry.double_blocks):
        names += [f"transformer_blocks.{i}.norm1.linear", f"transformer_blocks.{i}.norm1_context.linear"]
    names += [f"single_transformer_blocks.{i}.norm.linear" for i in range(geometry.single_blocks)]
    return layers.modulation(*names, "norm_out.linear")


def double_block(layers: Layers, name: str) -> DoubleBlock:
    attention = f"{name}.attn"
    norm = torch.stack(
        [
            layers.norms(f"{attention}.norm_added_q", f"{attention}.norm_added_k"),
            layers.norms(f"{attention}.norm_q", f"{attention}.norm_k"),
        ]
    )

    def stream(q: str, k: str, v: str, out: str, feed_forward: str) -> Stream:
        return Stream(
            qkv=layers.block(*(f"{attention}.{part}" for part in (q, k, v))),
            out=layers.block(f"{attention}.{out}"),
            up=layers.block(f"{name}.{feed_forward}.net.0.proj"),
            down=layers.block(f"{name}.{feed_forward}.net.2"),
        )

    return DoubleBlock(
        text=stream("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context"),
        image=stream("to_q", "to_k", "to_v", "to_out.0", "ff"),
        norm=norm,
        scales=fp8_attention.scales(norm),
    )


def single_block(layers: Layers, name: str) -> SingleBlock:
    attention = f"{name}.attn"
    norm = layers.norms(f"{attention}.norm_q", f"{attention}.norm_k")[None]
    return SingleBlock(
        qkv_up=layers.block(*(f"{attention}.{part}" for part in ("to_q", "to_k", "to_v")), f"{name}.proj_mlp"),
        norm=norm,
        scales=fp8_attention.scales(norm),
        out=layers.block(f"{name}.proj_out"),
    )
