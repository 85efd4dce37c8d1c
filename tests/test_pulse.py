"""The page that an engine and its supervisor share."""

from __future__ import annotations

import subprocess
import sys
import time

from flux_local.pulse import SLOT, Phase, Pulse
from tests.servers import ROOT

WRITER = """
import sys
from flux_local.pulse import Phase, Pulse

pulse = Pulse(int(sys.argv[1]))
print("writing", flush=True)
while True:
    pulse.enter(Phase.STEP, tuple(range(1, 17)))
    pulse.enter(Phase.IDLE)
"""


def test_no_state_is_read_half_written() -> None:
    """A state of zeros would be one that has gone on since the machine's start: a hang, and the engine's end."""
    pulse = Pulse()
    command = [sys.executable, "-c", WRITER, str(pulse.descriptor)]
    with subprocess.Popen(command, pass_fds=[pulse.descriptor], stdout=subprocess.PIPE, cwd=ROOT) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"writing\n"
            began = time.monotonic()
            phases = set()
            for _ in range(100_000):
                phase, since, serials = pulse.read()
                phases.add(phase)
                assert since > began - 5
                assert serials == (() if phase is not Phase.STEP else tuple(range(1, 17)))
            assert {Phase.IDLE, Phase.STEP} <= phases
        finally:
            writer.kill()


def test_a_writer_that_stopped_half_way_leaves_the_state_before() -> None:
    pulse = Pulse()
    pulse.enter(Phase.STEP, (7,))
    other = 1 - pulse._page[0]
    pulse._page[1 + other * SLOT : 1 + (other + 1) * SLOT] = bytes(SLOT)
    state = pulse.read()
    assert (state.phase, state.serials) == (Phase.STEP, (7,))
