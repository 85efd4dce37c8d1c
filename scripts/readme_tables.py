#!/usr/bin/env python3
"""Writes the README's tables of parameters, errors and sizes from the code; with --check, says if they are stale."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flux_local.errors import ANSWERS  # noqa: E402
from flux_local.parameters import PARAMETERS  # noqa: E402
from flux_local.sizes import RATIOS, TIERS, table_size  # noqa: E402


def parameter_table() -> str:
    rows = ["| parameter | values | default | handling | meaning |", "| --- | --- | --- | --- | --- |"]
    for parameter in PARAMETERS:
        names = ", ".join(f"`{name}`" for name in (parameter.name, *parameter.aliases))
        note = parameter.description
        if "generations" not in parameter.routes:
            note += f" For {' and '.join(parameter.routes)}."
        rows.append(
            f"| {names} | {parameter.values('`')} | {parameter.default_in_words()} | {parameter.handling} | {note} |"
        )
    return "\n".join(rows)


def size_table() -> str:
    tiers = list(TIERS)
    rows = [f"| ratio | {' | '.join(tiers)} |", "| --- |" + " --- |" * len(tiers)]
    cells = {ratio: " | ".join(str(table_size(ratio, tier)) for tier in tiers) for ratio in RATIOS}
    return "\n".join([*rows, *(f"| {ratio} | {row} |" for ratio, row in cells.items())])


def error_table() -> str:
    rows = ["| status | `code` | `type` |", "| --- | --- | --- |"]
    shown = sorted(ANSWERS.values(), key=lambda answer: answer.status)
    rows += [f"| {a.status} | `{a.code}` | `{a.type}` |" for a in shown]
    return "\n".join(rows)


def renewed(readme: str) -> str:
    for name, table in (("parameters", parameter_table()), ("errors", error_table()), ("sizes", size_table())):
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
