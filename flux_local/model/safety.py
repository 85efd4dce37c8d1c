"""The safety checker: a local image classifier that looks at finished pictures, beside the steps and not between them.

Any folder that `AutoModelForImageClassification` loads will do, as long as one of its labels is among those that mean
"leave this out". Knows nothing of requests, nor of what is done with a flagged picture.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux_local.errors import WeightsError
from flux_local.model import memory

log = logging.getLogger("flux_local.safety")

Key = tuple[str, int | None]
"""A job, and which of its partial pictures; None for the finished one."""

WARM_UP = 300.0
"""Seconds that the first picture may take."""
AT_ONCE = 8
"""Pictures in one batch of the classifier."""


class Classifier:
    """Says of pictures whether they are to be left out.

    Args:
        labels: the names, in any case of letters, that mean so; those that the model does not have are no matter.
        threshold: the probability of all of them together from which on a picture is flagged.

    Raises:
        WeightsError: the folder cannot be loaded, or has none of the labels.
    """

    def __init__(self, folder: Path, device: str, labels: frozenset[str], threshold: float) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
            model: Any = AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise WeightsError(
                f"Cannot load the safety checker in {folder}: {type(error).__name__}. Copy it again, or set "
                "--safety-checker off."
            ) from error
        names: dict[int, str] = model.config.id2label
        self.unsafe = [index for index, name in names.items() if name.lower() in labels]
        if not self.unsafe:
            raise WeightsError(
                f"The safety checker in {folder} has none of the labels {', '.join(sorted(labels))}; it has "
                f"{', '.join(names.values())}. Say with --safety-labels which of them to leave out."
            )
        self.model = model.to(device).eval().requires_grad_(False)
        self.device, self.threshold = device, threshold

    @torch.inference_mode()
    def flagged(self, pictures: list[np.ndarray]) -> list[bool]:
        """One verdict for each picture, [height, width, 3] uint8."""
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
        chances = self.model(**inputs).logits.float().softmax(dim=-1)
        # What is not a number is not known to be harmless.
        return [not bool(chance < self.threshold) for chance in chances[:, self.unsafe].sum(dim=-1)]


class SafetyChecker:
    """A classifier with a thread of its own. Pictures go in at any time; verdicts are picked up between steps.

    Looks at one of its own first, so that libraries have made what they need before there is anything else.

    Raises:
        WeightsError: it fails on that; but want of memory, and a device that is lost, as they are.
    """

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.error: Exception | None = None
        """What the classifier failed with last."""
        self._in: queue.SimpleQueue[tuple[Key, np.ndarray]] = queue.SimpleQueue()
        self._out: queue.SimpleQueue[tuple[Key, bool | None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="safety", daemon=True).start()
        self.submit(("", None), bytes(64 * 64 * 3), 64, 64)
        if not [key for key, flagged in self.verdicts(WARM_UP) if flagged is not None]:
            if self.error is not None and (memory.is_exhausted(self.error) or memory.is_fatal(self.error)):
                raise self.error
            raise WeightsError(
                "The safety checker fails on a picture; the log says how. Choose another with --safety-model, or set "
                "--safety-checker off."
            )

    def submit(self, key: Key, pixels: bytes, width: int, height: int) -> None:
        """Has a picture looked at: RGB rows, `width` · `height` of them."""
        self._in.put((key, np.frombuffer(pixels, np.uint8).reshape(height, width, 3)))

    def verdicts(self, patience: float) -> list[tuple[Key, bool | None]]:
        """What has been decided: key, and whether flagged, or None where the classifier failed. Waits at most
        `patience` seconds for the first."""
        found: list[tuple[Key, bool | None]] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._out.get(timeout=patience))
            while True:
                found.append(self._out.get_nowait())
        return found

    def _run(self) -> None:
        with of_its_own(self.classifier.device):
            self._decide()

    def _decide(self) -> None:
        while True:
            batch = [self._in.get()]
            while len(batch) < AT_ONCE and not self._in.empty():
                batch.append(self._in.get())
            for key, flagged in zip([key for key, _ in batch], self._look([p for _, p in batch]), strict=True):
                self._out.put((key, flagged))

    def _look(self, pictures: list[np.ndarray]) -> Sequence[bool | None]:
        """All at once, or where that fails, for want of memory say, one by one."""
        try:
            return self.classifier.flagged(pictures)
        except Exception as error:  # the thread's boundary
            self.error = error
            if len(pictures) > 1:
                return [verdict for picture in pictures for verdict in self._look([picture])]
            log.exception("the safety checker failed on a picture, which is not given out")
            return [None]


def of_its_own(device: str) -> contextlib.AbstractContextManager[object]:
    """On a GPU a stream beside the steps', which go first in the common one: a verdict would wait for two of them."""
    if torch.device(device).type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device, priority=-1))
