"""Swin-H and Swin-G train under ZeRO-3: every block of them, at a reduced width, on two CPU ranks."""

import json
import math

import pytest

from bevt_ds.model.presets import SIZES
from tests.training.processes import launch

SECONDS = 1800


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", ["swin_h", "swin_g"])
def test_large_backbone_takes_two_steps_at_full_depth(name):
    output = launch(["-m", "tests.training.large_backbone", name], 2, SECONDS)
    rows = [line for line in output.splitlines() if line.startswith('{"losses"')]
    assert rows, output
    result = json.loads(rows[0])
    assert result["blocks"] == list(SIZES[name].depths) and result["norm"] == "post" and result["checkpointing"]
    assert all(map(math.isfinite, result["losses"])) and result["losses"][1] < result["losses"][0]
    assert result["moved"] > 0.95
    assert result["released"] and result["held"] < 0.6 * result["parameters"]
