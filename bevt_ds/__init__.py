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


class _TimmRegistration(MetaPathFinder):
    """Registers the models with timm when timm is imported.

    So `timm.create_model("bevt_swin_b")` works after `import bevt_ds`, whichever comes first. timm has no entry points
    for models of other packages, and to import it here would cost every decode worker torch.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: Any) -> None:
                run(module)
                import_module("bevt_ds.model.presets")

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    import_module("bevt_ds.model.presets")
else:
    sys.meta_path.insert(0, _TimmRegistration())
