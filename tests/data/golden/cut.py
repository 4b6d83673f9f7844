"""Cuts the committed golden subset out of the full golden set: `python tests/data/golden/cut.py FULL_SET_FOLDER`.

Images are cropped to their last 14x14 tokens or so, and outputs to those tokens whose value does not depend on what
was cut away: windows start at multiples of 7 tokens, and a displaced window reaches 3 tokens beyond the crop.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
State = dict[str, Tensor]

CROP, INNER = slice(168, 224), slice(45, 56)  # pixels and tokens of a 224 image: windows 6 and 7 along each axis
CROP_B = (slice(168, 236), slice(168, 218))  # pixels of pad_b: its last windows, padding included
INNER_B = (slice(45, 59), slice(45, 55))  # tokens
STAGE1 = ("mask_token", "patch_embed", "layers.0.blocks")


def stage1(full: Path) -> State:
    """Stems and first stage: both streams, temporal shift, window 16, padding in all three axes."""
    weights = load_file(full / "bevt_joint_small.safetensors")
    joint = load_file(full / "bevt_joint_small_io.safetensors")
    finetune = load_file(full / "swin3d_finetune_small_io.safetensors")
    cut = {k: v for k, v in weights.items() if k.removeprefix("backbone.").startswith(STAGE1)}
    cut |= {key: joint[key] for key in ("in.mean", "in.std")}
    for name in ("video", "image"):
        cut[f"in.{name}_u8"] = joint[f"in.{name}_u8"][..., CROP, CROP]
        tokens = joint[f"in.{name}_mask"].repeat_interleave(4, -1).repeat_interleave(4, -2)
        cut[f"in.{name}_token_mask"] = tokens[..., 42:, 42:]
        for part in ("stem_mean", "stem_rms", "stage1_mean", "stage1_rms"):
            cut[f"out.{name}_{part}"] = joint[f"out.{name}_{part}"][..., INNER, INNER]
    cut["in.t32_half_u8"] = finetune["in.t32_half_u8"][..., CROP, CROP]
    cut["in.pad_b_u8"] = finetune["in.pad_b_u8"][..., *CROP_B]
    for name, inner in (("t32", (INNER, INNER)), ("t32_window16", (INNER, INNER)), ("pad_b", INNER_B)):
        cut[f"out.{name}.stage1_mean"] = finetune[f"out.{name}.stage1_mean"][..., *inner]
    return cut


def head(full: Path) -> State:
    """The classifier on the images' masked features: losses, accuracy and its gradients' norms."""
    weights = load_file(full / "bevt_joint_small.safetensors")
    joint = load_file(full / "bevt_joint_small_io.safetensors")
    masked = joint["in.image_mask"].bool()
    cut = {k: v for k, v in weights.items() if k.startswith("cls_head.lm_head.")}
    cut |= {k: v for k, v in joint.items() if k.startswith("grad_norm_image_only.cls_head.")}
    cut |= {k: joint[k] for k in ("out.loss_image", "out.acc_image", "out.image_ce_masked")}
    cut["in.target_ids"] = joint["in.image_target_ids"][masked]
    cut["in.features"] = joint["out.image_features"][masked.flatten(1)]
    return cut


def tables(full: Path) -> State:
    """Inflation of a 2-D checkpoint and resizing of bias tables, one case of each."""
    inflate = load_file(full / "inflate_small.safetensors")
    resize = load_file(full / "rpb_resize.safetensors")
    parts = ("norm.", "patch_embed", "layers.1.blocks.0.attn.relative_position_bias_table", "fc_norm.")
    cut = {
        key: value
        for key, value in inflate.items()
        if key.split("/")[0] in ("in.v1", "in.v2", "out.v1", "out.v2")
        and key.split("/")[1].removeprefix("module.").removeprefix("encoder.").startswith(parts)
    }
    return cut | {k: v for k, v in resize.items() if k.endswith("heads2")}


def dvae(full: Path) -> State:
    """Two of the tokenizer's four images."""
    io = load_file(full / "dvae_encoder_small_io.safetensors")
    first = io["out.logits_pos"][:, 0] < 2
    cut = {key: io[key][:2] for key in ("in.image_u8", "out.ids", "out.margin", "out.logits_mean", "out.logits_std")}
    return cut | {"out.logits_pos": io["out.logits_pos"][first], "out.logits_at": io["out.logits_at"][first]}


def layer_decay(full: Path) -> dict[str, object]:
    """Learning rate and weight decay of every parameter, names with the same numbers together."""
    stored = json.loads((full / "layer_decay.json").read_text())
    cut: dict[str, object] = {}
    for recipe in ("k400", "ssv2"):
        groups: dict[tuple[tuple[float, ...], ...], list[str]] = {}
        for name, numbers in stored[recipe]["params"].items():
            key = tuple(tuple(numbers[kind]) for kind in ("effective", "intended"))
            groups.setdefault(key, []).append(name)
        cut[recipe] = [
            {"effective": effective, "intended": intended, "names": names}
            for (effective, intended), names in groups.items()
        ]
    return cut


def main(full: Path) -> None:
    """Write every file of the subset next to this one."""
    for part in (stage1, head, tables, dvae):
        tensors = {key: value.contiguous() for key, value in part(full).items()}
        save_file(tensors, HERE / f"{part.__name__}.safetensors", metadata={"format": "pt"})
    (HERE / "layer_decay.json").write_text(json.dumps(layer_decay(full), indent=0) + "\n", encoding="utf-8")
    for whole in ("encoder_small.pkl", "clip_indices.json"):
        shutil.copyfile(full / whole, HERE / whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
