"""Engines on a cluster's machines: the same pictures, and nothing lost when a machine is."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from flux_local.config import Settings
from tests.servers import ROOT, Server, environment, eventually, pictures, running, started

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(300)]
# 192x192: pictures of more than 100 KB go through Ray's object stores, smaller ones with the call itself.
BODY = {"prompt": "a red star on a blue background", "size": "192x192", "response_format": "b64_json"}


class Cluster:
    """Machines that are all this one."""

    def __init__(self, machines: int) -> None:
        script = str(ROOT / "tests" / "cluster_nodes.py")
        self.process = subprocess.Popen(
            [sys.executable, script, str(machines)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment(PYTHONPATH=str(ROOT)),
        )  # fmt: skip
        self.address = self.said()

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def lose_a_machine(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.said() == "gone"

    def hosts(self) -> list[psutil.Process]:
        """The actors' processes."""
        every = psutil.process_iter(["cmdline"])
        return [process for process in every if (process.info["cmdline"] or [""])[0].startswith("ray::Host")]

    def close(self) -> None:
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with contextlib.closing(Cluster(3)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def server(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("cluster")
    with running(folder, "--cluster", cluster.address, "--devices", "cpu,cpu") as server:
        yield server


def engines(server: Server) -> list[bool]:
    """Whether each is ready."""
    answer = httpx.get(server.url + "/ready")
    return [engine["ready"] for engine in answer.json().get("engines", [])]


def falls(server: Server) -> float:
    """Of engines, by another's hand."""
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("flux_engine_falls_total") and "outside" in line
    )


def drawn(server: Server, seeds: range, steps: int = 8) -> list[str]:
    """A picture for each seed, all asked for at once."""
    bodies = [BODY | {"seed": seed, "num_inference_steps": steps} for seed in seeds]
    with ThreadPoolExecutor(len(bodies)) as pool:
        return [pictures(answer)[0] for answer in pool.map(server.post, bodies)]


def test_pictures_are_those_of_an_engine_here(server: Server, tmp_path: Path) -> None:
    assert engines(server) == [True, True]
    with running(tmp_path) as here:
        assert drawn(server, range(6)) == drawn(here, range(6))


def test_both_machines_draw(server: Server, cluster: Cluster) -> None:
    before = [sum(child.cpu_times().user for child in host.children()) for host in cluster.hosts()]
    drawn(server, range(100, 108))
    after = [sum(child.cpu_times().user for child in host.children()) for host in cluster.hosts()]
    assert len(before) == 2
    assert all(b > a for a, b in zip(before, after, strict=True))


def test_a_client_that_cancels_frees_the_distant_engine(server: Server) -> None:
    long = BODY | {"num_inference_steps": 100, "n": 10, "resolution": "1K"}
    answer = server.post(long, headers={"prefer": "respond-async"})
    assert answer.status_code == 202
    entry = server.url + answer.headers["location"].removeprefix(server.url)
    eventually(lambda: httpx.get(entry).json()["status"] == "running")
    httpx.delete(entry).raise_for_status()
    eventually(lambda: "flux_pictures_running 0.0" in httpx.get(server.url + "/metrics").text)
    drawn(server, range(1))


def test_an_engine_that_crashes_costs_one_retry(server: Server, cluster: Cluster) -> None:
    wanted = drawn(server, range(8), steps=28)
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(drawn, server, range(8), 28)
        eventually(lambda: "flux_pictures_running 0.0" not in httpx.get(server.url + "/metrics").text)
        cluster.hosts()[0].children()[0].kill()
        assert drawing.result() == wanted
    eventually(lambda: engines(server) == [True, True], 60)
    assert falls(server) == 1


def test_a_process_that_is_killed_costs_one_retry(server: Server, cluster: Cluster) -> None:
    wanted = drawn(server, range(8), steps=28)
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(drawn, server, range(8), 28)
        eventually(lambda: "flux_pictures_running 0.0" not in httpx.get(server.url + "/metrics").text)
        cluster.hosts()[0].kill()
        assert drawing.result() == wanted
    eventually(lambda: engines(server) == [True, True], 60)
    assert falls(server) == 2


def test_nothing_is_left_of_a_server_that_is_killed(server: Server, cluster: Cluster, tmp_path: Path) -> None:
    of_the_other = set(cluster.hosts())
    with running(tmp_path, "--cluster", cluster.address, "--devices", "cpu") as another:
        (host,) = set(cluster.hosts()) - of_the_other
        (engine,) = host.children()
        another.process.kill()
        eventually(lambda: not host.is_running() and not engine.is_running())
    assert set(cluster.hosts()) == of_the_other


def test_a_machine_that_is_lost_costs_one_retry(server: Server, cluster: Cluster) -> None:
    wanted = drawn(server, range(8), steps=28)
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(drawn, server, range(8), 28)
        eventually(lambda: "flux_pictures_running 0.0" not in httpx.get(server.url + "/metrics").text)
        cluster.lose_a_machine()
        assert drawing.result() == wanted
    eventually(lambda: engines(server) == [True, True], 60)  # on one of the other two


def test_no_cluster(tmp_path: Path) -> None:
    with started(tmp_path, "--cluster", "127.0.0.1:1") as server:
        assert server.process.wait(60) == 1
        assert "ray start --head" in server.output
        assert "Traceback" not in server.output


def test_more_gpus_than_there_are(cluster: Cluster, tmp_path: Path) -> None:
    with started(tmp_path, "--cluster", cluster.address, "--devices", "cuda,cuda") as server:
        assert server.process.wait(60) == 2
        assert "The cluster has 0 GPUs" in server.output


def test_settings_mean_the_same_in_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flux_local.cluster import for_others

    monkeypatch.chdir(tmp_path)
    (tmp_path / "checker").mkdir()
    (tmp_path / "checker" / "config.json").write_text("{}")
    (tmp_path / "model").mkdir()
    settings = Settings(model="model", safety_model="checker", api_keys="secret", cluster="auto")
    passed_on = for_others(settings)
    assert passed_on["model"] == str(tmp_path / "model")
    assert (passed_on["safety_checker"], passed_on["safety_model"]) == ("on", str(tmp_path / "checker"))
    assert "secret" not in str(passed_on)
    assert for_others(Settings(safety_model="none"))["safety_checker"] == "off"
    assert for_others(Settings())["model"] == "flux-krea-mini", "a name is looked for there"


def test_without_ray(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError")
    with started(tmp_path, "--cluster", "auto") as server:  # its working directory comes first on its path
        assert server.process.wait(60) == 2
        assert "pip install -c constraints.txt -e '.[cluster]'" in server.output
