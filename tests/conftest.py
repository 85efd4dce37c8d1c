from __future__ import annotations

import functools
import os
import ssl
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from flux_local import weights
from flux_local.params import ModelInfo
from tests.servers import MODEL, Server, running

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it once, when it is first imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests everywhere; `make gpu-check` is for a GPU
if "PYTEST_XDIST_WORKER" in os.environ:  # two at a time: a core for each, and for the servers that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
# No request here is encrypted, and reading all certificates anew for each client takes longer than most answers do.
ssl.create_default_context = functools.cache(ssl.create_default_context)


hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first: at the end one core would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as they found it."""
    with running(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def pipeline() -> Any:
    """The embedded model, loaded as the engine loads it."""
    from flux_local.model.loader import load

    return load(MODEL)


@pytest.fixture(scope="session")
def mini() -> ModelInfo:
    return weights.info(MODEL)
