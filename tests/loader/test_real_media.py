"""Real clips (H.264 and MPEG-4, MP4 and AVI, with and without sound) and real JPEGs, end to end."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from bevt_ds.config.samples import DataConfig, MaskConfig
from bevt_ds.config.schema import Config, TrainConfig
from bevt_ds.data.loader import Loader
from bevt_ds.shards.pack import pack


def test_real_media_from_files_to_shards_to_batches(media_folder: Path, tmp_path: Path) -> None:
    videos = pack(media_folder, tmp_path, "video", "video")
    images = pack(media_folder, tmp_path, "image", "image")
    assert videos.rejected == images.rejected == 0
    assert videos.samples >= 5 and images.samples >= 4
    data = replace(
        DataConfig(),
        videos=f"{tmp_path}/video-*.tar",
        images=f"{tmp_path}/image-*.tar",
        mask=MaskConfig(),
        workers=2,
    )
    train = TrainConfig(global_clips=videos.samples, micro_clips=1, global_images=videos.samples, micro_images=1)
    with Loader(Config("test", data=data, train=train), folder=tmp_path) as loader:
        batches = list(islice(loader, videos.samples))
        assert loader.bad_samples == 0
    for batch in batches:
        assert batch.video.pixels.shape == (1, 3, 16, 224, 224)
        assert batch.image.view.shape == (1, 3, 112, 112)
        # Neither black nor flat, and the clip moves.
        assert batch.video.pixels.std() > 0.2 and batch.image.pixels.std() > 0.2
        assert (batch.video.pixels[:, :, 0] - batch.video.pixels[:, :, -1]).abs().mean() > 0.01
