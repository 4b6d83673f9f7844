"""What may be decoded at all, the exception for what may not, and what a container claims."""

from __future__ import annotations

from dataclasses import dataclass

from bevt_ds.config.samples import DataConfig


class BadSample(Exception):
    """A sample that cannot be used. The message says why, not which.

    transient: the cause lies outside the sample's bytes (time, memory, storage), so that another try might succeed. A
    resumed run must be told of these; it finds the others again by itself.
    """

    def __init__(self, reason: str, transient: bool = False) -> None:
        super().__init__(reason)
        self.transient = transient


class DecoderFailed(BadSample):
    """The decoder died of a sample or did not end, each time it was tried: most likely it always will."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, transient=True)


@dataclass(frozen=True)
class Limits:
    """Caps that are checked on headers, before anything is allocated for the pixels."""

    pixels: int = DataConfig.max_pixels  # of one frame or image
    frames: int = DataConfig.max_frames  # of one video
    file_bytes: int = DataConfig.max_file_bytes  # of one member
    clip_bytes: int = DataConfig.max_clip_bytes  # of a clip's decoded frames

    @classmethod
    def of(cls, config: DataConfig) -> Limits:
        return cls(config.max_pixels, config.max_frames, config.max_file_bytes, config.max_clip_bytes)

    def check_file(self, size: int) -> None:
        """BadSample: a file of so many bytes is too large to be read."""
        if size > self.file_bytes:
            raise BadSample(f"it has {size} bytes, over data.max_file_bytes={self.file_bytes}")

    def check_size(self, width: int, height: int) -> None:
        """BadSample: no pixels, or too many."""
        if width <= 0 or height <= 0:
            raise BadSample(f"its header says {width}x{height} pixels")
        if width * height > self.pixels:
            raise BadSample(f"its header says {width}x{height} pixels, over data.max_pixels={self.pixels}")

    def check_frames(self, frames: int) -> None:
        """BadSample: no frames, or too many."""
        if frames <= 0:
            raise BadSample("it has no frames")
        if frames > self.frames:
            raise BadSample(f"it has {frames} frames, over data.max_frames={self.frames}")

    def check_clip(self, frames: int, width: int, height: int) -> None:
        """BadSample: the decoded frames of a clip would take too much memory. 3 bytes a pixel."""
        size = 3 * frames * width * height
        if size > self.clip_bytes:
            raise BadSample(f"its clip would take {size} bytes, over data.max_clip_bytes={self.clip_bytes}")


@dataclass(frozen=True)
class Container:
    """The claims of a container's header about its first video stream."""

    name: str  # "mp4", "fragmented mp4", "matroska" or "avi"
    width: int
    height: int
    frames: int | None  # None: it does not say, or an edit list may hide some
    codec: str = ""  # as it is named there; "": that is left to FFmpeg
    may_be_turned: bool = False  # to be shown
