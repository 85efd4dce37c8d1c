"""The OpenAPI document's parts, read off the parameter table."""

from __future__ import annotations

from typing import Any

from flux_local.parameters import MAX_LORA_SCALE, MAX_LORAS, Parameter, Route, default_of
from flux_local.params import ModelInfo, table_for

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

IMAGES = {
    "type": "object",
    "required": ["created", "data"],
    "properties": {
        "created": {"type": "integer"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "url": {"type": "string"},
                    "b64_json": {"type": "string"},
                    "revised_prompt": {"type": "string"},
                    "seed": {"type": "integer"},
                },
            },
        },
        "flagged": {"type": "integer", "description": "Pictures that the safety checker left out."},
        "size": {"type": "string"},
        "output_format": {"type": "string"},
        "quality": {"type": "string"},
        "background": {"type": "string"},
        "usage": {"type": "object"},
        "timings": {"type": "object"},
        "id": {"type": "string"},
    },
}


def json_answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


ANY: dict[str, Any] = {"type": "object"}
ENTRY: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "status", "created", "route", "params"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "image.request"},
        "status": {"enum": ["queued", "running", "succeeded", "failed", "cancelled"]},
        "created": {"type": "integer"},
        "finished": {"type": "integer"},
        "route": {"type": "string"},
        "params": {"type": "object"},
        "progress": {
            "type": "object",
            "properties": {
                "step": {"type": "integer"},
                "steps": {"type": "integer"},
                "queue_position": {"type": "integer"},
                "seconds_left": {"type": "number"},
            },
        },
        "response": IMAGES,
        "error": {"type": "object"},
        "deleted": {"type": "boolean"},
    },
}
MODEL: dict[str, Any] = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": {"type": "string"},
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string"},
        "parameters": {"type": "array", "items": {"type": "object"}},
    },
}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": item},
            "has_more": {"type": "boolean"},
        },
    }


PAGING = {
    "parameters": [
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 100}},
        {"name": "after", "in": "query", "schema": {"type": "string"}},
    ]
}


ENTRIES, MODELS = listed(ENTRY), listed(MODEL)
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": json_answer("The request is at fault.", ERROR),
    "5XX": json_answer("The server is at fault.", ERROR),
}
FILE_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The picture.", "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}},
    304: {"description": "The client has it."},
    **ERRORS,
}
METRICS_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **ERRORS,
}

LORA = {
    "type": "object",
    "required": ["path"],
    "properties": {
        "path": {"type": "string"},
        "scale": {"type": "number", "minimum": -MAX_LORA_SCALE, "maximum": MAX_LORA_SCALE},
    },
}


IMAGES_GIVEN = {
    "type": "array",
    "minItems": 1,
    "maxItems": 1,
    "items": {
        "type": "object",
        "required": ["image_url"],
        "properties": {"image_url": {"type": "string", "format": "image-data-url"}},
    },
    "description": "`image`, as an object.",
}


def answers(schema: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    """What a route may answer: this schema, or without one the pictures, now, streamed or promised; and errors."""
    if schema is not None:
        return {200: json_answer("Found.", schema), **ERRORS}
    pictures = json_answer("The pictures.", IMAGES)
    pictures["content"]["text/event-stream"] = {}
    return {200: pictures, 202: json_answer("Accepted, with Prefer: respond-async.", ENTRY), **ERRORS}


def property_of(parameter: Parameter, required: bool) -> dict[str, Any]:
    """The JSON schema of one parameter: what is accepted and honoured. Null means not given."""
    kinds: dict[str, Any] = {
        "file": {"type": "string", "format": "binary"},
        "number or string": {"type": ["number", "string", "null"], "exclusiveMinimum": 0},
        "list": {"type": ["array", "null"], "items": LORA, "maxItems": MAX_LORAS},
    }
    found = kinds.get(parameter.kind) or {"type": [parameter.kind, "null"]}
    found["description"] = f"{parameter.description} Default: {parameter.default_in_words()}."
    if values := parameter.choices:
        found["enum"] = (
            [*values, *map(float, values), None] if parameter.kind == "number or string" else [*values, None]
        )
    if parameter.form is not None:
        found["pattern"] = f"^{parameter.form}$"
    if parameter.kind == "string" and parameter.high is not None:
        found["maxLength"] = int(parameter.high)
    elif parameter.low is not None and parameter.high is not None:
        found["minimum"], found["maximum"] = parameter.low, parameter.high
    if required:
        found["type"] = "string"
    return found


def object_of(route: Route, model: ModelInfo) -> dict[str, Any]:
    """All parameters of a route, with a model. That two names of one must agree is more than a schema can say."""
    rows = [parameter for parameter in table_for(model) if route in parameter.routes]
    required = [parameter.name for parameter in rows if parameter.required]
    if route == "variations":
        required.remove("prompt")
    return {
        "type": "object",
        "required": required,
        "properties": {
            name: property_of(row, row.name in required) for row in rows for name in (row.name, *row.aliases)
        },
        "additionalProperties": True,
    }


def for_form(schema: dict[str, Any]) -> dict[str, Any]:
    """For a form, whose fields are there or not."""
    for found in schema["properties"].values():
        if isinstance(found["type"], list):
            found["type"] = [kind for kind in found["type"] if kind != "null"]
        if "enum" in found:
            found["enum"] = [value for value in found["enum"] if value is not None]
    return schema


def json_body(route: Route, model: ModelInfo) -> dict[str, Any]:
    """The `requestBody` of a route that takes JSON alone."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": object_of(route, model)}}}}


def image_body(route: Route, model: ModelInfo) -> dict[str, Any]:
    """The `requestBody` of a route that takes a form with files, or JSON with data URLs."""
    in_json = object_of(route, model)
    for name in ("image", "mask"):
        if name in in_json["properties"]:
            in_json["properties"][name] = {
                "type": "string" if name == "image" else ["string", "null"],
                "format": "image-data-url",
                "description": "A data URL with base64.",
            }
    in_json["properties"]["images"] = IMAGES_GIVEN
    in_json["required"].remove("image")
    in_json["oneOf"] = [{"required": ["image"]}, {"required": ["images"]}]
    content = {
        "multipart/form-data": {"schema": for_form(object_of(route, model))},
        "application/json": {"schema": in_json},
    }
    return {"requestBody": {"required": True, "content": content}}


def parameter_list(model: ModelInfo) -> list[dict[str, Any]]:
    """The table, with the model's own defaults filled in: what `?schema=true` answers."""
    own = {
        "cfg_scale": model.default_guidance,
        "num_inference_steps": model.default_steps,
        "max_sequence_length": model.text_length,
    }
    found = []
    for row in table_for(model):
        entry: dict[str, Any] = {
            "name": row.name,
            "aliases": list(row.aliases),
            "type": row.kind,
            "required": row.required,
            "default": own.get(row.name, default_of(row.name)),
            "default_in_words": row.default_in_words(),
            "handling": row.handling,
            "modes": list(row.routes),
            "description": row.description,
        }
        if row.low is not None and row.high is not None:
            entry |= {"minimum": row.low, "maximum": row.high}
        if row.choices:
            entry["values"] = list(row.choices)
        if row.examples:
            entry["examples"] = list(row.examples)
        found.append(entry)
    return found
