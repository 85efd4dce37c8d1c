"""Values that came as text, from a multipart form or a command line, as what they mean. Checks nothing."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from flux_local.config import NO, YES
from flux_local.parameters import BY_NAME, Kind

NUMBER = r"-?([0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})([eE][-+]?[0-9]{1,2})?"


def from_form(fields: Mapping[str, str]) -> dict[str, Any]:
    """Multipart's strings as the values they mean: "true", "1", "0.7". What means nothing stays a string.

    An empty string is a prompt that is empty, and any other parameter that was not given.
    """
    found: dict[str, Any] = {}
    for name, text in fields.items():
        kind = BY_NAME[name].kind if name in BY_NAME else "string"
        if text == "" and name not in ("prompt", "prompt_2", "negative_prompt"):
            continue
        found[name] = form_value(kind, text.strip() if kind != "string" else text)
    return found


def form_value(kind: Kind, text: str) -> Any:
    match kind:
        case "integer" if re.fullmatch(r"-?[0-9]{1,20}(\.0{1,20})?", text):
            return int(text.partition(".")[0])
        case "integer" if re.fullmatch(NUMBER, text) and float(text).is_integer():
            return int(float(text))
        case "number" if re.fullmatch(NUMBER, text):
            return float(text)
        case "boolean" if text.lower() in YES:
            return True
        case "boolean" if text.lower() in NO:
            return False
        case "list":
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(text)
                json.dumps(found, ensure_ascii=False).encode()  # half of a character, which no file is named by
                return found
    return text
