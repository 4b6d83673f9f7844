"""The kernels in a model of torchvision's: python examples/accelerate_torchvision.py

The same clip goes through `swin3d_t` before and after its attention is replaced; on an NVIDIA GPU the second pass runs
the kernels, elsewhere their PyTorch form. Needs torchvision.
"""

from __future__ import annotations

import torch
from torchvision.models.video import swin3d_t

from bevt_ds.kernels import accelerate


def main() -> float:
    """The largest difference of the logits, relative to the largest logit."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = swin3d_t(weights=None).eval().to(device)
    clip = torch.randn(1, 3, 8, 64, 64, device=device)
    with torch.no_grad():
        before = model(clip)
        print(accelerate(model))
        after = model(clip)
    difference = float((after - before).abs().max() / before.abs().max())
    print(f"largest difference: {difference:.1e} of the largest logit")
    return difference


if __name__ == "__main__":
    main()
