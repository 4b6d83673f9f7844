"""NVDEC through PyNvVideoCodec (MIT; the extra `gpu`): a session of sessions.py. Not run on a GPU yet.

What it relies on in that library, whose 2.2.4 has these names: a decoder is made once and takes streams of the same
size one after the other; an empty packet ends a stream and brings out what is left; a frame carries its packet's
`pts`; a frame of NV12 is a DLPack tensor of (H+H/2,W). GpuDecoder compares its first frames with a worker's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import numpy as np
import torch

from bevt_ds.data.decoding.gpu_decoder import GpuDecoder
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.decoding.sessions import Frames, GpuRefusal, StreamKind

SESSIONS = 14  # two for each engine of an H100 or H200: one is fed while the other decodes. Not measured
_LIBRARY = "PyNvVideoCodec"
_CODECS = {"h264": "H264", "hevc": "HEVC"}


def why_not() -> str:
    """Why NVDEC cannot be used by this process; "": it can be tried."""
    try:
        import_module(_LIBRARY)
    except ImportError:
        return f"{_LIBRARY} is not installed (pip install 'bevt_ds[gpu]')"
    except (OSError, RuntimeError) as error:  # a library of the driver is missing
        return f"{_LIBRARY}: {(str(error).strip().splitlines() or ['cannot be loaded'])[0]}"
    return ""


def nvdec(pool: DecodePool, device: torch.device) -> GpuDecoder:
    """A decoder on that GPU. Nothing is opened before the first clip."""
    device = torch.device("cuda", device.index or 0)
    library = import_module(_LIBRARY)
    return GpuDecoder(pool, lambda kind: NvdecSession(library, kind, device), SESSIONS)


class NvdecSession:
    """One decoder of the library, for one kind of stream.

    It copies frames on the CUDA stream on which they are used: a frame's memory may be written again behind that.
    """

    def __init__(self, library: ModuleType, kind: StreamKind, device: torch.device) -> None:
        self._library, self._kind, self._stream = library, kind, torch.cuda.Stream(device)
        with self._refusing():
            self._decoder = library.CreateDecoder(
                gpuid=device.index,
                codec=getattr(library.cudaVideoCodec, _CODECS[kind.codec]),
                cudastream=self._stream.cuda_stream,
                usedevicememory=True,
                maxwidth=kind.width,
                maxheight=kind.height,
            )

    def decode(self, packet: memoryview, number: int) -> Frames:
        """See Session."""
        data = np.frombuffer(packet, np.uint8)
        part = self._library.PacketData()
        part.bsl, part.bsl_data, part.pts = len(data), data.ctypes.data, number
        return self._frames(part)

    def flush(self) -> Frames:
        """See Session."""
        return self._frames(self._library.PacketData())

    @contextmanager
    def context(self) -> Iterator[None]:
        """See Session."""
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def close(self) -> None:
        """The library frees a decoder when nothing refers to it."""
        self._decoder = None

    def _frames(self, part) -> Frames:
        with self._refusing():
            return [(frame.getPTS(), torch.from_dlpack(frame)) for frame in self._decoder.Decode(part)]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What the library raises, as GpuRefusal."""
        try:
            yield
        except (RuntimeError, ValueError, self._library.PyNvVCException) as error:
            first, *_ = str(error).strip().splitlines() or ["no reason is given"]
            raise GpuRefusal(f"{' '.join(map(str, self._kind))}: {first}") from error
