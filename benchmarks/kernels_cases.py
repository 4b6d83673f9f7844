"""The shapes of the models, the work that each one is, and the least time that it can take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bevt_ds.kernels.geometry import Windows

WIDTHS = {"t": 96, "s": 96, "b": 128, "l": 192}
DEPTHS = {"t": (2, 2, 6, 2), "s": (2, 2, 18, 2), "b": (2, 2, 18, 2), "l": (2, 2, 18, 2)}
HEAD_DIM = 32
# floating-point operations per pair, head and channel; exps per pair and head; activations of the size of x
WORK = {"forward": (4, 1, 4), "backward": (10, 1, 8), "both": (14, 2, 12)}


@dataclass(frozen=True)
class Case:
    """Attention of one kind of block; `blocks` of them are in the model."""

    model: str
    stage: int
    stream: str  # video | image
    batch: int
    shifted: bool
    heads: int
    blocks: int
    windows: Windows

    @property
    def name(self) -> str:
        """What a row is called."""
        kind = "shifted" if self.shifted else "plain"
        window = "x".join(str(n) for n in self.windows.window)
        return f"{self.model}-stage{self.stage} {self.batch} {self.stream} {window} {kind}"

    def flops(self, direction: str, dense: bool = True) -> float:
        """By dense convention (every pair of every window; backward 2.5 forward), or as executed in regions."""
        pairs = self.windows.dense_pairs if dense else self.windows.pairs
        return WORK[direction][0] * self.batch * self.heads * HEAD_DIM * pairs

    def roof_ms(self, direction: str, ceilings: dict[str, float | None], itemsize: int) -> tuple[float, str]:
        """Least milliseconds with perfect overlap, and the resource that sets it."""
        _, exps, activations = WORK[direction]
        tokens = self.windows.dense_pairs / self.windows.tokens * self.batch
        least_bytes = activations * tokens * self.heads * HEAD_DIM * itemsize
        seconds = {
            "tensor": self.flops(direction, dense=False) / ceilings["matmul_flop_s"],
            "memory": least_bytes / ceilings["copy_bytes_s"],
        }
        if ceilings["exp_s"]:
            seconds["exp"] = exps * self.batch * self.heads * self.windows.pairs / ceilings["exp_s"]
        binding = max(seconds, key=seconds.get)
        return 1e3 * seconds[binding], binding


def model_cases(model: str, clips: int, images: int, frames: int = 8) -> Iterator[Case]:
    """Every kind of attention block of a model; `frames` counts temporal tokens, 8 or 16."""
    for stage, depth in enumerate(DEPTHS[model]):
        side, heads = 56 >> stage, WIDTHS[model] // HEAD_DIM << stage
        for stream, batch, extent in (("video", clips, frames), ("image", images, 1)):
            cut = (0, 3, 3) if stream == "image" else (0, 3 * (side > 7), 3 * (side > 7))
            for shifted in (False, True):
                if not batch or (shifted and not any(cut)):
                    continue  # the last video stage has one window and no shift
                shift = cut if shifted else (0, 0, 0)
                # the official model masks its images in unshifted blocks too
                mask_shift = cut if shifted or stream == "image" else (0, 0, 0)
                windows = Windows((extent, side, side), (extent, 7, 7), (frames, 7, 7), shift, mask_shift)
                blocks = depth // 2 if any(cut) else depth
                yield Case(model, stage + 1, stream, batch, shifted, heads, blocks, windows)


def default_cases() -> list[Case]:
    """Swin-B, 8 clips and 64 images."""
    return list(model_cases("b", clips=8, images=64))


def further_cases() -> list[Case]:
    """Other sizes, larger batches, and the 16-frame window of fine-tuning."""
    cases = [case for model in "tsl" for case in model_cases(model, clips=8, images=64)]
    cases += model_cases("b", clips=32, images=256)
    return cases + list(model_cases("b", clips=8, images=0, frames=16))


def soak_cases() -> list[Case]:
    """Every window that the models use, at Swin-B's sizes: 16-frame clips and images, longer and shorter clips."""
    others = [case for frames in (16, 4) for case in model_cases("b", clips=2, images=0, frames=frames)]
    return default_cases() + others


def small_cases() -> list[Case]:
    """What a CPU can time: the last two stages, one clip and two images."""
    return [case for case in model_cases("t", clips=1, images=2) if case.stage >= 3]


def tiny_cases() -> list[Case]:
    """What Triton's interpreter runs in seconds: a large and a small window, both cut."""
    large = Windows((2, 6, 6), (2, 6, 6), (2, 6, 6), (0, 0, 0), (0, 3, 0))
    small = Windows((1, 8, 4), (1, 4, 4), (1, 4, 4), (0, 2, 0), (0, 2, 0))
    return [Case("tiny", 1, "video", 1, True, 1, 1, large), Case("tiny", 1, "image", 2, True, 1, 1, small)]
