"""A folder as the Hugging Face Hub has it: config.json, model.safetensors, preprocessor_config.json and a model card.

Nothing here needs transformers. A Swin that images alone decide is written for transformers' own class; all else for
`bevt_ds.interop.hugging_face`, which AutoModel finds after `import bevt_ds`. The latter is also a folder of ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bevt_ds.batch import MEAN, STD
from bevt_ds.config.parse import to_dict
from bevt_ds.eval.results import SCORES, run_config, run_of
from bevt_ds.interop.references import swin_config
from bevt_ds.interop.writers import OURS, Written, config_of, save_folder
from bevt_ds.model.arch import SwinArch
from bevt_ds.model.convert import Weights
from bevt_ds.runtime.run_dir import SUMMARY

PREPROCESSOR, CARD = "preprocessor_config.json", "README.md"
DATA = ("train", "val", "videos", "images", "frames", "stride", "sampling", "size")  # fields of data.* that a card has
PICKED = ("recipe", "optim", "train")


def save_hugging_face(
    folder: Path, name: str, weights: Weights, written: Written, facts: Mapping[str, Any], source: str
) -> None:
    """Write all files of a new folder; the card takes recipe, data and results from the run that `source` is of.

    `name` is the model's in the card.
    """
    run = run_config(source)
    data = to_dict(run)["data"] if run else {}
    size = data.get("size", 224)
    config = stock_config(weights, size) if written.layout != OURS else our_config(weights, written, data)
    save_folder(folder, written.state, config, facts)
    _write_json(folder / PREPROCESSOR, preprocessor(size, clips=written.layout == OURS))
    settings = to_dict(run) if run else {}
    text = card(name, config, weights, facts, settings, run_of(source) or Path(source))
    (folder / CARD).write_text(text, encoding="utf-8")


def stock_config(weights: Weights, size: int) -> dict[str, Any]:
    """Of transformers' SwinModel."""
    config = swin_config(SwinArch.of(weights.arch), size)
    return {"model_type": "swin", "architectures": ["SwinModel"], "dtype": "float32", **config}


def our_config(weights: Weights, written: Written, data: Mapping[str, Any]) -> dict[str, Any]:
    """Of BevtModel or BevtForVideoClassification, which keep the fields of a folder of ours."""
    config = config_of(weights, written)
    classifies = "head.weight" in written.state
    names = weights.arch.get("classes") or [str(i) for i in range(weights.arch.get("num_classes", 0))]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if classifies else {}
    architecture = "BevtForVideoClassification" if classifies else "BevtModel"
    sampling = {"num_frames": data.get("frames", 16), "image_size": data.get("size", 224)}
    return {"model_type": "bevt", "architectures": [architecture], "dtype": "float32", **sampling, **labels, **config}


def preprocessor(size: int, clips: bool) -> dict[str, Any]:
    """Of transformers' stock image processors: short side resized, centre cropped, ImageNet's mean and spread."""
    scaled = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    levels = {"image_mean": [m / 255 for m in MEAN], "image_std": [s / 255 for s in STD]}
    square = {"height": size, "width": size}
    if not clips:
        return {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": square, **scaled, **levels}
    shape = {"do_resize": True, "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
    return {"image_processor_type": "VideoMAEImageProcessor", **shape, **scaled, **levels}


def card(
    name: str,
    config: Mapping[str, Any],
    weights: Weights,
    facts: Mapping[str, Any],
    run: Mapping[str, Any],
    results: Path,
) -> str:
    """The model card: front matter, what it is, how it is loaded, recipe, data, results, and how it was converted."""
    classifies = config["architectures"] == ["BevtForVideoClassification"]
    task = "video-classification" if classifies else "image-feature-extraction"
    kind = {True: "AutoModelForVideoClassification", False: "AutoModel"}[classifies]
    needs = "import bevt_ds  # registers the class\n" if config["model_type"] == "bevt" else ""
    arch = SwinArch.of(weights.arch)
    load = [f"{needs}from transformers import {kind}", "", f'model = {kind}.from_pretrained("{name}")']
    lines = [
        *("---", "library_name: transformers", f"pipeline_tag: {task}", "tags: [video, swin, bevt]", "---", ""),
        *(f"# {name}", "", "A Video Swin of BEVT: masked token prediction on images and clips."),
        *("", f"Patch {arch.patch}, window {arch.window}, depths {arch.depths}, {arch.embed_dim} channels at first."),
        *("", "```python", *load, "```"),
        *("", "## Recipe", "", *_listing({key: run[key] for key in PICKED if key in run})),
        *("", "## Data", "", *_listing({key: run["data"][key] for key in DATA if key in run.get("data", {})})),
        *("", "## Results", "", *_results(results)),
        *("", "## Conversion", "", *_listing(facts)),
    ]
    return "\n".join(lines) + "\n"


def _listing(values: Mapping[str, Any]) -> list[str]:
    return [f"- {key}: `{value}`" for key, value in values.items() if value not in ("", None)] or ["Not known."]


def _results(folder: Path) -> list[str]:
    """A line for each file of results in a run's folder."""
    files = [*folder.glob(f"*/{SCORES}"), folder / SUMMARY]
    lines = []
    for path in (path for path in files if path.is_file()):
        values = json.loads(path.read_text(encoding="utf-8"))
        numbers = {key: value for key, value in values.items() if key not in ("classes", "config", "versions")}
        lines.append(f"- {path.relative_to(folder)}: `{json.dumps(numbers)}`")
    return lines or ["None were measured where the weights came from."]


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
