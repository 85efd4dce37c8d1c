"""What the server says of itself: its models, whether it lives and is ready, its counts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from flux_local.api import schema
from flux_local.api.work import Services
from flux_local.errors import Draining, EngineRestarting, ModelNotFound, NotReady
from flux_local.metrics import CONTENT_TYPE
from flux_local.params import PUBLIC_NAME


def model_routes(services: Services) -> APIRouter:
    """The names that the server answers to, without prefix."""
    routes = APIRouter()

    @routes.get("/models", responses=schema.answers(schema.MODELS))
    async def models(request: Request) -> dict[str, Any]:
        """The names of its own that this server answers to. `?schema=true` adds the parameters."""
        names = dict.fromkeys((PUBLIC_NAME, services.model.name))
        return {"object": "list", "data": [model_object(services, request, name) for name in names]}

    @routes.get("/models/{name:path}", responses=schema.answers(schema.MODEL))
    async def model(request: Request, name: str) -> dict[str, Any]:
        """One model. `?schema=true` adds the parameters."""
        if not services.model.answers_to(name):
            raise ModelNotFound("This server has no such model; /v1/models lists what it has.")
        return model_object(services, request, name)

    return routes


def model_object(services: Services, request: Request, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": services.started,
        "owned_by": "flux-local",
    }
    if request.query_params.get("schema", "").lower() in ("true", "1"):
        found["parameters"] = schema.parameter_list(services.model)
    return found


def probes(services: Services) -> APIRouter:
    """Live and ready, for supervisors and balancers."""
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Live: the process answers."""
        return {"status": "ok"}

    @routes.get("/ready", responses=schema.answers(schema.ANY))
    async def ready() -> dict[str, Any]:
        """Ready: a warm-up picture has been drawn and the engine is there."""
        state = services.dispatcher.ready
        if services.dispatcher.draining:
            raise Draining("The server is stopping. Use another one, or ask again once it is back.", retry_after=5)
        if not services.dispatcher.started:
            raise NotReady("The model is loading. Ask again soon.", retry_after=5)
        if state is None:
            raise EngineRestarting("The engine is being replaced. Requests are taken, and wait for it.", retry_after=5)
        return {
            "status": "ready",
            "model": services.model.name,
            "device": state.device,
            "precision": state.precisions[0],
            "precisions": list(state.precisions),
            "attention": services.dispatcher.attentions,
            "memory": state.memory,
            "safety_checker": services.has_checker,
            "engines": [
                {"device": engine.ready.device if engine.ready else engine.device, "ready": engine.ready is not None}
                for engine in services.dispatcher.engines
            ],
            "load_seconds": round(state.load_seconds, 3),
            "weights_bytes": state.weights_bytes,
            "warm_up_seconds": round(state.warm_up_seconds, 3),
            "step_seconds": round(state.step_seconds, 4),
        }

    @routes.get("/metrics", responses=schema.METRICS_ANSWERS)
    async def metrics() -> Response:
        """Counts, seconds and the state, in Prometheus' text format."""
        return Response(services.metrics.text(), headers={"content-type": CONTENT_TYPE})

    return routes
