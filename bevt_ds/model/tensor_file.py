"""Reading safetensors; writing them without a copy of the tensors in memory, with the operating system's own errors.

The library's writer copies every tensor into one buffer first, and tells of a full disk by an exception that names
neither the file nor the reason. Files are as it writes them: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bevt_ds.errors import NonFiniteError, UserError

SHOWN = 4  # names in a message
NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        UserError: it is missing, or no such file.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an exception of a library says, in one line that is not too long."""
    return " ".join(str(error).split())[:200]


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors in which a number is infinite or NaN."""
    return [name for name, value in tensors.items() if not torch.isfinite(value).all()]


def require_finite(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse to pass on weights that are of no use.

    Raises:
        NonFiniteError: a number of them is infinite or NaN.
    """
    if bad := not_finite(tensors):
        raise NonFiniteError(f"{source}: {some(bad)} of the weights are not finite: nothing is written.")


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more if names else "unknown"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, which lie on the CPU, and text about them.

    Raises:
        OSError: the file cannot be written.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that each is aligned
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
