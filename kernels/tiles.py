"""Device functions that the attention kernels share: from a program's number to the addresses of its tokens.

Nothing is rolled, padded or partitioned in memory. A token n of a box of tokens has local coordinates
(t, h, w), w fastest. They give its place in the unrolled map, and its code u = t * UT + h * UH + w, with
the strides of the bias table: the bias of query q and key k is table row u(q) - u(k) + middle. Places are
computed where they are needed; codes, needed for every column of every tile, are computed once a call.

Sizes along time, height and width travel as tuples: grid, window, shift, mask_shift, start, size.
"""

import triton
import triton.language as tl

from .providers import interpreting

# The integer arguments of every attention kernel: grid, window, shift, mask shift, rows of the table. None is
# specialised on its value: one compiled kernel serves all stages of a model, and what `check` compiled is what runs.
GEOMETRY = ("T", "H", "W", "WT", "WH", "WW", "ST", "SH", "SW", "MT", "MH", "MW", "ROWS")

LOG2E = tl.constexpr(1.4426950408889634)
CODES = tl.constexpr(128)  # the codes of a shape are padded to a multiple of this, the largest tile
INTERPRETED = tl.constexpr(interpreting())


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
def part_size(part, window, mask_shift):
    """Extent of a segment: part 0 is a whole window, 1 and 2 are what the cut makes of the last one."""
    return tl.where(part == 0, window, tl.where(part == 1, window - mask_shift, mask_shift))


@triton.jit
def part_start(part, window, mask_shift):
    """Where in its window a segment starts."""
    return tl.where(part == 2, window - mask_shift, 0)


@triton.jit
def segment(i, extent, window, shift, mask_shift):
    """Start in the unrolled map, and part, of segment i of an axis."""
    last = extent // window - 1
    part = tl.where((mask_shift > 0) & (i >= last), i - last + 1, 0)
    start = tl.where(i > last, extent - mask_shift, i * window) + shift
    return tl.where(start >= extent, start - extent, start), part


@triton.jit
def region(i, grid, window, shift, mask_shift):
    """Sample, start, size and shape number (see `prepare_kernel`) of region i of a batch."""
    across = segments(grid[2], window[2], mask_shift[2])
    down = segments(grid[1], window[1], mask_shift[1])
    deep = segments(grid[0], window[0], mask_shift[0])
    w, part_w = segment(i % across, grid[2], window[2], shift[2], mask_shift[2])
    i = i // across
    h, part_h = segment(i % down, grid[1], window[1], shift[1], mask_shift[1])
    i = i // down
    t, part_t = segment(i % deep, grid[0], window[0], shift[0], mask_shift[0])
    size_t = part_size(part_t, window[0], mask_shift[0])
    size_h = part_size(part_h, window[1], mask_shift[1])
    size_w = part_size(part_w, window[2], mask_shift[2])
    shape = (part_t * 3 + part_h) * 3 + part_w
    return (i // deep).to(tl.int64), (t, h, w), (size_t, size_h, size_w), shape


@triton.jit
def around(position, extent):
    """`position` in [0, 2 * extent) brought back into the map."""
    return tl.where(position >= extent, position - extent, position)


@triton.jit
def locate(n, start, size, grid, WRAP: tl.constexpr):
    """Place in the map of the tokens n of a region. WRAP: a region can straddle an edge."""
    t, h, w = coordinates(n, size)
    t, h, w = start[0] + t, start[1] + h, start[2] + w
    if WRAP:
        t, h, w = around(t, grid[0]), around(h, grid[1]), around(w, grid[2])
    return (t * grid[1] + h) * grid[2] + w


@triton.jit
def window_origin(i, grid, window, shift, mask_shift):
    """Sample and start of whole window i of a batch, and which of its axes are cut: a sum of 4 (time), 2
    (height) and 1 (width).

    For the kernels that sum over windows and therefore number the pairs of all windows alike.
    """
    across, down, deep = grid[2] // window[2], grid[1] // window[1], grid[0] // window[0]
    w = i % across
    i = i // across
    h = i % down
    i = i // down
    t = i % deep
    cuts = tl.where((mask_shift[0] > 0) & (t == deep - 1), 4, 0)
    cuts += tl.where((mask_shift[1] > 0) & (h == down - 1), 2, 0)
    cuts += tl.where((mask_shift[2] > 0) & (w == across - 1), 1, 0)
    origin = (t * window[0] + shift[0], h * window[1] + shift[1], w * window[2] + shift[2])
    return (i // deep).to(tl.int64), origin, cuts


@triton.jit
def beyond_cuts(n, window, mask_shift):
    """For the tokens n of a window, on which axes they would lie behind a cut: a sum like `cuts`."""
    t, h, w = coordinates(n, window)
    beyond = tl.where(t >= window[0] - mask_shift[0], 4, 0)
    beyond += tl.where(h >= window[1] - mask_shift[1], 2, 0)
    return beyond + tl.where(w >= window[2] - mask_shift[2], 1, 0)


@triton.jit
def code_stride(tokens):
    """Length of a row of codes, for windows of that many tokens."""
    return tl.cdiv(tokens, CODES) * CODES


@triton.jit
def score_stride(tokens):
    """Length of a row of dS or of biases in memory, for windows of that many tokens: whole reads and writes of 8
    elements."""
    return (tokens + 7) // 8 * 8


@triton.jit
def whole_tiles(tokens, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """Where the tiles of BLOCK tokens end: behind the last token, or in front of at most LAST tokens that are left."""
    return tl.cdiv(tl.maximum(tokens - LAST, 0), BLOCK) * BLOCK


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
def look_up(pointers):
    """The fp32 values at a tensor of pointers, in whatever layout the pointers have.

    Not tl.load: that reads in a layout of its own and then moves the tile through shared memory into the
    layout of the matrix product. The interpreter has no assembler, so there it is tl.load.
    """
    if INTERPRETED:
        return tl.load(pointers)
    return tl.inline_asm_elementwise(
        "ld.global.nc.f32 $0, [$1];", "=r,l", [pointers], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def row_biases(bias, codes, rows, tokens, stride, sign: tl.constexpr, TILED: tl.constexpr):
    """What `biases` wants of the tokens `rows`, of the `tokens` of a region: their pointers into the table, or where
    their rows of the bias tile start. sign: 1 where they are queries, -1 where they are keys."""
    if TILED:  # noqa: SIM108  the branches have different types
        at = tl.minimum(rows, tokens - 1) * stride
    else:
        at = bias + sign * tl.load(codes + rows)
    return at


@triton.jit
def biases(bias, of_rows, codes, columns, stride, sign: tl.constexpr, TILED: tl.constexpr, MASKED: tl.constexpr):
    """Biases of a tile of scores in fp32: gathered from the table, or read from the bias tile in whole lines.

    sign: that of `row_biases`. MASKED: the columns may lie past the window.
    """
    if not TILED:
        value = look_up(of_rows[:, None] - sign * tl.load(codes + columns)[None, :])
    elif MASKED:
        value = tl.load(bias + (of_rows[:, None] + columns[None, :]), mask=(columns < stride)[None, :], other=0.0)
    else:
        value = tl.load(bias + (of_rows[:, None] + columns[None, :]))
    return value.to(tl.float32)


@triton.jit
def scaled(product, bias, scale):
    """Scores from q k^T and biases, by one fused multiply-add: the same bits however the biases were read."""
    return tl.fma(product, tl.zeros_like(product) + scale, bias)


@triton.jit
def small_bias(table, code, inside):
    """Biases of a window in one tile, from the middle of the table and the codes of its tokens; minus infinity for
    keys past the window, so that loops over windows need no mask of keys."""
    bias = look_up((table + code)[:, None] - code[None, :])
    return tl.where(inside[None, :], bias, float("-inf"))
