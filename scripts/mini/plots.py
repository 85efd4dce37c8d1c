"""The loss curves of a training run, as a picture. Reads the record alone; knows nothing of what is being trained."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def losses(log: Path, out: Path) -> None:
    """One panel for each stage of `log` that has figures, steps across and losses up, logarithmic. A run that went on
    is one line with the run before it. Nothing is written where nothing was recorded."""
    stages: dict[str, dict[int, dict[str, float]]] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        stage, step = entry.pop("stage"), entry.pop("step")
        entry.pop("seconds")
        if entry:
            stages.setdefault(stage, {})[step] = entry
    if not stages:
        return
    figure, panels = pyplot.subplots(1, len(stages), figsize=(4.5 * len(stages), 3.2), squeeze=False, layout="tight")
    for panel, (stage, record) in zip(panels[0], stages.items(), strict=True):
        steps = sorted(record)
        for name in record[steps[-1]]:
            known = [step for step in steps if name in record[step]]
            panel.plot(known, [record[step][name] for step in known], marker=".", label=name)
        panel.set(title=stage, xlabel="step", yscale="log")
        panel.legend()
    figure.savefig(out, dpi=100)
    pyplot.close(figure)
