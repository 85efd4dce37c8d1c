"""What schemathesis has to know beyond the document: what a picture is, and what no schema can say."""

from __future__ import annotations

import base64
import io
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode

from flux_local.parameters import BY_NAME, MAX_SEED


def png(mode: str, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG")
    return out.getvalue()


# One size, so that any mask fits any image; RGBA, so that each will do as a mask.
PICTURES = [png("RGBA", (48, 32))]
schemathesis.openapi.format("binary", st.sampled_from(PICTURES))
schemathesis.openapi.format(
    "image-data-url",
    st.sampled_from([f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in PICTURES]),
)


HANG_ON_THE_SERVER = ("loras", "lora_weights", "lora_scale", "enable_safety_checker", "disable_safety_checker")
"""Good input or not by what a server has; the suite's has no adapters and no checker."""


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Of several names for one parameter, good input has one; and the generator rounds integers over the limit."""
    if not isinstance(case.body, dict) or case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    for name in HANG_ON_THE_SERVER:
        case.body.pop(name, None)
    taken: set[str] = set()
    for name, value in list(case.body.items()):
        meant = BY_NAME[name].name if name in BY_NAME else name
        meant = "resolution" if meant == "megapixels" else meant
        if value is not None and meant in taken:
            del case.body[name]
        elif value is not None:
            taken.add(meant)
    if isinstance(case.body.get("seed"), int):
        case.body["seed"] = min(case.body["seed"], MAX_SEED)
