"""The noise levels of a run: evenly spaced, then shifted towards noise the more tokens a picture has.

FLUX.1's rule (Esser et al. 2024, arXiv 2403.03206, section 5.3.2), as diffusers' `FluxPipeline` and
`FlowMatchEulerDiscreteScheduler` compute it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flux_local.errors import WeightsError


@dataclass(frozen=True)
class FlowSchedule:
    """The part of `scheduler_config.json` that decides the sigmas."""

    use_dynamic_shifting: bool = True
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """From a `scheduler_config.json`.

        Raises:
            WeightsError: not flow matching, or with an option that FLUX.1 does not use.
        """
        if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
            raise WeightsError("The scheduler is not a flow-match Euler scheduler: this is no FLUX.1 model.")
        unsupported = [
            name
            for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
                         "shift_terminal", "stochastic_sampling")
            if config.get(name)
        ]  # fmt: skip
        if config.get("time_shift_type", "exponential") != "exponential":
            unsupported.append("time_shift_type")
        if unsupported:
            raise WeightsError(f"The scheduler asks for {', '.join(unsupported)}, which FLUX.1 does not use.")
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})

    def sigmas(self, steps: int, tokens: int) -> list[float]:
        """`steps` + 1 noise levels from 1 down to 0, in fp32 precision, for a picture of so many tokens."""
        sigmas: Any = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
        if self.use_dynamic_shifting:
            slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
            mu = tokens * slope + (self.base_shift - slope * self.base_image_seq_len)
            sigmas = math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1) ** 1.0)
        else:
            sigmas = self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        return [*sigmas.astype(np.float32).tolist(), 0.0]
