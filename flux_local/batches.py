"""How many rows a batch may have: what the device has room for, and what changes no picture's bits.

Knows nothing of which pictures are to share a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_local.drawing import Drawing
    from flux_local.messages import Job
    from flux_local.model.loader import Pipeline

BATCH_ROWS = 4
"""Rows of a batch at most. On two CPU cores four small pictures take twice the time of one, eight gain nothing more."""
FULL_AT_TOKENS = 4096
"""Tokens of a step above which a device has no room to spare, so that batching would only make pictures wait."""
SHORT_FOR = 600.0
"""Seconds for which a batch that ran out of memory is not tried again."""

Kind = tuple[int, int, bool, int | None]
"""Width, height, whether in fp8, and tokens of text."""

log = logging.getLogger("flux_local.engine")


def kind_of(job: Job) -> Kind:
    return job.width, job.height, job.go_fast, job.max_length


def rows_of(batch: Sequence[Drawing]) -> int:
    """Two for a picture with real classifier-free guidance."""
    return sum(drawing.job.rows for drawing in batch)


class Rows:
    """What has been learnt of batches on this device."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.changing: dict[Kind, int] = {}
        """Rows that batches are held to, because more would have changed their members' bits."""
        self.short: dict[Kind, tuple[int, float]] = {}
        """The same for want of memory, and until when on the monotonic clock."""

    def limit(self, job: Job) -> int:
        """Rows that a batch with the job may have: few where a picture alone fills the device."""
        kind = kind_of(job)
        rows, until = self.short.get(kind, (BATCH_ROWS, 0.0))
        if until < time.monotonic():
            self.short.pop(kind, None)
            rows = BATCH_ROWS
        return min(rows, self.changing.get(kind, BATCH_ROWS), max(1, FULL_AT_TOKENS // job.canvas_tokens))

    def ran_short(self, batch: Sequence[Drawing]) -> None:
        """The batch ran out of memory: for a while only smaller ones are made."""
        self.short[kind_of(batch[0].job)] = max(1, rows_of(batch) // 2), time.monotonic() + SHORT_FOR

    def proved(self, batch: Sequence[Drawing]) -> bool:
        """Whether the batch's shape keeps every picture's bits; one that does not is not used again.

        What has two rows of its own, for guidance, must keep its bits alone as well.
        """
        rows, kind = rows_of(batch), kind_of(batch[0].job)
        proved = self._keep_bits(batch[0], {rows, *(drawing.job.rows for drawing in batch)} - {1})
        if proved is None:
            log.warning("there is no room for batches of %d on %dx%d; smaller ones are used", rows, *kind[:2])
            self.ran_short(batch)
        elif not proved:
            log.warning("batches of %d on %dx%d would change bits; smaller ones are used", rows, *kind[:2])
            self.changing[kind] = rows // 2
        return proved or False

    def _keep_bits(self, drawing: Drawing, shapes: set[int]) -> bool | None:
        """Whether so many rows of the picture's canvas keep its bits; None where memory was short, and once more."""
        from flux_local.model import memory

        denoiser, picture = self.pipeline.denoiser_for(drawing.job.go_fast), drawing.picture
        assert picture is not None
        for _ in range(2):
            try:
                return all(
                    denoiser.independent(picture.width, picture.height, rows, picture.prompt) for rows in sorted(shapes)
                )
            except Exception as error:
                if memory.is_fatal(error):
                    raise
                if not memory.is_exhausted(error):
                    log.exception("a proof failed")
                    return False
                self.pipeline.make_room()
        return None
