"""How long a denoising step takes: ours in each precision, diffusers as it comes and compiled, and by kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from flux_local.model.denoiser import Denoiser
from flux_local.model.graphs import Graphs, Pool
from flux_local.model.transformer import FluxTransformer

from . import peers
from .bench import Bench, say
from .timing import TIMED, WARM_UPS, milliseconds

STEPS_TIMED = 3
"""Steps between two events: one alone would count the host's launches too, which a server hides behind the card."""


def steps(bench: Bench) -> None:
    """One step: ours with graphs and without, then diffusers as it comes. A row that fails costs no other."""
    table = bench.report.timings["step_ms"] = {}
    for side in bench.scale.sides:
        rows: dict[str, tuple[Any, tuple[int, ...]]] = {
            f"ours {side}": (bench.ours, bench.scale.batches),
            f"ours fp8 {side}": (bench.fast, bench.scale.batches),
            f"ours fp8, attention too {side}": (bench.fastest, bench.scale.batches),
            f"ours without graph {side}": (without_graphs(bench.ours), (1,)),
            f"diffusers eager {side}": (bench.theirs, bench.scale.batches),
        }
        for name, (transformer, batches) in rows.items():
            for batch in batches_at(bench, side, batches) if transformer is not None else ():
                with bench.attempt(f"step, {name}, batch {batch}"):
                    ms = table.setdefault(name, {})[str(batch)] = step_ms(bench, transformer, side, batch)
                    say(f"  {name:34} batch {batch}: {ms:.2f} ms")
    if bench.cuda:
        graphs_in_turn(bench)
    for name, transformer in (("own precision", bench.ours), ("fp8", bench.fast), ("fp8 attention", bench.fastest)):
        graphs = getattr(transformer, "run", None)
        if isinstance(graphs, Graphs):
            bench.report.check(
                f"CUDA graphs, {name}", bool(graphs.captured) and not graphs.refused,
                captured=len(graphs.captured), refused=[[list(shape) for shape in s] for s in graphs.refused],
            )  # fmt: skip


def step_ms(bench: Bench, transformer: Any, side: int, batch: int) -> float:
    """A step among steps, as a server has them: in a row, with the host running ahead. What the server's own clock
    says of the last one is written beside it."""
    denoiser = Denoiser(transformer)
    pictures = bench.pictures(transformer, side, batch, STEPS_TIMED * (TIMED + WARM_UPS))

    def several() -> None:
        for _ in range(STEPS_TIMED):
            denoiser.advance(pictures)

    ms = milliseconds(several, bench.device, least_ms=0) / STEPS_TIMED
    denoiser.pace.finish()
    if (seconds := denoiser.pace.token_seconds) is not None:
        own = bench.report.timings.setdefault("step_ms_by_own_clock", [])
        own.append([ms, 1000 * seconds * batch * (side * side // 256)])
    return ms


def batches_at(bench: Bench, side: int, batches: tuple[int, ...]) -> tuple[int, ...]:
    """Those that a server would have at this canvas: no more at once than fill one of the largest."""
    return tuple(batch for batch in batches if batch == 1 or batch * side**2 <= bench.scale.sides[0] ** 2)


def graphs_in_turn(bench: Bench) -> None:
    """More shapes than there may be graphs, over and over: what is let go takes nothing of the others with it."""
    weight = torch.randn(12288, 3072, device=bench.device, dtype=bench.dtype)
    graphs = Graphs(lambda x: x @ weight, Pool(), limit=2)
    inputs = [torch.randn(rows, 12288, device=bench.device, dtype=bench.dtype) for rows in (512, 77, 1024, 512, 256)]
    same = [bool(torch.equal(graphs(x), x @ weight)) for x in 4 * inputs]
    bench.report.check("CUDA graphs, more shapes than graphs", all(same) and not graphs.refused, same=same)


def compiled(bench: Bench) -> None:
    """diffusers' own recipe: cuDNN's attention and its repeated blocks compiled."""
    if not bench.cuda:
        say("  only on a GPU")
        return
    table, side = bench.report.timings["step_ms"], bench.scale.sides[0]
    bench.module.set_attention_backend("_native_cudnn")
    bench.module.compile_repeated_blocks(fullgraph=True)
    table[f"diffusers compiled {side}"] = {"1": step_ms(bench, bench.theirs, side, 1)}
    say(f"  diffusers compiled {side}: {table[f'diffusers compiled {side}']['1']:.2f} ms")


def others(bench: Bench) -> None:
    """What other packages make of diffusers' module, where they are installed; last, since they change it."""
    if not bench.cuda:
        say("  only on a GPU")
        return
    table, side = bench.report.timings["step_ms"], bench.scale.sides[0]
    for policy in (None, "medium"):
        try:
            with peers.cache_dit_steps(bench.module, bench.scale.steps, policy) as cached:
                seconds = bench.milliseconds(lambda: loop(bench, side, cached.begin)) / 1000
                found = {"denoising_s": seconds, "computed": cached.computed(), "steps": bench.scale.steps}
        except ImportError as error:
            say(f"  cache-dit: not installed ({error})")
            break
        bench.report.timings[f"cache-dit {policy or 'by threshold'} {side}"] = found
        say(f"  cache-dit, {policy or 'by threshold'}: {found}")
    try:
        peers.torchao_fp8(bench.module)
    except (ImportError, AssertionError) as error:  # it asserts that the card has fp8 products
        say(f"  torchao: not installed, or not for this card ({error})")
        return
    table[f"diffusers with torchao's fp8, compiled {side}"] = {"1": (ms := step_ms(bench, bench.theirs, side, 1))}
    say(f"  torchao's fp8, compiled: {ms:.2f} ms")


def loop(bench: Bench, side: int, begin: Callable[[], None]) -> None:
    """All steps of a picture through diffusers' module."""
    begin()
    pictures, denoiser = bench.pictures(bench.theirs, side, 1, bench.scale.steps), Denoiser(bench.theirs)
    while pictures[0].steps_left:
        denoiser.advance(pictures)


def profile(bench: Bench) -> None:
    """One step of ours in each precision at the first side, by kernel."""
    if not bench.cuda:
        say("  only on a GPU")
        return
    from torch.profiler import ProfilerActivity, profile

    for name, transformer in (("own precision", bench.ours), ("fp8", bench.fast), ("fp8 attention", bench.fastest)):
        if transformer is None:
            continue
        denoiser, pictures = Denoiser(transformer), bench.pictures(transformer, bench.scale.sides[0], 1, 8)
        denoiser.advance(pictures)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            denoiser.advance(pictures)
            torch.cuda.synchronize()
        rows = [row for row in recorded.key_averages() if row.self_device_time_total > 0]
        rows.sort(key=lambda row: -row.self_device_time_total)
        total = sum(row.self_device_time_total for row in rows) or 1.0
        bench.report.profile[name] = [
            {"kernel": row.key[:120], "calls": row.count, "ms": row.self_device_time_total / 1000,
             "share": row.self_device_time_total / total}
            for row in rows[:24]
        ]  # fmt: skip
        say(f"  {name}, {total / 1000:.2f} ms")
        for row in bench.report.profile[name]:
            say(f"  {row['ms']:8.3f} ms  {100 * row['share']:5.1f}%  {row['calls']:4} × {row['kernel'][:90]}")


def without_graphs(transformer: FluxTransformer) -> FluxTransformer:
    """The same, each operation launched by itself."""
    twin = copy.copy(transformer)
    twin.run = twin.forward
    return twin
