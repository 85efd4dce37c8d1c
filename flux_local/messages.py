"""What the API process and an engine process say to each other: typed structs, msgpack frames, one socket pair.

No pickle; pixels travel as raw bytes. Knows nothing of what either side does with a message.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from flux_local.errors import StartError

HEADER = struct.Struct("<I")


class Job(msgspec.Struct, frozen=True, tag=True):
    """One picture to draw. Sizes in pixels, multiples of 16.

    `image`: RGB rows of the canvas to start from, `skip` steps into the schedule. `mask`: a byte for each pixel of the
    canvas, not 0 where it is to be repainted. `partials`: how many pictures to send on the way. `owner`: whose it is,
    for fairness. `deadline`: when nobody wants it any more, on the machine's monotonic clock. `serial`: its number in
    the pulse. `alone`: it shares no batch, because one that it was in has crashed. `computed`: which of the steps that
    run are computed, the others extrapolated; empty for all. `loras`: paths of adapters, each with its
    scale and its version. `check`: the safety checker looks at what comes of it.
    """

    id: str
    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    image: bytes | None = None
    mask: bytes | None = None
    skip: int = 0
    prompt_2: str | None = None
    max_length: int | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    partials: int = 0
    owner: str = ""
    deadline: float | None = None
    serial: int = 0
    alone: bool = False
    go_fast: bool = False
    computed: tuple[bool, ...] = ()
    loras: tuple[tuple[str, float, int], ...] = ()
    check: bool = False

    @property
    def steps_computed(self) -> int:
        return sum(self.computed) if self.computed else self.steps - self.skip

    @property
    def canvas_tokens(self) -> int:
        return self.width * self.height // 256

    @property
    def rows(self) -> int:
        """Of a batch: two with real classifier-free guidance."""
        return 1 if self.negative_prompt is None else 2

    @property
    def tokens(self) -> int:
        """Image tokens of all rows."""
        return self.canvas_tokens * self.rows


class Cancel(msgspec.Struct, frozen=True, tag=True):
    id: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The warm-up picture is drawn.

    `precisions`: the model's own, then fp8, of those that are loaded; `attentions`: whose attention each has.
    `load_seconds`: without imports. `step_seconds`: a step of the picture at the model's 1:1 canvas, alone;
    `token_seconds`: an image token's share of that. `memory`: how the model is laid out, in words; `tier`: the name of
    that. `weights_bytes`: of the model's files.
    """

    device: str
    precisions: tuple[str, ...]
    attentions: tuple[str, ...]
    load_seconds: float
    warm_up_seconds: float
    step_seconds: float
    token_seconds: float
    memory: str
    tier: str
    weights_bytes: int


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    message: str
    exit_code: int

    def error(self) -> StartError:
        error = StartError(self.message)
        error.exit_code = self.exit_code
        return error


class Step(msgspec.Struct, frozen=True, tag=True):
    """A picture has gone one step further: `step` of `steps`, in so many seconds of the device."""

    id: str
    step: int
    steps: int
    seconds: float


class Partial(msgspec.Struct, frozen=True, tag=True):
    """The model's estimate of the finished picture at this point: RGB rows of the canvas."""

    id: str
    index: int
    pixels: bytes


class Done(msgspec.Struct, frozen=True, tag=True):
    """A finished picture: RGB rows of the canvas, and where its seconds went. `flagged`: left out, without rows.

    `beginning_s` and `decoding_s`: for how long the device was busy with this picture before and after its steps.
    """

    id: str
    pixels: bytes
    text_tokens: int
    prompt_read: str
    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    decoding_s: float
    beginning_s: float = 0.0
    flagged: bool = False
    cut: bool = False
    """A prompt was longer than its encoder reads."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`code` is one of `errors.BY_CODE`; `final` as in `FluxError`."""

    id: str
    code: str
    message: str
    param: str | None = None
    final: bool = False


ToEngine = Job | Cancel
FromEngine = Ready | StartFailed | Step | Partial | Done | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def later(message: ToEngine, seconds: float) -> ToEngine:
    """The message with its deadline moved: each machine's clock counts from its own start."""
    if isinstance(message, Job) and message.deadline is not None:
        return msgspec.structs.replace(message, deadline=message.deadline + seconds)
    return message


def frame(message: ToEngine | FromEngine) -> bytes:
    """Length and body, ready to send."""
    body = _encoder.encode(message)
    return HEADER.pack(len(body)) + body


def decode_from_engine(body: bytes) -> FromEngine:
    message: FromEngine = _from_engine.decode(body)
    return message


class EngineChannel:
    """The engine's end of the pair: sends whole frames, and reads them with or without waiting.

    Raises `EOFError` once the other side has gone.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = bytearray()

    def send(self, message: FromEngine) -> None:
        self.connection.setblocking(True)
        try:
            self.connection.sendall(frame(message))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error

    def receive(self, wait: bool) -> Iterator[ToEngine]:
        """Every message that has come; with `wait`, blocks until there is one."""
        messages = list(self._whole_frames())
        while True:
            self.connection.setblocking(wait and not messages)
            try:
                data = self.connection.recv(1 << 16)
            except BlockingIOError:
                break
            except ConnectionResetError as error:
                raise EOFError from error
            if not data:
                raise EOFError
            self.buffer += data
            messages.extend(self._whole_frames())
        yield from messages

    def _whole_frames(self) -> Iterator[ToEngine]:
        while len(self.buffer) >= HEADER.size:
            (length,) = HEADER.unpack_from(self.buffer)
            end = HEADER.size + length
            if len(self.buffer) < end:
                return
            body: Any = bytes(self.buffer[HEADER.size : end])
            del self.buffer[:end]
            yield _to_engine.decode(body)
