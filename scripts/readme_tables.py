#!/usr/bin/env python3
"""Writes the README's parameter and size tables from the code. With --check, says whether they are stale."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flux_local.params import PARAMETERS, Parameter  # noqa: E402
from flux_local.sizes import RATIOS, TIERS, table_size  # noqa: E402


def values(parameter: Parameter) -> str:
    if parameter.choices:
        return ", ".join(f"`{choice}`" for choice in parameter.choices)
    if parameter.kind == "string" and parameter.high is not None:
        return f"string, up to {int(parameter.high):,} characters"
    if parameter.low is not None and parameter.high is not None:
        high = "2^63−1" if parameter.high == 2**63 - 1 else f"{parameter.high:g}"
        return f"{parameter.kind}, {parameter.low:g} … {high}"
    return parameter.kind


def parameter_table() -> str:
    rows = ["| parameter | values | default | handling | |", "| --- | --- | --- | --- | --- |"]
    for parameter in PARAMETERS:
        names = ", ".join(f"`{name}`" for name in (parameter.name, *parameter.aliases))
        note = parameter.description
        if "generations" not in parameter.routes:
            note += f" For {' and '.join(parameter.routes)}."
        rows.append(f"| {names} | {values(parameter)} | {parameter.default} | {parameter.handling} | {note} |")
    return "\n".join(rows)


def size_table() -> str:
    tiers = list(TIERS)
    rows = [f"| ratio | {' | '.join(tiers)} |", "| --- |" + " --- |" * len(tiers)]
    cells = {ratio: " | ".join(str(table_size(ratio, tier)) for tier in tiers) for ratio in RATIOS}
    return "\n".join([*rows, *(f"| {ratio} | {row} |" for ratio, row in cells.items())])


def renewed(readme: str) -> str:
    for name, table in (("parameters", parameter_table()), ("sizes", size_table())):
        pattern = rf"(<!-- {name}: .*? -->\n).*?(<!-- end -->)"
        found = re.search(pattern, readme, re.DOTALL)
        assert found, f"README.md has no place for {name}"
        readme = readme[: found.start()] + f"{found[1]}{table}\n{found[2]}" + readme[found.end() :]
    return readme


def main() -> None:
    path = ROOT / "README.md"
    old = path.read_text()
    new = renewed(old)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is stale: run scripts/readme_tables.py" if new != old else 0)
    path.write_text(new)


if __name__ == "__main__":
    main()
