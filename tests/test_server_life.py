"""Start, stop, and what goes wrong in between: exit codes, keys, an engine that dies."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.servers import MODEL, Server, environment, eventually, pictures, running, started

QUICK = {"prompt": "x", "size": "128x128", "steps": 2}


def exit_of(folder: Path, *flags: str, **env: str) -> tuple[int, str]:
    """Exit code and output of a server that cannot start."""
    with started(folder, *flags, **env) as server:
        return server.process.wait(60), server.output


def test_bad_settings_exit_2(tmp_path: Path) -> None:
    assert exit_of(tmp_path, "--max-pixels", "few")[0] == 2
    for host in ("0.0.0.0", "example.org"):
        code, output = exit_of(tmp_path, "--host", host)
        assert (code, "API keys" in output) == (2, True), host
    code, output = exit_of(tmp_path, "--host", "203.0.113.7", "--allow-anonymous", "true")
    assert (code, "203.0.113.7" in output) == (2, True)
    for address in ("pictures.example", "https://[x", "ftp://pictures.example", "https://"):
        code, output = exit_of(tmp_path, "--public-url", address)
        assert (code, "Traceback" in output) == (2, False), address
    code, output = exit_of(tmp_path, FLUX_LOCAL_PROT="1")
    assert code == 2
    assert "prot" in output
    assert "Traceback" not in output


def test_missing_and_damaged_weights_exit_4(tmp_path: Path) -> None:
    code, output = exit_of(tmp_path, "--model", "nothing-here")
    assert code == 4
    assert "nothing-here" in output
    code, output = exit_of(tmp_path, "--model", "FLUX.1-Krea-dev")
    assert code == 4
    assert "flux-local download black-forest-labs/FLUX.1-Krea-dev" in output
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text((MODEL / "model_index.json").read_text())
    code, output = exit_of(tmp_path, "--model", str(broken))
    assert code == 4
    assert "scheduler" in output
    assert "flux-local download" in output
    assert "Traceback" not in output


def test_a_second_server_leaves_the_first_alone(tmp_path: Path, server: Server) -> None:
    port = server.url.rpartition(":")[2]
    code, output = exit_of(tmp_path, "--port", port)
    assert code == 3
    assert "--port" in output
    data = server.log.parent / "data"
    began = time.monotonic()
    code, output = exit_of(tmp_path, "--data-dir", str(data))
    assert code == 3
    assert "--data-dir" in output
    assert time.monotonic() - began < 10
    assert httpx.get(server.url + "/ready").status_code == 200


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("locked"), FLUX_LOCAL_API_KEYS="key-one,key-two") as server:
        yield server


class TestKeys:
    def test_every_route_but_the_probes_wants_a_key(self, locked: Server) -> None:
        document = httpx.get(locked.url + "/openapi.json", headers={"authorization": "Bearer key-one"}).json()
        paths = [*document["paths"], "/openapi.json", "/docs", "/nothing", "/web"]
        paths += [p.removeprefix("/v1") for p in document["paths"] if p.startswith("/v1")]
        paths += ["/openai" + p for p in document["paths"] if p.startswith("/v1")]
        assert len(paths) > 10
        for path in paths:
            if path in ("/health", "/ready"):
                assert httpx.get(locked.url + path).status_code == 200
                continue
            for look_alike in (
                path,
                "/" + path,
                path.upper(),
                path + "/",
                "/" + path[1:].replace("/", "%2f"),
                path + "/health",
            ):
                for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
                    answer = httpx.request(method, locked.url + (look_alike or "/"))
                    assert answer.status_code == 401, (method, look_alike)
                    assert answer.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize(
        "header",
        ["", "key-one", "Basic key-one", "Bearer", "Bearer wrong", "Bearer key-one,key-two", "Bearer KEY-ONE",
         "Bearer \xe9\xff", "Bearer " + "x" * 50_000],
    )  # fmt: skip
    def test_wrong_keys(self, locked: Server, header: str) -> None:
        answer = httpx.get(locked.url + "/v1/models", headers=[(b"authorization", header.encode("latin-1"))])
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"

    def test_right_keys(self, locked: Server) -> None:
        for key in ("key-one", "key-two"):
            with locked.client(key) as client:
                answer = client.images.generate(prompt="x", size="128x128", extra_body={"steps": 1})
            assert answer.data
            assert answer.data[0].url
            assert httpx.get(answer.data[0].url).status_code == 200, "a file's URL carries its own id"
        assert httpx.get(locked.url + "/v1/models", headers={"authorization": "bearer key-one"}).status_code == 200

    def test_no_url_says_what_a_client_claims_to_have_reached(self, locked: Server) -> None:
        claims = {"host": "evil.example", "x-forwarded-host": "evil.example", "x-forwarded-proto": "https"}
        answer = locked.post(QUICK, headers={"authorization": "Bearer key-one", **claims})
        assert answer.json()["data"][0]["url"].startswith(locked.url + "/v1/images/files/")

    def test_the_line_to_try_asks_for_a_key(self, locked: Server) -> None:
        assert "-H 'Authorization: Bearer YOUR_KEY'" in locked.output

    def test_nothing_secret_in_the_log(self, locked: Server) -> None:
        prompt = "canary-prompt-77"
        made = locked.post({**QUICK, "prompt": prompt}, headers={"authorization": "Bearer key-one"})
        answer = made.json()
        name = answer["data"][0]["url"].rpartition("/")[2]
        fetched = httpx.get(answer["data"][0]["url"])
        for response in (made, fetched):
            eventually(lambda id=response.headers["x-request-id"]: id in locked.output)
        assert "/images/files/" in locked.output
        locked.post({**QUICK, "prompt": prompt}, headers={"authorization": "Bearer canary-key-88"})
        for secret in ("key-one", "canary-key-88", prompt, name.partition(".")[0]):
            assert secret not in locked.output


def test_browsers_of_named_origins_only(tmp_path: Path, server: Server) -> None:
    ask = {"origin": "https://studio.example", "access-control-request-method": "POST",
           "access-control-request-headers": "authorization, content-type"}  # fmt: skip
    for headers in (ask, {**ask, "origin": "null"}):
        answer = httpx.options(server.url + "/v1/images/generations", headers=headers)
        assert "access-control-allow-origin" not in answer.headers
    env = {"FLUX_LOCAL_API_KEYS": "k", "FLUX_LOCAL_CORS_ORIGINS": "https://studio.example,http://localhost:3000"}
    with running(tmp_path, **env) as own:
        answer = httpx.options(own.url + "/v1/images/generations", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://studio.example"
        assert "access-control-allow-credentials" not in answer.headers
        headers = {"origin": "https://evil.example", "authorization": "Bearer k"}
        answer = httpx.get(own.url + "/v1/models", headers=headers)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


def test_without_keys_it_is_for_its_own_machine(tmp_path: Path, server: Server) -> None:
    """A page whose name was made to lead here is of its own origin to a browser; a form may come from any page."""
    url, own = server.url + "/v1/models", server.url.removeprefix("http://")
    port = own.rpartition(":")[2]
    for host in (own, "localhost", f"localhost:{port}", "[::1]:80", "app.localhost"):
        assert httpx.get(url, headers={"host": host}).status_code == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example"):
        assert httpx.get(url, headers={"host": host}).status_code == 400, host
        assert httpx.get(server.url + "/health", headers={"host": host}).status_code == 200
    for origin, status in ((server.url, 200), ("https://evil.example", 400), ("null", 400)):
        assert server.post(QUICK, headers={"origin": origin}).status_code == status, origin
    proxied = {"origin": "http://localhost:5173", "sec-fetch-site": "same-origin"}
    assert server.post(QUICK, headers=proxied).status_code == 200, "a proxy of the page's own says another Host"
    with running(tmp_path, "--public-url", "https://pictures.example/flux") as named:
        headers = {"host": "pictures.example", "origin": "https://pictures.example"}
        assert named.post(QUICK, headers=headers).status_code == 200
        assert named.post(QUICK, headers={"origin": "https://pictures.example"}).status_code == 200
        assert httpx.get(named.url + "/v1/models", headers={"host": "evil.example"}).status_code == 400
    flags = ("--allow-anonymous", "--public-url", "https://pictures.example", "--cors-origins", "app://Notes")
    with running(tmp_path, "--host", "0.0.0.0", "--response-format", "b64_json", *flags) as anybodys:
        reached = anybodys.url.replace("0.0.0.0", "127.0.0.1") + "/v1/models"
        assert httpx.get(reached, headers={"host": "gpu-box"}).status_code == 200
        assert httpx.get(reached, headers={"host": "evil.example"}).status_code == 400, "it has a name"
        assert httpx.get(reached, headers={"host": "gpu-box", "origin": "http://evil.example"}).status_code == 400
        for origin in ("https://pictures.example", "app://notes"):
            assert httpx.get(reached, headers={"host": "inside:8000", "origin": origin}).status_code == 200
        asked = reached.replace("models", "images/generations")
        assert pictures(httpx.post(asked, json=QUICK, timeout=60)), "the server's own form of answer"


def test_the_data_directory_is_nobody_elses(tmp_path: Path) -> None:
    with running(tmp_path):
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_nor_is_what_it_puts_into_a_folder_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    with running(tmp_path) as server:
        assert server.post({**QUICK, "response_format": "url"}).status_code == 200
        assert list((tmp_path / "data" / "files").glob("*.png"))
        found = list((tmp_path / "data").iterdir())
        assert len(found) >= 5, "files, history with its log and index, lock"
        assert all(path.stat().st_mode & 0o077 == 0 for path in found)


def test_the_engine_dies_with_its_server(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        engine = server.engine()
        server.process.kill()
        gone, _ = psutil.wait_procs([engine], timeout=30)
        assert gone


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_drains_and_exits_0(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path) as server:
        engine = server.engine()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.post, {**QUICK, "steps": 100, "n": 10})
            eventually(lambda: engine.cpu_percent(0.1) > 20)
            server.process.send_signal(number)
            eventually(lambda: server.post(QUICK).status_code == 503)
            refused = server.post(QUICK)
            assert (refused.json()["error"]["code"], refused.headers["retry-after"]) == ("draining", "5")
            engine.send_signal(signal.SIGTERM)  # as a service manager does, to all processes at once
            assert answer.result().status_code == 200
        assert server.process.wait(20) == 0
        assert not engine.is_running()
        assert "Traceback" not in server.output


def test_a_second_signal_waits_for_nobody(tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_FAULTS="slow seconds=0.5") as server, \
            concurrent.futures.ThreadPoolExecutor(1) as pool:  # fmt: skip
        answer = pool.submit(server.post, {**QUICK, "steps": 100})
        idle = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        idle.sendall(b"POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                     b"content-length: 1000\r\n\r\n{")  # fmt: skip
        eventually(lambda: httpx.get(server.url + "/v1/images/requests").json()["data"])
        server.process.send_signal(signal.SIGINT)
        eventually(lambda: "again to stop at once" in server.output)
        server.process.send_signal(signal.SIGINT)
        refused = answer.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert server.process.wait(20) == 0
        idle.close()


@pytest.mark.slow
def test_files_outlive_a_kill(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        answer = server.post({**QUICK, "seed": 1}).json()
        before = httpx.get(answer["data"][0]["url"]).content
        server.process.kill()
        server.process.wait()
    with running(tmp_path) as server:
        name = answer["data"][0]["url"].rpartition("/")[2]
        assert httpx.get(f"{server.url}/v1/images/files/{name}").content == before


def test_until_it_is_ready_it_says_so(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with started(tmp_path, "--port", str(port)) as server:
        server.url = f"http://127.0.0.1:{port}"

        def refused() -> httpx.Response | None:
            with contextlib.suppress(httpx.ConnectError):
                return httpx.get(server.url + "/ready", timeout=30)
            return None

        eventually(lambda: refused() is not None)
        later = {"prefer": "respond-async", "idempotency-key": "once"}
        for answer in (
            refused(), server.post(QUICK), server.post({**QUICK, "stream": True}), server.post(QUICK, headers=later),
            server.post("not even read", "/v1/images/edits"),
        ):  # fmt: skip
            assert answer is not None
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert int(answer.headers["retry-after"]) > 0
        assert httpx.get(server.url + "/health").status_code == 200
        server.wait_ready()
        assert server.post(QUICK).status_code == 200
        assert server.post(QUICK, headers=later).status_code == 202, "what was refused is not kept"


def test_urls_of_the_public_address_until_they_expire(tmp_path: Path) -> None:
    with running(tmp_path, "--public-url", "https://pictures.example/flux/", "--url-lifetime", "60") as server:
        made, promised = server.post(QUICK).json(), server.post(QUICK, headers={"prefer": "respond-async"})
        base = "https://pictures.example/flux/v1/images/"
        assert promised.headers["location"].startswith(base + "requests/req_")
        assert made["data"][0]["url"].startswith(base + "files/")
        name = made["data"][0]["url"].rpartition("/")[2]
        url, file = f"{server.url}/v1/images/files/{name}", tmp_path / "data" / "files" / name
        assert httpx.get(url).content == file.read_bytes()
        for age, status in ((50, 200), (61, 404)):
            os.utime(file, (time.time() - age,) * 2)
            assert httpx.get(url).status_code == status
        servers = httpx.get(server.url + "/openapi.json").json()["servers"]
        assert servers == [{"url": "https://pictures.example/flux"}], "'Try it out' in /docs calls there"


@pytest.mark.alone
def test_start_is_quick_and_small(tmp_path: Path) -> None:
    """To ready in under 12 s and 1.5 GB in all, from the command to the first answer; nothing of others' noise. The
    best of up to five starts: what else a machine does only ever adds."""
    for _ in range(5):
        try:
            start_is_quick_and_small(tmp_path)
            return
        except AssertionError as error:
            failure = error
    raise failure


def start_is_quick_and_small(tmp_path: Path) -> None:
    libraries = subprocess.run(
        [sys.executable, "-c", "import time; t = time.monotonic(); import torch; print(time.monotonic() - t)"],
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    began = time.monotonic()
    with running(tmp_path) as server:
        seconds = time.monotonic() - began
        processes = [psutil.Process(server.process.pid), server.engine()]
        memory = sum(p.memory_full_info().uss for p in processes)
        lines = [line for line in server.output.splitlines() if line.strip()]
        loading = httpx.get(f"{server.url}/ready").json()["load_seconds"]
    assert seconds < 12, f"{seconds:.1f} s to ready"
    assert seconds - float(libraries.stdout) < 4, f"{seconds:.1f} s to ready, {libraries.stdout} s of it imports"
    assert loading < 1.5, f"{loading:.1f} s to load the weights"
    assert memory < 1.5e9
    assert len(lines) == 7, server.output
