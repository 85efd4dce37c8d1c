"""A checked request as the engine's jobs, and the engine's pixels as the files that were asked for.

Shared by the server and `flux-local generate`, so that both draw the same bytes. Knows neither HTTP nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from flux_local import images
from flux_local.admission import NOTHING, Amount
from flux_local.errors import InvalidImage, NotAvailable
from flux_local.messages import Job
from flux_local.params import GenerationParams
from flux_local.sizes import Size

Decoded = tuple[int, int, bytes]
"""Width, height and rows of a picture or a mask."""


@dataclass(frozen=True)
class Source:
    """What an edit starts from: RGB, and a mask (L, not 0 where to repaint) of the same size."""

    image: Image.Image
    mask: Image.Image | None = None

    @classmethod
    def of(cls, image: Decoded, mask: Decoded | None) -> Source:
        """Of what the decoder gives.

        Raises:
            InvalidImage: the mask has another size.
        """
        if mask is not None and mask[:2] != image[:2]:
            raise InvalidImage("The mask must have the image's size.", param="mask")
        return cls(Image.frombytes("RGB", image[:2], image[2]), mask and Image.frombytes("L", mask[:2], mask[2]))

    def at(self, size: Size) -> Source:
        """Both at a size, cropped at the centre where the ratio differs. Computes on pixels."""
        return Source(images.covering(self.image, size), self.mask and images.covering(self.mask, size))


@dataclass(frozen=True)
class Plan:
    """What has to be drawn. `on_canvas` and `file` compute on pixels: keep them off an event loop, and `job` until the
    first has been computed.

    Args:
        model: the loaded model's name, for the picture's metadata.
        metadata: whether a PNG tells its prompt and parameters.
        adapters: where the params' adapters are, as a job has them.
        check: whether the safety checker looks at the pictures.
    """

    params: GenerationParams
    source: Source | None
    model: str
    metadata: bool = True
    adapters: tuple[tuple[str, float, int], ...] = ()
    check: bool = False

    @cached_property
    def original(self) -> Source | None:
        """The source at the delivered size."""
        return self.source and self.source.at(self.params.delivered)

    @cached_property
    def on_canvas(self) -> tuple[bytes | None, bytes | None]:
        """RGB rows to start from and what to repaint of them, where there is such: the same for all pictures."""
        params, original = self.params, self.original
        if original is None or self.untouched or (params.strength == 1 and original.mask is None):
            return None, None
        layers = (original.image, original.mask)
        image, mask = (
            None if layer is None else images.on_canvas(layer, params.canvas, params.delivered).tobytes()
            for layer in layers
        )
        return image, mask

    @property
    def untouched(self) -> bool:
        """Strength 0: the answer is the source itself, and nothing is to be drawn."""
        return self.source is not None and self.params.strength == 0

    @property
    def amount(self) -> Amount:
        """Of all pictures together."""
        if self.untouched:
            return NOTHING
        params, count = self.params, len(self.params.seeds)
        tokens, rows = params.canvas.tokens, 1 if params.negative_prompt is None else 2
        decodings = 1 + (params.partial_images if params.stream else 0)
        return Amount(count, tokens * rows * params.steps_computed * count, tokens * decodings * count)

    def job(self, id: str, index: int, owner: str = "", deadline: float | None = None) -> Job:
        """The job of picture `index`.

        Args:
            deadline: on the machine's monotonic clock.
        """
        params, (image, mask) = self.params, self.on_canvas
        return Job(
            id=id,
            prompt=params.prompt,
            prompt_2=params.prompt_2,
            max_length=params.max_length,
            seed=params.seeds[index],
            width=params.canvas.width,
            height=params.canvas.height,
            steps=params.steps,
            guidance=params.guidance,
            negative_prompt=params.negative_prompt,
            true_cfg_scale=params.true_cfg_scale,
            image=image,
            mask=mask,
            skip=params.steps - params.steps_run if image is not None else 0,
            partials=params.partial_images if params.stream else 0,
            owner=owner,
            deadline=deadline,
            go_fast=params.go_fast,
            computed=params.computed,
            loras=self.adapters,
            check=self.check,
        )

    def file(self, index: int, pixels: bytes | None = None) -> bytes:
        """The file of picture `index` from its canvas's RGB rows; what a mask keeps is the source's own pixels.

        Without pixels, the source's.
        """
        original = self.original
        if pixels is None:
            assert original is not None
            picture = original.image
        else:
            picture = images.delivered(pixels, self.params.canvas, self.params.delivered)
            if original is not None and original.mask is not None:
                picture = images.keep_unmasked(picture, original.image, original.mask)
        text = images.parameters_text(self.params, self.params.seeds[index], self.model) if self.metadata else None
        return images.encode(picture, self.params, text)


def check_of(params: GenerationParams, has_checker: bool, optional: bool) -> bool:
    """Whether the safety checker looks at a request's pictures.

    Args:
        optional: whether a request may turn it off.

    Raises:
        NotAvailable: the request asks for a checker where there is none, or for none where that is not allowed.
    """
    if params.check and not has_checker:
        raise NotAvailable(
            "This server has no safety checker. Leave 'enable_safety_checker' out.", param="enable_safety_checker"
        )
    if params.check is False and has_checker and not optional:
        raise NotAvailable(
            "This server looks at every picture. Leave 'enable_safety_checker' and 'disable_safety_checker' out.",
            param="enable_safety_checker",
        )
    return has_checker and params.check is not False


def precision_of(params: GenerationParams, loaded: Sequence[str]) -> str:
    """What a request is drawn in, of the precisions that are loaded.

    Raises:
        NotAvailable: it asks for another.
    """
    if params.go_fast == (loaded[0] == "fp8"):
        return loaded[0]
    if params.go_fast and "fp8" in loaded:
        return "fp8"
    raise NotAvailable(f"Only {loaded[0]} is loaded. Leave 'go_fast' out.", param="go_fast")
