"""Preflight: labelled sets without a decodable video are refused before anything starts."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bevt_ds.config.samples import DataConfig, LabelledDataConfig, ViewsConfig
from bevt_ds.config.schema import Config, FinetuneTrainConfig, OnlineProbeConfig, ProbeRunConfig, TrainConfig
from bevt_ds.data.labelled_loader import TRIED, LabelledLoader
from bevt_ds.errors import UserError
from bevt_ds.eval import probe_run as probing
from bevt_ds.eval.online_probe import OnlineProbe
from bevt_ds.runtime.distributed import Ranks
from tests.downstream.worlds import on_ranks

TRAIN = FinetuneTrainConfig(global_clips=2, micro_clips=2)
DAMAGE = (
    "none of the 7 videos that were tried can be decoded. Sample 'clip-00' of .*/bad.tar: its MP4 is cut or damaged"
)


@pytest.fixture
def tar(labelled_shards: Path, tmp_path: Path) -> Callable[[set[str]], str]:
    """tar(good): the validation videos in one tar, all but the `good` ones cut in half."""

    def build(good: set[str]) -> str:
        out = tmp_path / "bad.tar"
        with tarfile.open(out, "w") as new:
            for shard in sorted(labelled_shards.glob("val-*.tar")):
                with tarfile.open(shard) as old:
                    for info in old:
                        data = old.extractfile(info).read()
                        if info.name.endswith(".mp4") and info.name not in good:
                            data = data[: len(data) // 2]
                        info.size = len(data)
                        new.addfile(info, io.BytesIO(data))
        return str(out)

    return build


@pytest.mark.parametrize("field", ["train", "val"])
def test_finetuning_on_undecodable_videos_does_not_start(labelled, tar: Callable, field: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.{field}: {DAMAGE}"):
        LabelledLoader(replace(labelled, **{field: tar(set())}), TRAIN)


def test_one_decodable_video_is_enough_to_start(labelled: LabelledDataConfig, tar: Callable) -> None:
    assert TRIED > 7  # the small set is tried whole
    with LabelledLoader(replace(labelled, val=tar({"clip-06.mp4"})), TRAIN) as loader:
        assert sum(map(len, loader.val_shards)) == 7


@pytest.mark.parametrize("field", ["train", "val"])
def test_online_probe_on_undecodable_videos_does_not_start(labelled, tar: Callable, field: str) -> None:
    data = DataConfig(frames=8, stride=2, size=64, token_size=32, short_side=(72, 80), workers=1, threads=1)
    probe = replace(OnlineProbeConfig(2, labelled.train, labelled.val), **{field: tar(set())})
    config = Config("test", data=data, train=TrainConfig(steps=5, micro_clips=2), probe=probe)
    with pytest.raises(UserError, match=rf"^probe\.{field}: {DAMAGE}"):
        on_ranks(1, lambda ranks: OnlineProbe(config, 8, ranks, config.train.steps))


def test_probe_on_undecodable_videos_does_not_start(labelled, tar: Callable, tmp_path, monkeypatch) -> None:
    """Nor does it make a folder; its test set would be opened after all features of the training set."""
    monkeypatch.setattr(probing, "joined_to_measure", lambda: nullcontext(Ranks(0, 1, torch.device("cpu"))))
    monkeypatch.setattr(probing, "load_encoder", lambda config, ranks: None)
    data, out = replace(labelled, val=tar(set())), tmp_path / "out"
    with pytest.raises(UserError, match=f"^data.val: {DAMAGE}"):
        probing.probe(ProbeRunConfig(data=data, views=ViewsConfig(1, 1, 72), output_dir=str(out)))
    assert not out.exists()
