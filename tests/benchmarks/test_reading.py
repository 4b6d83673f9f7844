"""The reading benchmark: every variant reads every sample, and the drawn videos decode."""

from __future__ import annotations

from benchmarks import loader_media, reading


def test_every_reading_variant_reads_all_members(tmp_path):
    members = reading.write_shard(tmp_path / "s.tar", kib=1)
    variants = reading.reading(members)
    assert len(members) == reading.SAMPLES
    assert all(len({bytes(data) for data in read()}) == reading.SAMPLES for read in variants.values())


def test_drawn_benchmark_videos_decode(monkeypatch):
    sizes = {"64x48": (48, 64)}
    monkeypatch.setattr(loader_media, "FRAMES", 20)
    for module in (loader_media, reading):
        monkeypatch.setattr(module, "SIZES", sizes)
    (decode,) = reading.decoding().values()
    decode()
