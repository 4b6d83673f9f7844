"""Files that run something when they are loaded carelessly, or that are not what they seem."""

from __future__ import annotations

import functools
import importlib
import io
import json
import operator
import os
import pickle
import struct
import subprocess
import timeit
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class Canary:
    """Pickles as a call that makes a folder: whoever unpickles it naively runs it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Call:
    """Pickles as a call of anything; `rest`: the state, the items to append and those to set that follow it."""

    def __init__(self, function: Callable, *arguments: Any, rest: tuple = ()) -> None:
        self.function, self.arguments, self.rest = function, arguments, rest

    def __reduce__(self):
        return (self.function, self.arguments, *self.rest)


def live_objects(canary: Path) -> dict[str, Any]:
    """Objects whose unpickling makes the canary, each in another way."""
    code, shell, inner = f"__import__('os').mkdir({str(canary)!r})", f"mkdir {canary}", canary.with_suffix(".inner")
    inner.write_bytes(pickle.dumps(Canary(canary)))
    mkdir = Call(getattr, Call(importlib.import_module, "os"), "mkdir")
    return {
        "os.mkdir": Canary(canary),
        "os.system": Call(os.system, shell),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "subprocess.call": Call(subprocess.call, ["mkdir", str(canary)]),
        "subprocess.getoutput": Call(subprocess.getoutput, shell),
        "import and getattr": Call(operator.call, mkdir, str(canary)),
        "operator.methodcaller": Call(operator.call, Call(operator.methodcaller, "mkdir"), canary),
        "functools.partial": Call(operator.call, Call(functools.partial, os.mkdir, str(canary))),
        "pathlib": Call(Path.mkdir, canary),
        "open": Call(io.open, str(canary), "w"),
        "timeit": Call(timeit.timeit, code, "", timeit.default_timer, 1),
        "map": Call(list, Call(map, os.mkdir, [str(canary)])),
        "numpy.load": Call(np.load, str(inner), None, True),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Canary(canary))),
        "torch.load": Call(
            functools.partial(torch.load, weights_only=False), str(saved(inner.with_suffix(".pt"), canary))
        ),
        "state": Call(OrderedDict, rest=({"a": Canary(canary)},)),
        "items to append": Call(list, rest=(None, iter([Canary(canary)]))),
        "items to set": Call(dict, rest=(None, None, iter([(1, Canary(canary))]))),
        "key of a dict": {Canary(canary): 1},
        "deep inside": functools.reduce(lambda nested, _: [nested], range(50), Canary(canary)),
    }


def saved(path: Path, canary: Path) -> Path:
    torch.save(Canary(canary), path)
    return path


def hostile_pickles(folder: Path, canary: Path) -> dict[str, Path]:
    """A file of every live object, in torch's two containers in turns, and files that no container would make."""
    paths = {}
    for number, (name, value) in enumerate(live_objects(canary).items()):
        paths[name] = folder / f"{number}.pt"
        torch.save({"module": value, "x": torch.ones(1)}, paths[name], _use_new_zipfile_serialization=number % 2 == 0)
    loop: dict[str, Any] = {}
    loop["model"] = {"state_dict": loop}
    raw = {
        "protocol 0": f"cos\nmkdir\n(S'{canary}'\ntR.".encode(),
        "no container": pickle.dumps({"model": Canary(canary)}),
        "names with dots": b"\x80\x04\x8c\x02os\x8c\x0dpath.os.mkdir\x93\x8c"
        + bytes([len(str(canary))])
        + str(canary).encode()
        + b"\x85R.",
        "memory of an index": b"\x80\x02]r\xf0\xff\xff\xff.",
        "number of an extension": b"\x80\x02\x82\x01.",
        "unfinished": b"\x80\x02" + b"(" * 100_000,
        "empty": b"",
    }
    for name, data in raw.items():
        paths[name] = folder / f"{name}.pt"
        paths[name].write_bytes(data)
    paths["a loop"], paths["program"], paths["cut"] = (folder / f"{name}.pt" for name in ("loop", "program", "cut"))
    torch.save(loop, paths["a loop"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to leave such programs behind
        torch.jit.script(nn.Linear(1, 1)).save(paths["program"])
    paths["cut"].write_bytes(paths["os.mkdir"].read_bytes()[:-30])
    paths["archive without a pickle"] = folder / "other.pt"
    with zipfile.ZipFile(paths["archive without a pickle"], "w") as archive:
        archive.writestr("../../data.pkl", pickle.dumps(Canary(canary)))
    return paths


def hostile_safetensors(folder: Path) -> dict[str, Path]:
    """Headers that promise what the file does not hold."""
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers = {
        "not JSON": b"{" * 1000,
        "a list": b"[]",
        "deep": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "overlapping": json.dumps({"a": one, "b": one}).encode(),
        "huge": json.dumps({"a": one | {"shape": [2**40, 2**20]}}).encode(),
        "beyond the end": json.dumps({"a": one | {"data_offsets": [0, 2**50]}}).encode(),
        "negative": json.dumps({"a": one | {"data_offsets": [-4, 0]}}).encode(),
        "many": json.dumps({f"a{n}": one for n in range(100_000)}).encode(),
    }
    files = {name: struct.pack("<Q", len(header)) + header + bytes(4) for name, header in headers.items()}
    files |= {"long header": struct.pack("<Q", 2**62) + b"{}", "empty": b"", "short": b"\0\0"}
    paths = {}
    for number, (name, data) in enumerate(files.items()):
        paths[name] = folder / f"{number}.safetensors"
        paths[name].write_bytes(data)
    return paths
