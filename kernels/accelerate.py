"""`accelerate(model)`: windowed attention of other libraries' Swin models, run by this package's kernels.

A module is replaced by giving it a class that inherits from its own and overrides the one method that attends. Its
parameters, buffers, hooks and names stay, so checkpoints, optimizers and LoRA wrappers fit as before. The libraries are
not imported: a model that is there has imported its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import MAX_TOKENS, Windows
from .ops import HEAD_DIMS, window_attention


@dataclass
class Report:
    """What `accelerate` did: names of modules in the model, each with its class or with the reason."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  replaced {name}: {kind}" for name, kind in self.replaced.items()]
        return "\n".join([*lines, *(f"  left {name}: {reason}" for name, reason in self.left.items())])


def accelerate(model: nn.Module, provider: str = "auto") -> Report:
    """Replace the windowed attention of `model`, in place, by `window_attention`.

    Known are torchvision's `swin_*`, `swin_v2_*` and `swin3d_*`, timm's `swin_*`, Hugging Face's `SwinModel` and all
    that contain it, and the blocks of MONAI's SwinUNETR. Outputs and gradients are those of the model before, but for
    rounding. Whatever is not replaced works on as it did.

    Args:
        model: any module; the parts that are known are looked for at every depth.
        provider: auto, triton or torch, as for `window_attention`.

    Returns:
        A `Report` of what was replaced, and of every other attention with the reason for leaving it.
    """
    report = Report()
    for name, module in _outermost(model):
        kind, reason = type(module), _reason_to_leave(module)
        if reason:
            report.left[name] = reason
            continue
        module.__class__ = _with_kernels(KNOWN[_name_of(kind)], kind)
        module.kernels = provider
        report.replaced[name] = _name_of(kind)
    return report


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _outermost(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that attend, with their names, and nothing of what lies within one."""
    kind = type(module)
    if isinstance(module, _Attends) or _name_of(kind) in KNOWN or kind.__name__.endswith("Attention"):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _outermost(child, f"{name}.{key}" if name else key)


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why the kernels cannot stand in for the module, or None where they can."""
    if isinstance(module, _Attends) or hasattr(module, "kernels"):
        return "it runs the kernels already"
    adapter = KNOWN.get(_name_of(type(module)))
    if adapter is None:
        return f"no replacement for {_name_of(type(module))}"
    try:
        width, dropout, window = adapter.facts(module)
    except AttributeError as error:  # of a version of the library that is laid out otherwise
        return f"another version of {_name_of(type(module))}: {error}"
    if dropout:
        return f"it drops attention with probability {dropout}, which the kernels do not"
    if width not in HEAD_DIMS:
        return f"its heads are {width} wide, the kernels take {', '.join(map(str, HEAD_DIMS))}"
    if math.prod(window) > MAX_TOKENS:
        return f"its windows have {math.prod(window)} tokens, the kernels take {MAX_TOKENS}"
    return None


@cache
def _with_kernels(adapter: type, kind: type) -> type:
    return type(f"Accelerated{kind.__name__}", (adapter, kind), {"__module__": kind.__module__})


class _Attends:
    """Mixed in before a library's class; says what decides whether the kernels can run it."""

    kernels: str

    @staticmethod
    def facts(module: nn.Module) -> tuple[int, float, Sequence[int]]:
        """Width of a head, probability of dropping attention, the window."""
        raise TypeError("an adapter defines its facts")


def _pad(x: Tensor, window: Sequence[int]) -> Tensor:
    """x (B, *map, C) with zeros behind it, to whole windows."""
    missing = [-extent % size for extent, size in zip(x.shape[1:-1], window, strict=True)]
    return F.pad(x, (0, 0, *(n for m in reversed(missing) for n in (0, m)))) if any(missing) else x


def _attend(
    x: Tensor,
    to_qkv: Callable[[Tensor], Tensor],
    table: Tensor,
    windows: tuple[Sequence[int], Sequence[int], Sequence[int]],
    provider: str,
    roll_first: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Windowed attention of x (B, *map, C) -> (B, *map, C'), of a map with two or three axes.

    `to_qkv` takes the padded map to (B, *map, 3, heads, width). `windows` are the window, that of the table, and the
    shift. `roll_first`: the map is rolled before it is padded, not after, as timm does it.
    """
    window, table_window, shift = windows
    extents, axes = x.shape[1:-1], tuple(range(1, x.ndim - 1))
    rolls = roll_first and any(extent % size for extent, size in zip(extents, window, strict=True)) and any(shift)
    if rolls:
        x = torch.roll(x, [-s for s in shift], axes)
    qkv = to_qkv(_pad(x, window))
    depth = (1,) * (3 - len(axes))  # of a map without time
    geometry = Windows(
        grid=(*depth, *qkv.shape[1 : 1 + len(axes)]),
        window=(*depth, *window),
        table_window=(*depth, *table_window),
        shift=(0, 0, 0) if rolls else (*(0 for _ in depth), *shift),
        mask_shift=(*(0 for _ in depth), *shift),
        bias_by_number=tuple(window[-2:]) != tuple(table_window[-2:]),
    )
    qkv = qkv.reshape(len(qkv), *geometry.grid, *qkv.shape[-3:])
    out = window_attention(qkv, table, geometry, scale, provider)
    out = out.reshape(len(out), *geometry.grid[len(depth) :], -1)
    out = out[(slice(None), *map(slice, extents))]
    return torch.roll(out, list(shift), axes) if rolls else out


def _clipped(extents: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[list[int], list[int]]:
    """Window and shift on a map: an axis no longer than the window has one window and no shift."""
    pairs = zip(extents, window, shift, strict=True)
    sizes = [(n, 0) if n <= w else (w, s) for n, w, s in pairs]
    return [w for w, _ in sizes], [s for _, s in sizes]


class _Torchvision(_Attends):
    """`ShiftedWindowAttention`: a window wider than the map is not clipped; the map is padded up to it."""

    @staticmethod
    def facts(module: nn.Module) -> tuple[int, float, Sequence[int]]:
        return module.qkv.out_features // 3 // module.num_heads, module.attention_dropout, module.window_size

    def _split(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1))

    def _project(self, x: Tensor) -> Tensor:
        return F.dropout(self.proj(x), p=self.dropout, training=self.training)

    def _windows(self, x: Tensor) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        window = self.window_size
        shift = [0 if n <= w else s for n, w, s in zip(x.shape[1:-1], window, self.shift_size, strict=True)]
        return window, window, shift

    def forward(self, x: Tensor) -> Tensor:
        table = self.relative_position_bias_table
        return self._project(_attend(x, self._split, table, self._windows(x), self.kernels))


class _Torchvision3d(_Torchvision):
    """`ShiftedWindowAttention3d`: a window is clipped to the map and takes the bias of its tokens' numbers."""

    def _windows(self, x: Tensor) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        window, shift = _clipped(x.shape[1:-1], self.window_size, self.shift_size)
        return window, self.window_size, shift


class _TorchvisionV2(_Torchvision):
    """`ShiftedWindowAttentionV2`: cosine attention, its bias table made by a small network, no bias of the keys."""

    def _split(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is not None:
            q, _, v = bias.chunk(3)
            bias = torch.cat([q, torch.zeros_like(q), v])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp().view(-1, 1)
        q = F.normalize(q, dim=-1) * scale
        return torch.stack([q.to(v.dtype), F.normalize(k, dim=-1).to(v.dtype), v], dim=-3)

    def forward(self, x: Tensor) -> Tensor:
        table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads))
        return self._project(_attend(x, self._split, table, self._windows(x), self.kernels, scale=1.0))


class _Timm(_Attends):
    """timm's block: `_attn` rolls the map before it pads it. The table is as wide as the window."""

    @staticmethod
    def facts(module: nn.Module) -> tuple[int, float, Sequence[int]]:
        attention = module.attn
        return attention.qkv.out_features // 3 // attention.num_heads, attention.attn_drop.p, module.window_size

    def _attn(self, x: Tensor) -> Tensor:
        attention = self.attn
        windows = (self.window_size, self.window_size, self.shift_size)
        out = _attend(
            x,
            lambda padded: attention.qkv(padded).unflatten(-1, (3, attention.num_heads, -1)),
            attention.relative_position_bias_table,
            windows,
            self.kernels,
            roll_first=True,
            scale=attention.scale,
        )
        return attention.proj_drop(attention.proj(out))


class _HuggingFace(_Attends):
    """Transformers' `SwinLayer`. Where attention maps are asked for, the layer's own code makes them."""

    @staticmethod
    def facts(module: nn.Module) -> tuple[int, float, Sequence[int]]:
        attention = module.attention
        table = attention.relative_position_bias
        return (
            attention.q_proj.out_features // attention.num_attention_heads,
            attention.attention_dropout,
            table.window_size,
        )

    def _split(self, x: Tensor) -> Tensor:
        attention = self.attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        return torch.stack([p(x).unflatten(-1, (attention.num_attention_heads, -1)) for p in projections], dim=-3)

    def forward(self, hidden_states, input_dimensions, always_partition=False, **kwargs):
        wanted = kwargs.get("output_attentions") or self.attention.config.output_attentions
        if wanted:
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        bias = self.attention.relative_position_bias
        windows = ((int(self.window_size),) * 2, bias.window_size, (int(self.shift_size),) * 2)
        x = self.layernorm_before(hidden_states).unflatten(1, tuple(input_dimensions))
        out = _attend(x, self._split, bias.relative_position_bias_table, windows, self.kernels)
        out = self.dropout(self.attention.o_proj(out)).flatten(1, 2)
        hidden_states = hidden_states + self.drop_path(out)
        return hidden_states + self.dropout(self.mlp(self.layernorm_after(hidden_states))), None


class _Monai(_Attends):
    """MONAI's block, of maps with two or three axes: its window is clipped as torchvision's of clips is."""

    @staticmethod
    def facts(module: nn.Module) -> tuple[int, float, Sequence[int]]:
        attention = module.attn
        return attention.qkv.out_features // 3 // attention.num_heads, attention.attn_drop.p, module.window_size

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        x, attention = self.norm1(x), self.attn
        window, shift = _clipped(x.shape[1:-1], self.window_size, self.shift_size)
        out = _attend(
            x,
            lambda padded: attention.qkv(padded).unflatten(-1, (3, attention.num_heads, -1)),
            attention.relative_position_bias_table,
            (window, self.window_size, shift),
            self.kernels,
        )
        return attention.proj_drop(attention.proj(out))


KNOWN = {
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _Torchvision,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _TorchvisionV2,
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": _Torchvision3d,
    "timm.models.swin_transformer.SwinTransformerBlock": _Timm,
    "transformers.models.swin.modeling_swin.SwinLayer": _HuggingFace,
    "monai.networks.nets.swin_unetr.SwinTransformerBlock": _Monai,
}
