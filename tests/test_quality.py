"""`scripts/quality.py`: its measures, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from quality import MODES, gmsd, psnr, ssim

from tests.servers import ROOT, environment


class TestMeasures:
    RNG = np.random.default_rng(0)
    PICTURE = RNG.uniform(0, 255, (64, 64, 3)).round()

    def test_of_equal_pictures(self) -> None:
        assert psnr(self.PICTURE, self.PICTURE) == 100
        assert ssim(self.PICTURE, self.PICTURE) == pytest.approx(1)
        assert gmsd(self.PICTURE, self.PICTURE) == 0

    def test_psnr_of_a_known_error(self) -> None:
        assert psnr(self.PICTURE, self.PICTURE + 5) == pytest.approx(20 * np.log10(255 / 5))

    def test_more_noise_is_further_away(self) -> None:
        noise = self.RNG.normal(size=self.PICTURE.shape)
        found = [(psnr(a, b), ssim(a, b), gmsd(a, b)) for a, b in
                 ((self.PICTURE, self.PICTURE + scale * noise) for scale in (2, 8, 32))]  # fmt: skip
        for measure, sign in ((0, -1), (1, -1), (2, 1)):
            values = [sign * row[measure] for row in found]
            assert values == sorted(values)

    def test_a_shift_of_brightness_is_no_change_of_structure(self) -> None:
        assert gmsd(self.PICTURE, self.PICTURE + 20) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "quality.py"), "--count", "8", "--steps", "12", "--out", str(tmp_path)],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "quality.json").read_text()) == printed
    assert (tmp_path / "quality.png").stat().st_size > 1000
    modes = printed["modes"]
    assert list(modes) == [mode.name for mode in MODES]
    assert modes["plain"]["psnr"] == modes["other batch"]["psnr"] == 100
    assert 20 < modes["fp8"]["psnr"] < 100
    assert 20 < modes["fp8, attention too"]["psnr"] < 100
    assert modes["fp8, attention too"]["psnr"] != modes["fp8"]["psnr"]
    assert modes["high"]["computed"] < modes["regular"]["computed"] < 12
    assert 0 < printed["velocity_error_fp8"]["mean"] <= printed["velocity_error_fp8"]["worst_step"] < 0.2
