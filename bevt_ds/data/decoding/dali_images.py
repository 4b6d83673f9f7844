"""Images as training decodes them: one choice of DALI's options, and a decoder for a single image."""

from __future__ import annotations

from threading import Lock

import numpy as np
from nvidia.dali import Pipeline, fn, types

from bevt_ds.data.limits import BadSample


def decoded_images(encoded, device: str):
    """DALI's operator on files in memory: uint8 HWC, RGB, turned upright by EXIF. device: "cpu" or "mixed"."""
    # Without it a GPU repeats chroma where a CPU interpolates: 4 levels apart at edges between colours.
    return fn.decoders.image(encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True)


def refusal(error: RuntimeError) -> str:
    """What DALI says of a sample that it cannot decode; "" where the error is none of a decoder's."""
    text = str(error)
    if "fn.decoders." not in text:  # DALI names the operator that failed; only decoders see untrusted bytes
        return ""
    return text.partition("encountered:")[2].split("Current pipeline")[0].strip() or "no reason is given"


class ImageDecoder:
    """Decodes one image at a time on the CPU; threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._graph = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
        with self._graph:
            self._graph.set_outputs(decoded_images(fn.external_source(name="encoded", dtype=types.UINT8), "cpu"))
        self._graph.build()

    def decode(self, data: bytes) -> np.ndarray:
        """A JPEG or PNG: uint8 (H,W,3) RGB, turned upright. BadSample: DALI refuses it."""
        with self._lock:
            self._graph.feed_input("encoded", [np.frombuffer(data, np.uint8)])
            try:
                (images,) = self._graph.run()
            except RuntimeError as error:
                reason = refusal(error)
                if not reason:
                    raise
                raise BadSample(f"DALI cannot decode it: {reason}") from error
            return np.array(images[0])
