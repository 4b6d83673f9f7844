"""The reference ops against torchvision's Video Swin block and BEVT's own index buffer."""

import hashlib
from math import prod

import pytest
import torch

from bevt_ds.kernels import reference
from bevt_ds.kernels.geometry import Windows

# sha256 of the buffer `relative_position_index` (int64) of window (8, 7, 7) in the official BEVT classes
OFFICIAL_INDEX = "617532ad86365ae62776b83be3bddb26e27a1681f91a13793af0bf875935b59c"


def test_relative_position_index_equals_the_official_one():
    """Bit for bit, and the values of its corner."""
    index = reference.relative_position_index((8, 7, 7), (8, 7, 7))
    assert index[0, [0, 1, 7, 49]].tolist() == [1267, 1266, 1254, 1098]
    assert hashlib.sha256(index.numpy().tobytes()).hexdigest() == OFFICIAL_INDEX


def test_image_window_uses_the_central_slab_of_the_table():
    """The window (1, 7, 7) is the official code's corner of the index, rows 1183 to 1351."""
    index = reference.relative_position_index((1, 7, 7), (8, 7, 7))
    assert torch.equal(index, reference.relative_position_index((8, 7, 7), (8, 7, 7))[:49, :49])
    assert index.unique().tolist() == list(range(1183, 1352))


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 2, 1)])
@pytest.mark.parametrize("frames", [4, 1])
def test_reference_attention_equals_torchvision(shift, frames):
    """torchvision.models.video.swin_transformer, in float64, with its own clipping of short clips."""
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    torch.manual_seed(0)
    window, heads, channels = (2, 4, 3), 2, 8
    theirs = ShiftedWindowAttention3d(channels, list(window), list(shift), heads).double()
    x = torch.randn(2, frames, 8, 6, channels, dtype=torch.float64)
    expected = theirs(x)
    clipped = (min(window[0], frames), *window[1:])
    shift = (shift[0] if frames > window[0] else 0, *shift[1:])
    qkv = theirs.qkv(x).unflatten(-1, (3, heads, -1))
    windows = Windows((frames, 8, 6), clipped, window, shift, shift)
    out = reference.window_attention(qkv, theirs.relative_position_bias_table, windows)
    torch.testing.assert_close(theirs.proj(out), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask_shift", [(0, 0, 0), (0, 2, 1), (1, 1, 2)])
def test_geometry_counts_what_the_mask_allows(mask_shift):
    """Regions and pairs, which FLOP counts rest on, from the mask itself."""
    grid, window = (4, 8, 6), (2, 4, 3)
    windows = Windows(grid, window, window, (0, 0, 0), mask_shift)
    allowed = reference.same_region(grid, window, mask_shift)
    assert windows.pairs == allowed.sum()
    assert windows.dense_pairs == allowed.numel()
    assert windows.regions == sum(len(mask.unique(dim=0)) for mask in allowed)
    assert windows.whole == len(allowed)


def test_window_partition_is_inverted():
    """unpartition inverts partition."""
    x = torch.arange(prod((2, 4, 8, 6, 5))).view(2, 4, 8, 6, 5)
    parts = reference.partition(x, (2, 4, 3))
    assert parts.shape == (2 * 2 * 2 * 2, 24, 5)
    assert torch.equal(reference.unpartition(parts, (2, 4, 3), (4, 8, 6)), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (2, 9, 6)}, "not a multiple"),
        ({"window": (2, 4, 6)}, "does not fit"),
        ({"shift": (0, 4, 0)}, "shift"),
        ({"mask_shift": (0, 0)}, "3 entries"),
        ({"grid": (32, 8, 6), "window": (32, 8, 6), "table_window": (32, 8, 6)}, "at most 1024"),
    ],
)
def test_bad_window_geometry_is_named(change, message):
    """A size that does not fit is a ValueError before any memory is touched."""
    good = {
        "grid": (2, 8, 6),
        "window": (2, 4, 3),
        "table_window": (2, 4, 3),
        "shift": (0, 0, 0),
        "mask_shift": (0, 0, 0),
    }
    Windows(**good)
    with pytest.raises(ValueError, match=message):
        Windows(**good | change)
