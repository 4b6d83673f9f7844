"""`kernels.check`: what counts as worse compiled code, and one compilation for an absent GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
GOOD = {"registers": 100, "spills": 0, "shared": 8192, "products": "HGMMA"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, None),
        ({"registers": 90, "shared": 4096}, None),
        ({"registers": 110}, None),
        ({"registers": 120}, "registers 100 -> 120"),
        ({"spills": 1}, "spills 0 -> 1"),
        ({"shared": 16384}, "shared 8192 -> 16384"),
        ({"products": "HMMA"}, "products HGMMA -> HMMA"),
    ],
)
def test_compiled_kernel_that_is_worse_is_reported(change, found):
    """More registers than the slack, any spill, more shared memory, another class of matrix product."""
    from bevt_ds.kernels.check import regressions

    lines = regressions({"kernel": GOOD}, {"kernel": GOOD | change})
    assert lines == ([] if found is None else [f"{found}: kernel"])


def test_changed_list_of_configurations_is_found():
    """The table must be updated when a configuration comes or goes."""
    from bevt_ds.kernels.check import regressions

    assert regressions({"old": GOOD}, {"new": GOOD}) == ["no longer shipped: old", "not in the table: new"]


@pytest.mark.parametrize("path", sorted(KERNELS.glob("compiled_*.json")), ids=lambda path: path.stem)
def test_compiled_tables_match_the_readme(path):
    """Tensor cores in every 16-bit attention kernel, Hopper's own where a tile has their 64 rows; no spill in 16 bits.

    fp32 kernels, which are for tests and small runs, spill a few registers.
    """
    table = json.loads(path.read_text())
    attention = {key: row for key, row in table.items() if "window_attention" in key and "_kernel fp32" not in key}
    attention = {key: row for key, row in attention.items() if "bwd_stats" not in key}  # which has no product
    assert len(attention) >= 24
    for key, row in attention.items():
        own = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(key.split()[0], "HMMA")
        assert row["products"].startswith("HMMA" if "BLOCK=16" in key else own), key
    spills = {key: row["spills"] for key, row in table.items() if row["spills"]}
    assert all("_kernel fp32" in key and count <= 8 for key, count in spills.items()), spills


def test_kernel_compiles_without_a_gpu():
    """The forward kernel for sm_90 is no worse than the committed table."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bevt_ds.kernels.check", "--only", "sm_90 window_attention_fwd_kernel bf16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 configurations, none worse" in done.stdout
