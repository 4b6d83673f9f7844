"""The encoder of OpenAI's DALL-E dVAE: 8x8 pixels to one of 8192 ids (n_hid 256).

Source of the architecture: openai/DALL-E@5be4b23, dall_e/encoder.py. N images, v pixels a side, V ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_ds.errors import UserError
from bevt_ds.kernels import resolve

from ..inputs import require_frames
from ..tensor_file import read_tensors
from .dalle_pickle import read_pickled_module

GROUPS, BLOCKS = 4, 2
GAIN = 1 / (GROUPS * BLOCKS) ** 2  # of a block's residual path
PADDED = 8  # channels of the first convolution's input, zeros from the fourth on
MARGIN = 0.1  # of the range of pixels, left free at both ends
OUTPUT = "blocks.output.conv"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Conv(nn.Module):
    """A convolution that keeps the size, with the parameter names of the original: w (O,I,k,k) and b (O,)."""

    def __init__(self, n_in: int, n_out: int, size: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n_out, n_in, size, size))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """(N,I,H,W) -> (N,O,H,W), all of one dtype."""
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)

    def product(self, x: Tensor) -> Tensor:
        """`forward` without the bias; x may have more channels than the weight, which are ignored."""
        weight = (
            F.pad(self.w, (0, 0, 0, 0, 0, x.shape[1] - self.w.shape[1])) if x.shape[1] > self.w.shape[1] else self.w
        )
        return F.conv2d(x, weight, padding=self.w.shape[-1] // 2)


SIDES = (3, 3, 3, 1)  # of the convolutions of an encoder's block


class Block(nn.Module):
    """Residual block of four convolutions with these sides, a ReLU before each."""

    def __init__(self, n_in: int, n_out: int, sides: tuple[int, int, int, int]):
        super().__init__()
        hidden = n_out // 4
        widths = zip((n_in, hidden, hidden, hidden), (hidden, hidden, hidden, n_out), sides, strict=True)
        self.id_path = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.ModuleDict({f"conv_{i}": Conv(*w) for i, w in enumerate(widths, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """(N,n_in,H,W) -> (N,n_out,H,W)."""
        residual = x
        for conv in self.res_path.values():
            residual = conv(residual.relu())
        return self.id_path(x) + GAIN * residual

    def fused(self, x: Tensor, x_bias: Tensor | None, active: Tensor, pool: int) -> tuple[Tensor, Tensor]:
        """`forward` of x + x_bias, whose ReLU is `active`, pooled, and the ReLU of that; by kernels."""
        from bevt_ds.kernels.conv_epilogues import bias_relu, residual_relu

        *convs, last = self.res_path.values()
        for conv in convs:
            active = bias_relu(conv.product(active), conv.b)
        if isinstance(self.id_path, Conv):
            x, x_bias = self.id_path.product(x), self.id_path.b
        return residual_relu(x, x_bias, last.product(active), last.b, GAIN, pool)


class DalleTokenizer(nn.Module):
    """Frozen dVAE encoder. The ids are the arguments of the largest logits.

    As in the original, convolutions but the last run in half precision on a GPU; everything is fp32 on a CPU. The first
    call puts the weights into that precision and into channels-last layout for good, instead of casting them each time.
    `kernels` is auto, triton or torch: with triton one kernel does what lies between two convolutions.
    """

    def __init__(self, n_hid: int = 256, vocab_size: int = 8192, kernels: str = "auto"):
        super().__init__()
        self.vocab_size, self.kernels = vocab_size, kernels
        widths = [n_hid, *(n_hid << g for g in range(GROUPS))]
        blocks = {"input": Conv(3, n_hid, 7)}
        for g in range(1, GROUPS + 1):
            pair = Block(widths[g - 1], widths[g], SIDES), Block(widths[g], widths[g], SIDES)
            blocks[f"group_{g}"] = nn.ModuleDict({f"block_{i}": b for i, b in enumerate(pair, 1)})
        blocks["output"] = nn.ModuleDict({"conv": Conv(widths[-1], vocab_size, 1)})
        self.blocks = nn.ModuleDict(blocks)
        self.requires_grad_(False).eval()

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read OpenAI's encoder.pkl, without running anything in it, or a .safetensors file with the same names.

        Raises UserError for a file that is missing or holds anything else.
        """
        state = read_state(Path(path), "encoder", "tokenizer.weights")
        sizes = [first_size(path, "encoder", state, name) for name in ("blocks.input.w", f"{OUTPUT}.w")]
        with torch.device("meta"):
            model = cls(*sizes)
        return take(model, path, "encoder", state)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (N,3,v,v), float RGB in [0,1] -> ids (N,v/8,v/8), int64. Raises UserError for others: see `inputs`."""
        return self.logits(frames).argmax(1)

    @torch.no_grad()
    def logits(self, frames: Tensor) -> Tensor:
        """Frames (N,3,v,v), float RGB in [0,1] -> logits (N,V,v/8,v/8), fp32. Raises as `encode`."""
        self.require(frames)
        return self(frames)

    def require(self, frames: Tensor) -> None:
        """UserError unless they are frames; puts the weights into the precision of their device."""
        require_frames(frames, self)
        self.settle(torch.float16 if frames.is_cuda else torch.float32)

    def forward(self, frames: Tensor) -> Tensor:
        """`logits` with the weights as `settle` leaves them: the part that `compile` compiles."""
        if resolve(self.kernels, frames.device) == "triton":
            return self._fused(frames)
        x = map_pixels(frames).to(self.blocks["input"].w.dtype, memory_format=torch.channels_last)
        x = self.blocks["input"](x)
        for g in range(1, GROUPS + 1):
            for block in self.blocks[f"group_{g}"].values():
                x = block(x)
            if g < GROUPS:
                x = F.max_pool2d(x, 2)
        return self.blocks["output"]["conv"](x.relu().float())

    def _fused(self, frames: Tensor) -> Tensor:
        """`forward` by kernels, rounded at the same places. The first convolution gets channels of zeros, with which
        it runs on tensor cores; its bias is added where the first block reads it."""
        from bevt_ds.kernels.conv_epilogues import bias_relu, scale_pixels

        first, bias = self.blocks["input"], self.blocks["input"].b
        x = first.product(scale_pixels(frames, 1 - 2 * MARGIN, MARGIN, PADDED, first.w.dtype == torch.float16))
        active = bias_relu(x, bias)
        for g in range(1, GROUPS + 1):
            pair = self.blocks[f"group_{g}"]
            x, active = pair["block_1"].fused(x, bias, active, 1)
            x, active = pair["block_2"].fused(x, None, active, 2 if g < GROUPS else 1)
            bias = None
        return self.blocks["output"]["conv"](active.float())

    def settle(self, dtype: torch.dtype) -> None:
        """Weights in `dtype`, those of the last convolution in fp32, all channels last."""
        first = self.blocks["input"].w
        if first.dtype == dtype and first.is_contiguous(memory_format=torch.channels_last):
            return
        for name, module in self.blocks.named_modules(prefix="blocks"):
            if isinstance(module, Conv):
                module.to(dtype=torch.float32 if name == OUTPUT else dtype, memory_format=torch.channels_last)


def map_pixels(frames: Tensor) -> Tensor:
    """[0,1] -> [0.1,0.9]: away from the ends, where the logit-Laplace likelihood of the dVAE has no bound."""
    return (1 - 2 * MARGIN) * frames + MARGIN


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels`, cut to [0,1]."""
    return ((mapped - MARGIN) / (1 - 2 * MARGIN)).clamp(0, 1)


def read_state(path: Path, part: str, key: str) -> dict[str, Tensor]:
    """The tensors of the dVAE's encoder or decoder, from OpenAI's pickle or a .safetensors file.

    Args:
        part: "encoder" or "decoder", for messages.
        key: of the configuration, where the path comes from.

    Raises:
        UserError: no such file, or it holds anything else.
    """
    if not path.is_file():
        raise UserError(f"tokenizer file {path} does not exist: set {key} to DALL-E's {part}.pkl")
    if path.suffix != ".safetensors":
        return read_pickled_module(path, part)
    return read_tensors(path)


def first_size(path: str | Path, part: str, state: dict[str, Tensor], name: str, axis: int = 0) -> int:
    """The length of one axis of a tensor, by which a network's width is known. UserError: there is no such tensor."""
    if name not in state or state[name].ndim <= axis:
        raise UserError(f"{path} is not a DALL-E {part}: it has no {name}")
    return state[name].shape[axis]


def take(model: ModuleT, path: str | Path, part: str, state: dict[str, Tensor]) -> ModuleT:
    """The model with these tensors as its own, in fp32. UserError: names or shapes are others."""
    own = model.state_dict()
    odd = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
    if odd:
        raise UserError(f"{path} is not a DALL-E {part}: {len(odd)} tensors differ, {odd[0]} among them")
    model.load_state_dict(state, assign=True)
    return model.float()
