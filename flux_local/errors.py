"""Everything that can go wrong, as one small tree, and the one table from error to HTTP answer.

Raised anywhere; turned into an answer in `api` and into an exit code in `cli`. Knows nothing of either.
"""

from __future__ import annotations

from typing import NamedTuple


class FluxError(Exception):
    """A failure that a user may read: what is wrong and what to do next. Never a traceback; a file's name only where
    the reader is who started the program (`StartError`), and of what a client sent nothing.

    Args:
        message: one or two sentences for the user.
        param: the request parameter at fault, if it is one.
        retry_after: seconds after which another try makes sense.
        final: whether the same request would meet it again.
    """

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None, final: bool = False
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.final = final


class RequestError(FluxError):
    """The request is at fault."""


class InvalidValue(RequestError):
    pass


class MissingParameter(RequestError):
    pass


class InvalidJson(RequestError):
    pass


class InvalidImage(RequestError):
    pass


class NotAvailable(RequestError):
    """A parameter or route that this version or this server's configuration does not offer."""


class ModelNotFound(RequestError):
    pass


class NotFound(RequestError):
    pass


class MethodNotAllowed(RequestError):
    pass


class UnsupportedMediaType(RequestError):
    pass


class RequestTooLarge(RequestError):
    pass


class DeadlineExceeded(RequestError):
    """The time that the client gave has passed."""


class TryLater(DeadlineExceeded):
    """It has passed, but the same request may be in time when it comes again."""


class InvalidApiKey(RequestError):
    pass


class ModerationBlocked(RequestError):
    """The safety checker left out every picture of a request."""


class IdempotencyKeyReused(RequestError):
    """One key, two different requests."""


class RateLimited(FluxError):
    pass


class Cancelled(FluxError):
    """The client went away, or the request was deleted."""


class NotReady(FluxError):
    pass


class Draining(NotReady):
    """The server is stopping."""


class EngineRestarting(FluxError):
    pass


class GenerationInvalid(FluxError):
    """The model produced non-finite values."""


class InternalError(FluxError):
    pass


class RequestCrashes(InternalError):
    """Engines ended on this request, twice and more; it is refused for a while, so that others do not end with it."""

    def __init__(self) -> None:
        super().__init__("The engine ended on this very request each time. Change it, or ask the server's operator.")


class StorageFull(FluxError):
    pass


class StartError(FluxError):
    """The process cannot start or go on; `exit_code` is what it ends with."""

    exit_code = 1


class SettingsError(StartError):
    exit_code = 2


class AlreadyTaken(StartError):
    """The port or the data directory belongs to another process."""

    exit_code = 3


class WeightsError(StartError):
    """Weights are missing or damaged."""

    exit_code = 4


FETCH_AGAIN = "Copy it again, or run `flux-local download REPOSITORY --to FOLDER`, with where the model came from."
"""What to do about damaged weights of which nothing says where they came from."""


class EngineDead(StartError):
    """The engine cannot be brought back."""

    exit_code = 70


class Answer(NamedTuple):
    """How an error looks over HTTP."""

    status: int
    type: str
    code: str


ANSWERS: dict[type[FluxError], Answer] = {
    InvalidValue: Answer(400, "invalid_request_error", "invalid_value"),
    MissingParameter: Answer(400, "invalid_request_error", "missing_required_parameter"),
    InvalidJson: Answer(400, "invalid_request_error", "invalid_json"),
    InvalidImage: Answer(400, "invalid_request_error", "invalid_image"),
    NotAvailable: Answer(400, "invalid_request_error", "not_available"),
    ModerationBlocked: Answer(400, "image_generation_user_error", "moderation_blocked"),
    InvalidApiKey: Answer(401, "invalid_request_error", "invalid_api_key"),
    ModelNotFound: Answer(404, "invalid_request_error", "model_not_found"),
    NotFound: Answer(404, "invalid_request_error", "not_found"),
    DeadlineExceeded: Answer(408, "invalid_request_error", "deadline_exceeded"),
    MethodNotAllowed: Answer(405, "invalid_request_error", "method_not_allowed"),
    UnsupportedMediaType: Answer(415, "invalid_request_error", "unsupported_media_type"),
    RequestTooLarge: Answer(413, "invalid_request_error", "request_too_large"),
    IdempotencyKeyReused: Answer(422, "invalid_request_error", "idempotency_key_reused"),
    RateLimited: Answer(429, "rate_limit_error", "rate_limit_exceeded"),
    Cancelled: Answer(499, "client_closed_request", "cancelled"),
    GenerationInvalid: Answer(500, "server_error", "generation_invalid"),
    InternalError: Answer(500, "server_error", "internal_error"),
    NotReady: Answer(503, "service_unavailable_error", "not_ready"),
    Draining: Answer(503, "service_unavailable_error", "draining"),
    EngineRestarting: Answer(503, "service_unavailable_error", "engine_restarting"),
    StorageFull: Answer(507, "server_error", "storage_full"),
}
"""Each leaf of the tree that can reach a client, once."""


def answer_for(error: FluxError) -> Answer:
    """The answer of the error's class or of its nearest listed ancestor; an unlisted one is an internal error."""
    for cls in type(error).__mro__:
        if cls in ANSWERS:
            return ANSWERS[cls]
    return ANSWERS[InternalError]


BY_CODE: dict[str, type[FluxError]] = {answer.code: error for error, answer in ANSWERS.items()}
"""From code to class, for errors that crossed the engine's pipe."""
