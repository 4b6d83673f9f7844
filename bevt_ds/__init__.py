"""BEVT pretraining on DeepSpeed. Public names load lazily: a decode worker must not import torch."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"

if find_spec("bevt_ds.kernels") is None:  # it lies in kernels/ of a checkout, where only an installation finds it
    raise ImportError(
        f"{__file__} is a checkout that is not installed: run `pip install -e .` in it, or `make env`. (If bevt_ds is"
        " installed elsewhere, start Python from another folder.)"
    )

_PUBLIC = {
    "BEVT": "bevt_ds.model.bevt",
    "VideoClassifier": "bevt_ds.model.classifier",
    "VideoSwin": "bevt_ds.model.video_swin",
    "create_model": "bevt_ds.model.presets",
    "load_tokenizer": "bevt_ds.model.tokenizers",
    "load_clip": "bevt_ds.data.files",
    "load_image": "bevt_ds.data.files",
    "features": "bevt_ds.eval.files",
    "predict": "bevt_ds.eval.files",
    "pipeline": "bevt_ds.interop.pipeline",
    "MEAN": "bevt_ds.batch",
    "STD": "bevt_ds.batch",
    "Batch": "bevt_ds.batch",
    "Stream": "bevt_ds.batch",
    "UserError": "bevt_ds.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bevt_ds' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


_REGISTER = {  # module of another package, what of ours registers with it
    "timm": "bevt_ds.model.presets",
    "transformers.models.auto.modeling_auto": "bevt_ds.interop.hugging_face",
}


class _Registration(MetaPathFinder):
    """Registers the models with timm and with transformers' AutoModel when those are imported.

    So `timm.create_model("bevt_swin_base")` works after `import bevt_ds`, whichever comes first. They have no entry
    points for models of other packages, and to import them here would cost every decode worker torch.
    """

    def __init__(self, registers: str, module: str):
        self.registers, self.module = registers, module

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.registers:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                import_module(self.module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


for _theirs, _ours in _REGISTER.items():
    if _theirs in sys.modules:
        import_module(_ours)
    else:
        sys.meta_path.insert(0, _Registration(_theirs, _ours))
