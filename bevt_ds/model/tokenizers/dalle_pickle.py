"""Reads the tensors of a pickled torch module without running anything that the pickle names.

OpenAI publishes the dVAE as a pickled module, whose unpickling normally imports and calls whatever it asks for. Here
each name it may ask for is on a list and stands for something inert of ours; any other name ends the reading. Stand-ins
are made again for each file and leave only plain data behind, so that nothing a pickle does to them lasts.

Two containers exist: a zip (torch 1.6 and later: data.pkl, and a stored member for each storage) and the older one (a
sequence of pickles, then the raw storages). Both are read, fp32 and little-endian only.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from bevt_ds.errors import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
ITEM_BYTES = 4  # fp32
MAX_MODULES = 1000  # encoder and decoder have about 100: more means that a pickle's modules contain each other

MODULES = (
    ("dall_e.encoder", "Encoder"),
    ("dall_e.encoder", "EncoderBlock"),
    ("dall_e.decoder", "Decoder"),
    ("dall_e.decoder", "DecoderBlock"),
    ("dall_e.utils", "Conv2d"),
    ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.activation", "ReLU"),
    ("torch.nn.modules.pooling", "MaxPool2d"),
    ("torch.nn.modules.upsampling", "Upsample"),
    ("torch.nn.modules.linear", "Identity"),
)


class StorageRef(NamedTuple):
    """A run of fp32 numbers, by its name in the container."""

    key: str
    numel: int


class TensorRef(NamedTuple):
    """A tensor as the pickle describes it: where in which storage."""

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_pickled_module(path: Path, part: str) -> dict[str, Tensor]:
    """{parameter's name: fp32 tensor} of the module pickled in the file. Raises UserError for anything else.

    part: what the file should hold, for the message.
    """
    read = _read_zip if zipfile.is_zipfile(path) else _read_legacy
    try:
        root, storages = read(path)
        return {name: _tensor(ref, storages) for name, ref in _parameters(root)}
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        raise UserError(f"{path} is not DALL-E's pickled {part}: {error}") from error


def _allowed() -> dict[tuple[str, str], Any]:
    """What each permitted global stands for: fresh objects, none of which does more than keep its arguments."""

    def rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
        return TensorRef(storage, offset, size, stride)

    def rebuild_parameter(data: Any, *_: Any) -> Any:
        return data

    def device(*_: Any) -> None:
        return None

    allowed: dict[tuple[str, str], Any] = {name: type(name[1], (), {}) for name in MODULES}
    allowed |= {
        ("collections", "OrderedDict"): dict,
        ("__builtin__", "set"): set,
        ("builtins", "set"): set,
        ("torch", "device"): device,
        ("torch", "FloatStorage"): "FloatStorage",
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    }
    return allowed


class _Unpickler(pickle.Unpickler):
    """An unpickler for which the allow-list is the whole world."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="utf-8")
        self._allowed = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no encoder or decoder needs") from None

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # the older container wraps a class together with its source
            return pid[1]
        kind, storage_type, key, _, numel = pid[:5]
        if (kind, storage_type) != ("storage", "FloatStorage") or len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError(f"it refers to {kind!r} of {storage_type!r}: only fp32 storages are read")
        return StorageRef(str(key), int(numel))


Storages = Callable[[StorageRef], bytes]


def _read_zip(path: Path) -> tuple[Any, Storages]:
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise ValueError("a zip without one data.pkl")
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise ValueError("a compressed zip, which torch does not write")
    folder = names[0].removesuffix("data.pkl")
    with archive.open(names[0]) as file:
        root = _Unpickler(file).load()
    return root, lambda ref: archive.read(f"{folder}data/{ref.key}")


def _read_legacy(path: Path) -> tuple[Any, Storages]:
    with path.open("rb") as file:
        if (_Unpickler(file).load(), _Unpickler(file).load()) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
            raise ValueError("no container that torch writes")
        if not _Unpickler(file).load()["little_endian"]:
            raise ValueError("big-endian numbers")
        root, keys = _Unpickler(file).load(), _Unpickler(file).load()
        storages = {str(key): _read_storage(file, path.stat().st_size) for key in keys}
    return root, lambda ref: storages[ref.key]


def _read_storage(file: BinaryIO, file_bytes: int) -> bytes:
    """One storage of the older container: its length as int64, then the numbers."""
    (numel,) = struct.unpack("<q", file.read(8))
    if not 0 <= numel * ITEM_BYTES <= file_bytes - file.tell():
        raise ValueError("a storage longer than the file")
    return file.read(numel * ITEM_BYTES)


def _parameters(root: Any) -> Iterator[tuple[str, TensorRef]]:
    """Walk the modules, which are stand-ins with the attributes that torch's modules pickle."""
    pending, seen = [("", root)], 0
    while pending:
        prefix, module = pending.pop()
        seen += 1
        if seen > MAX_MODULES:
            raise ValueError("too many modules")
        for name, ref in vars(module)["_parameters"].items():
            if not isinstance(ref, TensorRef):
                raise TypeError(f"parameter {prefix}{name} is no tensor")
            yield prefix + name, ref
        pending += [(f"{prefix}{name}.", child) for name, child in vars(module)["_modules"].items()]


def _tensor(ref: TensorRef, storages: Storages) -> Tensor:
    raw = storages(ref.storage)
    if len(raw) != ref.storage.numel * ITEM_BYTES:
        raise ValueError(f"storage {ref.storage.key} has another length than announced")
    if prod(ref.size) > ref.storage.numel:
        raise ValueError(f"a tensor of {ref.size} in a storage of {ref.storage.numel} numbers")
    numbers = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    return numbers.as_strided(ref.size, ref.stride, ref.offset).clone()
