"""Arithmetic counts against published figures: Video Swin's README and torchvision count GMACs as GFLOPs."""

import pytest

from bevt_ds.runtime.flops import Sizes, backbone_macs, clip_macs, peak_flops

PUBLISHED = {  # 32x224x224, window (8,7,7): GMACs
    "T": ((96, (2, 2, 6, 2)), 87.9),
    "S": ((96, (2, 2, 18, 2)), 165.9),
    "B": ((128, (2, 2, 18, 2)), 281.6),
    "L": ((192, (2, 2, 18, 2)), 604.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_backbone_matches_published_counts(name):
    (width, depths), gmacs = PUBLISHED[name]
    count = backbone_macs(Sizes(width, depths, (8, 7, 7), 8192), (32, 224, 224))
    assert count / 1e9 == pytest.approx(gmacs, rel=3e-3)


def test_head_counts_masked_cells_only():
    sizes = Sizes(128, (2, 2, 18, 2), (8, 7, 7), 8192)
    assert clip_macs(sizes, 16, 224, 100) - clip_macs(sizes, 16, 224, 0) == 100 * 1024 * 8192


def test_peaks():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("an unknown device") is None
