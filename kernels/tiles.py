"""Device functions that the attention kernels share: from a program's number to the addresses of its tokens.

Nothing is rolled, padded or partitioned in memory. A token n of a box of tokens has local coordinates
(t, h, w), w fastest. They give its place in the unrolled map, and its code u = t * UT + h * UH + w, with
the strides of the bias table: the bias of query q and key k is table row u(q) - u(k) + middle.

Sizes along time, height and width travel as tuples: grid, window, shift, mask_shift, start, size.
"""

import triton
import triton.language as tl

# The integer arguments of every attention kernel: grid, window, shift, mask shift, strides and rows of
# the table. None is specialised on its value: one compiled kernel serves all stages of a model, and
# what kernels-check compiled is what runs.
GEOMETRY = (
    *("T", "H", "W", "WT", "WH", "WW", "ST", "SH", "SW", "MT", "MH", "MW"),
    *("UT", "UH", "ROWS"),
)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def divide(n, d):
    """n // d for n in [0, 1024) and d in [1, 1024], with one division for the whole tensor n."""
    return (n * ((1048576 + d - 1) // d)) >> 20


@triton.jit
def coordinates(n, size):
    """Local (t, h, w) of the tokens n of a box; numbers past the box repeat its last token."""
    n = tl.minimum(n, size[0] * size[1] * size[2] - 1)
    line = divide(n, size[2])
    t = divide(line, size[1])
    return t, line - t * size[1], n - line * size[2]


@triton.jit
def segments(extent, window, mask_shift):
    """How many segments an axis has: its windows, the last one cut in two where there is a mask shift."""
    return extent // window + tl.where(mask_shift > 0, 1, 0)


@triton.jit
def segment(i, extent, window, shift, mask_shift):
    """Start in the unrolled map, and size, of segment i of an axis."""
    last = extent // window - 1
    cut = tl.where(i == last, window - mask_shift, mask_shift)
    size = tl.where((mask_shift > 0) & (i >= last), cut, window)
    start = tl.where(i > last, extent - mask_shift, i * window) + shift
    return tl.where(start >= extent, start - extent, start), size


@triton.jit
def region(i, grid, window, shift, mask_shift):
    """Sample, start and size of region i of a batch."""
    across = segments(grid[2], window[2], mask_shift[2])
    down = segments(grid[1], window[1], mask_shift[1])
    deep = segments(grid[0], window[0], mask_shift[0])
    w, width = segment(i % across, grid[2], window[2], shift[2], mask_shift[2])
    i = i // across
    h, height = segment(i % down, grid[1], window[1], shift[1], mask_shift[1])
    i = i // down
    t, depth = segment(i % deep, grid[0], window[0], shift[0], mask_shift[0])
    return (i // deep).to(tl.int64), (t, h, w), (depth, height, width)


@triton.jit
def around(position, extent):
    """`position` in [0, 2 * extent) brought back into the map."""
    return tl.where(position >= extent, position - extent, position)


@triton.jit
def locate(n, start, size, grid, UT, UH, WRAP: tl.constexpr):
    """Place in the map and code of the tokens n of a region. WRAP: a region can straddle an edge."""
    t, h, w = coordinates(n, size)
    code = t * UT + h * UH + w
    t, h, w = start[0] + t, start[1] + h, start[2] + w
    if WRAP:
        t, h, w = around(t, grid[0]), around(h, grid[1]), around(w, grid[2])
    return (t * grid[1] + h) * grid[2] + w, code


@triton.jit
def beyond_cut(x, i, extent, window, mask_shift):
    """1 for local coordinates x behind the cut of window i of an axis, else 0."""
    cut = (mask_shift > 0) & (i == extent // window - 1)
    return tl.where(cut & (x >= window - mask_shift), 1, 0)


@triton.jit
def locate_in_window(n, i, grid, window, shift, mask_shift, UT, UH):
    """Place, code and region number of the tokens n of a whole window, the i-th of a sample.

    For the kernels that sum over windows and therefore number the pairs of all windows alike.
    """
    across, down = grid[2] // window[2], grid[1] // window[1]
    iw = i % across
    ih = i // across % down
    it = i // (across * down)
    t, h, w = coordinates(n, window)
    code = t * UT + h * UH + w
    part = beyond_cut(t, it, grid[0], window[0], mask_shift[0]) * 4
    part += beyond_cut(h, ih, grid[1], window[1], mask_shift[1]) * 2
    part += beyond_cut(w, iw, grid[2], window[2], mask_shift[2])
    t = around(it * window[0] + shift[0] + t, grid[0])
    h = around(ih * window[1] + shift[1] + h, grid[1])
    w = around(iw * window[2] + shift[2] + w, grid[2])
    return (t * grid[1] + h) * grid[2] + w, code, part


@triton.jit
def load_rows(base, place, stride, D: tl.constexpr):
    """The D-wide rows of the tokens at `place`, (tokens, D)."""
    return tl.load(base + place[:, None] * stride + tl.arange(0, D)[None, :])


@triton.jit
def store_rows(base, place, stride, rows, valid, D: tl.constexpr):
    """Write (tokens, D) to the tokens at `place`, where `valid`."""
    offsets = place[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(base + offsets, rows.to(base.dtype.element_ty), mask=valid[:, None])


@triton.jit
def dot(a, b, acc=None):
    """Matrix product in fp32: tensor cores for 16-bit operands, true fp32 for fp32 ones."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def base_two(product, table, code_q, code_k, scale):
    """Base-2 scores from q k^T; a single fused multiply-add per pair puts in scale and bias.

    `code_q` and `code_k` broadcast to the shape of `product`; `table` points at the zero offset.
    """
    return product * (scale * LOG2E) + tl.load(table + (code_q - code_k))
