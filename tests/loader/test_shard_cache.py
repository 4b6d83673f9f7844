"""The cache of remote shards: sharing between processes, size limit, repair of damaged or outdated copies."""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bevt_ds.config.samples import DataConfig
from bevt_ds.data.limits import BadSample
from bevt_ds.data.reading import cache as cache_module
from bevt_ds.data.reading.cache import ShardCache
from bevt_ds.data.reading.members import Shard
from bevt_ds.data.reading.remote import RemoteError
from bevt_ds.data.reading.storage import Storage
from bevt_ds.errors import UserError
from tests.loader.media import in_threads
from tests.loader.server import Server

NAME = "video-000000.tar"


def storage_of(folder: Path, **changes: object) -> Storage:
    return Storage(DataConfig(cache_dir=str(folder / "cache"), remote_seconds=5.0, **changes))


def test_concurrent_processes_fetch_a_shard_once(server: Server, cache: ShardCache) -> None:
    """Threads with locks of their own stand in for processes: flock does not tell them apart."""
    in_threads(cache.local, [server.url(NAME)] * 8)
    assert len(server.requests) == 1


def test_cache_evicts_to_stay_within_its_size(server: Server, tmp_path: Path) -> None:
    names = sorted(server.files)[:4]
    size = max(len(server.files[name]) for name in names)
    cache = ShardCache(tmp_path / "cache", 2 * size, seconds=5)
    places = []
    for name in names:
        places.append(cache.local(server.url(name)))
        time.sleep(0.01)
    kept = [place for place in places if place.exists()]
    assert places[-1] in kept and places[0] not in kept
    assert sum(place.stat().st_size for place in kept) <= 2 * size


def test_cache_smaller_than_its_shards_still_reads_every_sample(server: Server, tmp_path: Path, caplog) -> None:
    """Readers of three shards throw out each other's copies: every sample comes through; a line says why it drags."""
    storage = storage_of(tmp_path, cache_bytes=1)
    shards = [storage.load_shard(server.url(f"video-00000{i}.tar")) for i in range(3)]

    def read(shard: Shard) -> None:
        data = server.files[shard.path.rpartition("/")[2]]
        for member in list(shard.members()) * 3:
            assert storage.read(member) == data[member.offset : member.offset + member.size]

    in_threads(read, shards)
    assert len(server.requests) > 3
    assert "over data.cache_bytes=1: no other stays" in caplog.text
    storage.cache.discard(shards[0].path)
    storage.cache.local(shards[0].path)
    assert len(list(storage.cache.folder.glob("*.tar"))) == 1
    storage.close()


@pytest.mark.parametrize("times", [1, 1000])
def test_copy_evicted_before_it_is_opened_is_fetched_again(server, cache, monkeypatch, times: int) -> None:
    """By another process, whose shards need the room: it is fetched again, a few times."""
    real, left = ShardCache.local, iter(range(times))

    def thrown_out(self: ShardCache, url: str) -> Path:
        place = real(self, url)
        if next(left, None) is not None:
            place.unlink()
        return place

    monkeypatch.setattr(ShardCache, "local", thrown_out)
    if times > 1:
        with pytest.raises(RemoteError, match=r"data.cache_bytes=\d+ leaves no room"):
            cache.open(server.url(NAME))
    else:
        with cache.open(server.url(NAME)) as copy:
            assert copy.read() == server.files[NAME]
    assert len(server.requests) == min(times + 1, cache_module.OPENINGS)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch, cache: ShardCache) -> Callable[[int], None]:
    """Give the disk of the cache that many bytes for tars. A write that does not fit is done in part, then fails."""
    room, real = [0], os.fdopen

    class File(io.FileIO):
        def write(self, data: memoryview) -> int:
            free = room[0] - sum(file.stat().st_size for file in cache.folder.iterdir() if file.suffix != ".json")
            if free <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:free])

    monkeypatch.setattr(os, "fdopen", lambda fd, mode, *a, **k: File(fd, "w+") if mode == "w+b" else real(fd, mode))
    return lambda size: room.__setitem__(0, size)


def test_full_disk_evicts_other_shards(server, cache, small_disk, caplog) -> None:
    names = ["video-000000.tar", "video-000001.tar", "image-000000.tar"]
    sizes = [len(server.files[name]) for name in names]
    small_disk(max(sizes[0] + sizes[1], sizes[1] + sizes[2]))
    places = []
    for name in names:
        places.append(cache.local(server.url(name)))
        assert places[-1].read_bytes() == server.files[name]
        time.sleep(0.01)  # so that their order of use shows
    assert len(server.requests) == 3
    assert f"no room left in data.cache_dir={cache.folder}: a shard of {sizes[0]} bytes is thrown out" in caplog.text
    assert [place.exists() for place in places] == [False, True, True]


def test_disk_too_small_for_one_shard_is_an_error(server: Server, cache: ShardCache, small_disk) -> None:
    small_disk(len(server.files[NAME]) - 1)
    with pytest.raises(UserError, match=f"no room left in data.cache_dir=.*{NAME}.*larger disk"):
        cache.local(server.url(NAME))
    assert not list(cache.folder.glob("*.tar")) and not list(cache.folder.glob(".fetch*"))


def test_leftovers_of_killed_fetches_are_removed_after_a_day(server: Server, cache: ShardCache) -> None:
    cache.folder.mkdir(mode=0o700)
    old, young = cache.folder / ".fetch.old", cache.folder / ".fetch.young"
    for file, age in ((old, 90_000), (young, 80_000)):
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    cache.local(server.url(NAME))
    assert young.exists() and not old.exists()


@pytest.mark.parametrize("damage", ["shorter", "no facts", "facts"])
def test_truncated_copy_is_fetched_again(server: Server, cache: ShardCache, damage: str) -> None:
    place = cache.local(server.url(NAME))
    if damage == "shorter":
        os.truncate(place, 100)
    elif damage == "no facts":
        place.with_suffix(".json").unlink()
    else:
        place.with_suffix(".json").write_text("[]")
    assert cache.local(server.url(NAME)).read_bytes() == server.files[NAME]
    assert len(server.requests) == 2


def test_corrupt_copy_is_replaced_and_corrupt_source_is_a_bad_sample(server: Server, tmp_path: Path) -> None:
    """A flipped bit in the cache is got over; the same bit at the source is not the sample that was indexed."""
    storage = Storage(DataConfig(cache_dir=str(tmp_path / "cache"), remote_seconds=5.0))
    member = storage.load_shard(server.url(NAME)).member(0)
    good = storage.read(member)
    damaged = bytearray(server.files[NAME])
    damaged[member.offset + 5] ^= 1
    storage.cache.local(member.path).write_bytes(damaged)
    assert storage.read(member) == good
    server.files[NAME] = bytes(damaged)
    storage.cache.discard(member.path)
    with pytest.raises(BadSample, match="not those that were indexed"):
        storage.read(member)
    storage.close()


@pytest.mark.parametrize("trap", ["link", "writable"])
def test_cache_folder_writable_by_others_is_refused(tmp_path: Path, trap: str) -> None:
    """S6."""
    folder = tmp_path / "cache"
    if trap == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(UserError, match="choose a folder of your own"):
        ShardCache(folder, 1 << 20, seconds=1).local("http://127.0.0.1:9/a.tar")
    assert not list(tmp_path.glob("elsewhere/*"))


def test_symlink_in_the_cache_is_not_followed(server: Server, cache: ShardCache, tmp_path: Path) -> None:
    """S6: even where somebody got in, no file outside is written."""
    place = cache.index_place(server.url(NAME)).with_suffix("").with_suffix(".tar")
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    place.symlink_to(outside)
    (cache.folder / f"{place.name}.lock").symlink_to(tmp_path / "lock")
    with pytest.raises(UserError, match="symbolic links"):
        cache.local(server.url(NAME))
    (cache.folder / f"{place.name}.lock").unlink()
    assert cache.local(server.url(NAME)).read_bytes() == server.files[NAME]
    assert outside.read_bytes() == b"mine"


@pytest.mark.parametrize("same_size", [False, True])
def test_remote_shard_replaced_between_runs_stops_then_reindexes(server, tmp_path, make, same_size: bool) -> None:
    """Found when it is fetched: the run stops, since its plan is of the old one; the next start indexes the new."""
    url, name = server.url("s.tar"), "s.tar"
    server.files[name] = make.tar(tmp_path / name, {"a.jpg": b"old", "b.jpg": b"old"}).read_bytes()
    other = {"c.jpg": b"new", "d.jpg": b"new"} if same_size else {f"{i}.jpg": bytes(9000) for i in range(4)}
    storage = storage_of(tmp_path)
    shard = storage.load_shard(url)
    server.files[name] = make.tar(tmp_path / name, other).read_bytes()
    assert storage_of(tmp_path).load_shard(url) == shard  # the copy is whole: the server is not asked
    assert storage.read(shard.member(0)) == b"old" and len(server.requests) == 1
    storage.cache.discard(url)
    with pytest.raises(UserError, match=r"s.tar is not the file that was indexed.*start the run again"):
        storage.read(shard.member(0))
    again = storage_of(tmp_path)
    found = again.load_shard(url)
    assert found.keys == tuple(key.removesuffix(".jpg") for key in other)
    assert again.read(found.member(0)) == other[f"{found.keys[0]}.jpg"]
    for each in (storage, again):
        each.close()


def test_tar_fetched_corrupt_is_fetched_again_at_the_next_start(server: Server, tmp_path: Path) -> None:
    url, whole = server.url(NAME), server.files[NAME]
    server.files[NAME] = whole[:3000]
    with pytest.raises(UserError, match=f"{NAME} is not a whole tar"):
        storage_of(tmp_path).load_shard(url)
    server.files[NAME] = whole
    assert len(storage_of(tmp_path).load_shard(url)) == 4


def test_missing_remote_shard_is_a_bad_sample_d2(server: Server, tmp_path: Path) -> None:
    """One that may be there the next time."""
    storage = storage_of(tmp_path)
    member = storage.load_shard(server.url(NAME)).member(0)
    storage.cache.discard(member.path)
    del server.files[NAME]
    with pytest.raises(BadSample, match=f"{NAME}: HTTP 404") as caught:
        storage.read(member)
    assert caught.value.transient
    storage.close()


def test_many_bad_samples_of_a_shard_cost_one_more_fetch(server: Server, tmp_path: Path) -> None:
    storage = storage_of(tmp_path)
    members = list(storage.load_shard(server.url(NAME)).members())
    damaged = bytearray(server.files[NAME])
    for member in members:
        damaged[member.offset + 5] ^= 1
    server.files[NAME] = bytes(damaged)
    storage.cache.discard(members[0].path)
    for member in members:
        with pytest.raises(BadSample, match="not those that were indexed"):
            storage.read(member)
    assert len(server.requests) == 3  # to index it, to read from it, and once more
    storage.close()
