"""The README is true where a machine can tell."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.servers import ROOT

README = (ROOT / "README.md").read_text()


def test_its_tables_are_those_of_the_code() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "readme_tables.py", "--check"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_what_it_links_to_is_there() -> None:
    weights = (ROOT / "weights" / "README.md", ROOT / "weights" / "flux-krea-mini" / "README.md")
    for page in (ROOT / "README.md", *weights, *(ROOT / "docs").glob("**/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", README))))
def test_every_command_it_names_is_a_target(name: str) -> None:
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
