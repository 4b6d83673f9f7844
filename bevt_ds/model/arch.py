"""What a Video Swin is: the sizes that its constructor, its checkpoints, the presets and FLOP counts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, Self, get_args

from bevt_ds.errors import UserError

from .windows import Size3, SmallWindows

NormPlace = Literal["pre", "post"]


@dataclass(frozen=True)
class SwinArch:
    """Sizes of a Video Swin: tuples are over (time, height, width), or over stages.

    The defaults are Swin-B's in BEVT. Raises UserError where depths and heads do not fit together, or for an unknown
    `small_windows` or `norm`.
    """

    embed_dim: int = 128  # channels of the first stage; each merging doubles them
    depths: tuple[int, ...] = (2, 2, 18, 2)  # blocks
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window: Size3 = (8, 7, 7)  # tokens
    patch: Size3 = (2, 4, 4)  # pixels
    mlp_ratio: float = 4.0
    drop_path: float = 0.0  # of the last block, linear from 0
    small_windows: SmallWindows = "exact"  # see windows.block_windows
    norm: NormPlace = "pre"  # of a block's branches; post: Swin V2's, which keeps large models from diverging

    def __post_init__(self) -> None:
        for name in ("depths", "num_heads", "window", "patch"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.depths) != len(self.num_heads):
            raise UserError(f"depths={self.depths} and num_heads={self.num_heads}: one of each a stage")
        for name, choices in (("small_windows", get_args(SmallWindows)), ("norm", get_args(NormPlace))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")

    @classmethod
    def from_arguments(cls, sizes: Mapping[str, Any]) -> Self:
        """From what a model's constructor has not taken itself. Raises UserError for a name that is no field."""
        known = [f.name for f in fields(cls)]
        for name in sizes:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise UserError(
                    f"unknown argument {name}{hint}: sizes of a model are {', '.join(known)}; how it runs:"
                    " checkpointing, recompute, recompute_every, compile, kernels; BEVT has vocab_size,"
                    " target_dim and image_windows, VideoClassifier num_classes, classes and dropout"
                )
        return cls(**sizes)

    @classmethod
    def of(cls, arch: Mapping[str, Any]) -> Self:
        """From the constructor arguments that a model keeps in `arch`."""
        return cls(**{f.name: arch[f.name] for f in fields(cls) if f.name in arch})

    def arguments(self) -> dict[str, Any]:
        """As constructor arguments. Those of a pre-norm model do not name its norm: files of it stay as they were."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("norm", "pre")}

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.embed_dim << (len(self.depths) - 1)
