"""The joint model against what the original classes computed, on the full golden set."""

from __future__ import annotations

import pytest
import torch

from bevt_ds import BEVT, Batch
from bevt_ds.model.containers import strip
from bevt_ds.model.convert import our_name, rename

FEATURES = 1e-5  # the golden README's bound; an eps of 1e-6 in LayerNorm gives 2e-5
GRADIENTS = 1e-4  # of the tensor's maximum: same source
RTOL = 1e-4
MARGIN = 1e-3  # of the top two logits: below it fp32 does not decide an argmax


@pytest.fixture(scope="module")
def model(golden):
    return BEVT.from_pretrained(golden / "bevt_joint_small.safetensors")


@pytest.fixture(scope="module")
def streams(joint, normalised, make_stream):
    clip = normalised(joint["in.video_u8"], joint["in.mean"], joint["in.std"])
    image = normalised(joint["in.image_u8"], joint["in.mean"], joint["in.std"])
    return {
        "video": make_stream(clip, joint["in.video_mask"].bool(), joint["in.video_target_ids"]),
        "image": make_stream(image, joint["in.image_mask"].bool(), joint["in.image_target_ids"]),
    }


@pytest.fixture(scope="module")
def features(model, streams):
    video, image = streams["video"], streams["image"]
    with torch.no_grad():
        return {
            "video": model.forward_video(video.pixels, video.mask),
            "image": model.forward_image(image.pixels, image.mask),
        }


@pytest.mark.parametrize("name", ["video", "image"])
def test_golden_joint_features(name, features, joint, relative_error):
    assert relative_error(features[name], joint[f"out.{name}_features"]) < FEATURES


@pytest.mark.parametrize("name", ["video", "image"])
def test_golden_joint_predicted_ids(name, model, features, joint):
    with torch.no_grad():
        logits = model.lm_head(features[name])
    decided = joint[f"out.{name}_logits_margin"] > MARGIN
    assert decided.float().mean() > 0.95
    assert torch.equal(logits.argmax(-1)[decided], joint[f"out.{name}_logits_argmax"].long()[decided])
    positions = joint[f"out.{name}_logits_pos"].long()
    reference = joint[f"out.{name}_logits_at_pos"]
    torch.testing.assert_close(
        logits[0, positions], reference, rtol=RTOL, atol=RTOL * reference.square().mean().sqrt().item()
    )


@pytest.mark.parametrize("name", ["video", "image"])
def test_golden_joint_stages(name, model, streams, joint, relative_error):
    stream = streams[name]
    with torch.no_grad():
        if name == "video":
            stem, policy = model.encoder.patch_embed(stream.pixels), "swin"
            tokens = model.mask_token(stem, stream.mask)
        else:
            stem, policy = model.image_embed(stream.pixels.unsqueeze(2)), "official"
            tokens = model.mask_token(stem, stream.mask.unsqueeze(1))
        outputs = {"stem": stem} | {f"stage{i}": x for i, x in enumerate(model.encoder.encode(tokens, policy), 1)}
    for part, x in outputs.items():
        for statistic, value in (("mean", x.mean(-1)), ("rms", x.square().mean(-1).sqrt())):
            reference = joint[f"out.{name}_{part}_{statistic}"]
            assert relative_error(value.view(reference.shape), reference) < FEATURES, (part, statistic)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("names", [("video", "image"), ("video",), ("image",)], ids="+".join)
def test_golden_joint_losses_accuracies_and_gradients(names, checkpointing, model, streams, joint, relative_error):
    model.encoder.checkpointing = checkpointing
    model.zero_grad()
    out = model(Batch(*(streams[n] if n in names else None for n in ("video", "image"))))
    out.loss.backward()

    expected = sum(joint[f"out.loss_{n}"] for n in names)
    torch.testing.assert_close(out.loss, expected, rtol=RTOL, atol=0)
    for name in names:
        rows = out.metrics[f"rows_{name}"]
        assert rows == streams[name].count
        torch.testing.assert_close(out.metrics[f"loss_{name}"] / rows, joint[f"out.loss_{name}"], rtol=RTOL, atol=0)
        torch.testing.assert_close(out.metrics[f"hits_{name}"] / rows, joint[f"out.acc_{name}"])

    suffix = "" if len(names) == 2 else f"_{names[0]}_only"
    _check_gradients(model, joint, f"grad{suffix}.", f"grad_norm{suffix}.", relative_error)


def _check_gradients(model, joint, full, norm, relative_error):
    """Every parameter's gradient norm, the full gradients that are stored, and none where the original has none."""
    part = lambda prefix: {strip(k.removeprefix(prefix)): v for k, v in joint.items() if k.startswith(prefix)}  # noqa: E731
    norms = {our_name(key): value for key, value in part(norm).items()}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == norms.keys()
    for name, reference in norms.items():
        actual = gradients[name].double().norm().float()
        torch.testing.assert_close(actual, reference, rtol=RTOL, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    for name, reference in rename(part(full)).items():
        assert relative_error(gradients[name], reference) < GRADIENTS, name
