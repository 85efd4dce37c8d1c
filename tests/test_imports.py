"""The direction of imports, as docs/design.md gives it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT

PACKAGE = ROOT / "flux_local"
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "diffusers", "transformers", "safetensors", "accelerate"}
WEB = {"fastapi", "starlette", "uvicorn"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of all that a file imports, wherever in it; or only what importing the file imports."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.stmt] = []

    def walk(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            nodes.append(node)
            for field in ("body", "orelse", "finalbody", "handlers"):
                walk(getattr(node, field, []) or [])
            for case in getattr(node, "cases", []):
                walk(case.body)

    walk(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_who_may_import_what(path: Path) -> None:
    module = name_of(path)
    names = imported(path)
    in_model = module.startswith("flux_local.model")
    if not in_model and module not in ("flux_local.engine", "flux_local.engine_process"):
        assert not roots(names) & HEAVY
    if not module.startswith("flux_local.api") and module != "flux_local.server":
        assert not roots(names) & WEB
    if in_model:
        allowed = ("flux_local.model", "flux_local.errors")
        assert all(name.startswith(allowed) for name in names if name.startswith("flux_local."))
    if module in ("flux_local.sizes", "flux_local.errors", "flux_local.config"):
        allowed = ("flux_local.errors", "flux_local.sizes")
        assert all(name.startswith(allowed) for name in names if name.startswith("flux_local."))
    if module == "flux_local.scheduler":
        assert not {name for name in names if name.startswith("flux_local")}
    assert "pickle" not in roots(names)


def test_no_cycles() -> None:
    modules = {name_of(path) for path in FILES}
    graph = {name_of(p): {n for n in imported(p, top_level_only=True) if n in modules} for p in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail, module))
        if module not in done:
            for other in graph[module] - {module}:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_server_side_never_loads_torch() -> None:
    code = "import sys, flux_local.server, flux_local.api.app; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not HEAVY & set(loaded.stdout.split())


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_says_what_it_is_and_stays_short(path: Path) -> None:
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= 400
