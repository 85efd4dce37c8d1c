"""The server answers while it works: encoding and decoding never hold up the event loop."""

from __future__ import annotations

import concurrent.futures
import time

import httpx
import pytest

from tests.servers import Server


@pytest.mark.alone
def test_health_answers_while_large_pictures_are_encoded(server: Server) -> None:
    """Four pictures of four megapixels at once: of the time that /health takes, under half is in slow answers. Were the
    loop held up, it would be nearly all."""
    body = {"prompt": "x", "size": "2048x2048", "steps": 1, "response_format": "b64_json"}
    seconds, started = [], time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(4) as pool, httpx.Client() as client:
        working = [pool.submit(server.post, {**body, "seed": i}) for i in range(8)]
        while not all(work.done() for work in working):
            began = time.perf_counter()
            assert client.get(server.url + "/health").status_code == 200
            seconds.append(time.perf_counter() - began)
            time.sleep(0.005)
        assert all(work.result().status_code == 200 for work in working)
    slow = [second for second in seconds if second > 0.05]
    assert sum(slow) < 0.5 * (time.perf_counter() - started), slow
