"""`bevt tokens` and tokens=DIR: kept ids are those that the tokenizer makes, or the file is refused."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from bevt_ds.batch import Batch
from bevt_ds.config.parse import set_value
from bevt_ds.config.schema import Config
from bevt_ds.config.targets import TokenizerConfig
from bevt_ds.config.validate import validate
from bevt_ds.data import tokens as kept_ids
from bevt_ds.data.decoding.pool import DecodePool
from bevt_ds.data.limits import BadSample, DecoderFailed
from bevt_ds.data.loader import LEDGER, Loader, OneRank
from bevt_ds.data.reading.storage import Storage
from bevt_ds.data.tokens import KeptIds, contract_of, open_all, open_ids, require_contract
from bevt_ds.errors import UserError
from bevt_ds.model.tokenizers import load_tokenizer, tokenize
from bevt_ds.model.tokenizers.random_projection import RandomProjectionTokenizer
from bevt_ds.train import tokens as program
from tests.batches import assert_same
from tests.loader.media import write_tar

CROPS, IDS = 2, 16
TOKENIZER = load_tokenizer("random_projection", vocab_size=IDS)


def keep(config: Config, rank: int = 0, world: int = 1) -> int:
    """What one rank of `bevt tokens` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(world))
        return program.make_tokens(validate(config))


def with_tokens(config: Config, shards: Path, folder: Path, **data) -> Config:
    names = {"videos": f"{shards}/video-*.tar", "images": f"{shards}/image-*.tar"}
    data = replace(config.data, crops=CROPS, eval_videos="", eval_images="", **{**names, **data})
    tokenizer = TokenizerConfig(name="random_projection", vocab_size=IDS)
    return replace(config, data=data, tokens=str(folder), tokenizer=tokenizer)


def take(config: Config, batches: int, **arguments) -> list[Batch]:
    with Loader(config, **arguments) as loader:
        return list(islice(loader, batches))


def live(config: Config) -> Config:
    """The same run without kept ids."""
    return replace(config, tokens="")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rewritten(path: Path, change: Callable[[dict], None]) -> None:
    """A file of ids with its tensors changed."""
    with safe_open(path, "np") as file:
        texts = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, texts)


@pytest.fixture(scope="module")
def kept(config: Config, shards: Path, tmp_path_factory) -> Config:
    """A run whose ids are kept. Its shards are copies."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(shards, folder / "shards")
    run = with_tokens(config, folder / "shards", folder / "ids")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert keep(run) == 0
    return run


@pytest.fixture
def copied(kept: Config, tmp_path: Path) -> Config:
    """The same with files that a test may change."""
    shutil.copytree(kept.tokens, tmp_path / "ids")
    return replace(kept, tokens=str(tmp_path / "ids"))


@pytest.fixture(scope="module")
def batches(kept: Config) -> list[Batch]:
    return take(kept, 12)


# --- what a run gets --------------------------------------------------------------------------------------------------


def test_kept_ids_are_those_that_the_tokenizer_makes(kept: Config, batches: list[Batch]) -> None:
    """Of both streams, over more than K epochs; all else of a batch is the same, and no view is made."""
    for had, made in zip(batches, take(live(kept), 12), strict=True):
        made = tokenize(TOKENIZER, made)
        for mine, own in ((had.video, made.video), (had.image, made.image)):
            assert torch.equal(mine.targets, own.targets) and len(mine.view) == 0 < len(own.view)
            assert_same(replace(mine, view=own.view), own)
        assert tokenize(TOKENIZER, had) is had


def test_kept_ids_do_not_depend_on_ranks_resume_or_seed(kept: Config, batches: list[Batch]) -> None:
    for rank in range(2):
        for i, batch in enumerate(take(kept, 2, ranks=OneRank(rank, 2))):
            assert_same(batch.video, batches[2 * i + rank].video)
            assert_same(batch.image, batches[2 * i + rank].image)
    assert_same(take(kept, 1, start_step=2)[0].video, batches[4].video)
    other = replace(kept, train=replace(kept.train, seed=99))
    for had, made in zip(take(other, 2), take(live(other), 2), strict=True):
        assert torch.equal(had.video.targets, tokenize(TOKENIZER, made).video.targets)
        assert had.video.keys + had.image.keys != batches[0].video.keys + batches[0].image.keys


def test_clips_of_one_video_have_their_own_ids(kept: Config, tmp_path: Path) -> None:
    pairs = replace(kept, tokens=str(tmp_path), data=replace(kept.data, clips_per_video=2, crops=4))
    pairs = replace(pairs, train=replace(pairs.train, global_images=0))
    assert keep(pairs) == 0
    for had, made in zip(take(pairs, 4), take(live(pairs), 4), strict=True):
        assert torch.equal(had.video.targets, tokenize(TOKENIZER, made).video.targets)


def test_held_out_part_of_the_shards_may_be_any(kept: Config) -> None:
    part = replace(kept, data=replace(kept.data, holdout=0.3))
    for had, made in zip(take(part, 3), take(live(part), 3), strict=True):
        assert torch.equal(had.image.targets, tokenize(TOKENIZER, made).image.targets)


def test_substitute_has_ids_of_its_own(kept: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sample that training cannot read, whatever `bevt tokens` could."""
    real, bad = Storage.read, take(kept, 1)[0].image.keys[0].rpartition("/")[2]

    def read(self, member):
        if member.key == bad:
            raise BadSample("spoilt")
        return real(self, member)

    monkeypatch.setattr(Storage, "read", read)
    (had,) = take(kept, 1, folder=tmp_path)
    (made,) = take(live(kept), 1)
    rejected = [json.loads(line) for line in (tmp_path / LEDGER).read_text().splitlines()]
    assert bad in {row["key"] for row in rejected}
    assert had.image.keys == made.image.keys and bad not in {key.rpartition("/")[2] for key in had.image.keys}
    assert torch.equal(had.image.targets, tokenize(TOKENIZER, made).image.targets)


# --- the program ------------------------------------------------------------------------------------------------------


def test_two_ranks_write_the_files_of_one_and_continue(kept: Config, tmp_path: Path, monkeypatch, capsys) -> None:
    """The second rank is stopped after its first file, and what a kill leaves is taken away."""
    run, written = replace(kept, tokens=str(tmp_path / "ids")), []
    real = program.write_ids

    def stopping(path: Path, *arguments) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        real(path, *arguments)

    assert keep(run, rank=0, world=2) == 0
    assert "rank 0: videos: wrote 2 files; 2 of 3 are there" in capsys.readouterr().out
    monkeypatch.setattr(program, "write_ids", stopping)
    with pytest.raises(KeyboardInterrupt):
        keep(run, rank=1, world=2)
    monkeypatch.setattr(program, "write_ids", real)
    left = tmp_path / "ids" / ".image-000001.tar.image.tokens.safetensors.x1"
    left.write_bytes(b"cut")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "ids").iterdir()}
    assert keep(run) == 0
    assert not left.exists() and all(path.stat().st_mtime_ns == time for path, time in times.items() if path != left)
    assert contents(tmp_path / "ids") == contents(Path(kept.tokens))
    assert "images: wrote 1 files; 3 of 3 are there" in capsys.readouterr().out


@pytest.fixture(scope="module")
def faulty(config: Config, shards: Path, tmp_path_factory) -> Config:
    """A run of one shard of images, of which the second is none."""
    folder = tmp_path_factory.mktemp("faulty")
    with tarfile.open(shards / "image-000000.tar") as tar:
        jpegs = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".jpg")][:6]
    members = {f"image-{i}.jpg": b"no image" * 9 if i == 1 else data for i, data in enumerate(jpegs)}
    write_tar(folder / "image-0.tar", members)
    run = with_tokens(config, folder, folder / "ids", videos="", max_bad_fraction=0.9)
    return replace(run, train=replace(run.train, global_clips=0))


def test_sample_that_cannot_be_read_has_no_ids_and_is_replaced(faulty: Config, tmp_path: Path, capsys) -> None:
    assert keep(faulty) == 0
    assert "images: wrote 1 files; 1 samples cannot be read" in capsys.readouterr().out
    with safe_open(next(Path(faulty.tokens).iterdir()), "np") as file:
        reasons = json.loads(file.metadata()["tokens"])["unreadable"]
    assert [reason[:2] for reason in reasons] == [[1, 0], [1, 1]] and all(reason[2] for reason in reasons)
    for had, made in zip(take(faulty, 6, folder=tmp_path), take(live(faulty), 6), strict=True):
        assert had.image.keys == made.image.keys and "image-0.tar/image-1" not in had.image.keys
        assert torch.equal(had.image.targets, tokenize(TOKENIZER, made).image.targets)
    assert "has no ids of it" in json.loads((tmp_path / LEDGER).read_text().splitlines()[0])["reason"]


def test_file_is_not_written_where_a_sample_may_be_read_later(kept, tmp_path, monkeypatch, capsys) -> None:
    real, seen = Storage.read, []

    def late(self, member):
        seen.append(member)
        if len(seen) == 1:
            raise BadSample("too late", transient=True)
        return real(self, member)

    run = replace(kept, tokens=str(tmp_path), train=replace(kept.train, global_clips=0))
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "read", late)
        assert keep(run) == 1
    said = capsys.readouterr().out
    assert "image-000000.tar: not written, sample 'image-" in said and "too late: run the command again" in said
    assert len(contents(tmp_path)) == 2
    assert keep(run) == 0
    images = {name: data for name, data in contents(Path(kept.tokens)).items() if ".image." in name}
    assert contents(tmp_path) == images


def test_sample_that_fails_the_decoder_each_time_is_written_as_unreadable(kept, tmp_path, monkeypatch, capsys) -> None:
    real = DecodePool.clips
    clip = take(kept, 1)[0].video.keys[0].rpartition("/")[2]
    monkeypatch.setattr(Storage, "read", tagged := with_key(Storage.read))

    def fails(self, data: bytes, *arguments, **more):
        if tagged.keys.get(data) == clip:
            raise DecoderFailed("the decoder died: no message (2 attempts)")
        return real(self, data, *arguments, **more)

    monkeypatch.setattr(DecodePool, "clips", fails)
    run = replace(kept, tokens=str(tmp_path), train=replace(kept.train, global_images=0))
    assert keep(run) == 0
    assert "videos: wrote 3 files; 1 samples cannot be read" in capsys.readouterr().out


def with_key(read: Callable) -> Callable:
    """`read`, which notes the key of what it reads, by content."""

    def noting(self, member):
        data = read(self, member)
        noting.keys[data] = member.key
        return data

    noting.keys = {}
    return noting


@pytest.mark.parametrize(("world", "code"), [(1, 1), (2, 0)])
def test_rank_that_lacks_a_file_ends_no_other(kept: Config, tmp_path: Path, monkeypatch, capsys, world, code) -> None:
    """Exit code 1 would make torchrun end them. What another command is writing stays."""
    real, first = Storage.read, opened_keys(kept)[0]

    def read(self, member):
        if member.key == first:
            raise BadSample("too late", transient=True)
        return real(self, member)

    other = tmp_path / ".mine-000000.tar.image.tokens.safetensors.x1"
    other.write_bytes(b"being written")
    monkeypatch.setattr(Storage, "read", read)
    run = replace(kept, tokens=str(tmp_path), train=replace(kept.train, global_clips=0))
    assert keep(run, world=world) == code
    said = capsys.readouterr().out
    assert "image-000000.tar: not written" in said and "cannot be read" not in said
    monkeypatch.undo()
    assert keep(run) == 0 and other.exists()


def test_ids_beyond_the_vocabulary_are_refused(kept: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomProjectionTokenizer, "encode", lambda self, frames: self(frames) + IDS)
    with pytest.raises(UserError, match="ids outside of its vocabulary of 16"):
        keep(replace(kept, tokens=str(tmp_path)))


# --- what is refused --------------------------------------------------------------------------------------------------

CHANGES = {  # of each field that decides ids: another value
    "data.crops": 4,
    "data.size": 96,
    "data.token_size": 48,
    "data.short_side": (64, 64),
    "data.flip": 0.0,
    "data.frames": 16,
    "data.stride": 1,
    "data.clips_per_video": 2,
    "data.image_jitter": (0.1, 0.1, 0.1),
    "tokenizer.name": "dalle",
    "tokenizer.vocab_size": 17,
    "tokenizer.seed": 1,
    "tokenizer.side": 8,
    "tokenizer.weights": "elsewhere",
}


def test_every_field_of_the_contract_is_tried(kept: Config) -> None:
    fields = contract_of(kept, "video").keys() | contract_of(kept, "image").keys()
    assert CHANGES.keys() | {"format"} == fields


def test_files_of_another_version_of_crops_or_ids_are_refused(kept: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_ids, "FORMAT", kept_ids.FORMAT + 1)
    with pytest.raises(UserError, match=f"format={kept_ids.FORMAT - 1}, this run {kept_ids.FORMAT}"):
        opened(kept)


@pytest.mark.parametrize("key", CHANGES)
def test_other_settings_are_refused_by_name(kept: Config, key: str) -> None:
    changed, refused = set_value(kept, key, CHANGES[key]), 0
    for kind in ("video", "image"):
        contract = contract_of(changed, kind)
        if key in contract:
            refused += 1
            with pytest.raises(UserError, match=f"ids of other settings: {key}=.*, this run .*name another folder"):
                require_contract(kept.tokens, f"{kind}-000000.tar", kind, contract)
    assert refused


def test_fields_that_decide_no_ids_may_differ(kept: Config, tmp_path: Path) -> None:
    for key, value in (("train.seed", 5), ("data.mask.ratio", 0.3), ("data.holdout", 0.1), ("train.micro_clips", 4)):
        assert contract_of(set_value(kept, key, value), "video") == contract_of(kept, "video")
    pictures = replace(kept, data=replace(kept.data, image_jitter=(0.1, 0.1, 0.1)))
    assert contract_of(pictures, "video") == contract_of(kept, "video")
    weights = tmp_path / "weights.pkl"
    found = []
    for data, path in ((b"a", weights), (b"b", weights), (b"b", tmp_path / "moved.pkl")):
        path.write_bytes(data)
        found.append(contract_of(set_value(kept, "tokenizer.weights", str(path)), "image")["tokenizer.weights"])
    assert found[0] != found[1] == found[2]


def opened_keys(config: Config) -> tuple[str, ...]:
    """The keys of the first shard of images."""
    with closing(Storage(config.data)) as storage:
        return storage.shards(config.data.images, "image")[0].keys


def opened(config: Config) -> list[KeptIds]:
    """The images' ids, as a run opens them."""
    with closing(Storage(config.data)) as storage:
        shards = storage.shards(config.data.images, "image")
        return open_all(storage, config.tokens, shards, "image", contract_of(config, "image"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"weight": np.zeros(3)}, path)


def without_texts(path: Path) -> None:
    save_file(load_file(path), path)


def other_shape(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.update(ids=tensors["ids"][:, :1]))


def spoilt_text(path: Path) -> None:
    save_file(load_file(path), path, {"tokens": "["})


def told(**changes: object) -> Callable[[Path], None]:
    """A damage: other texts."""

    def damage(path: Path) -> None:
        with safe_open(path, "np") as file:
            texts = json.loads(file.metadata()["tokens"]) | changes
        save_file(load_file(path), path, {"tokens": json.dumps(texts)})

    damage.__name__ = json.dumps(changes)
    return damage


def a_list(path: Path) -> None:
    save_file(load_file(path), path, {"tokens": "[]"})


def too_few_samples(path: Path) -> None:
    rewritten(path, lambda tensors: tensors.update(samples=tensors["samples"][:-1]))


DAMAGE = [cut, empty, foreign, without_texts, other_shape, spoilt_text, a_list, too_few_samples]
DAMAGE += [told(contract=[]), told(keys=None), told(keys=[1]), told(unreadable=5), told(unreadable=[[0, 0]])]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_or_foreign_file_is_one_clear_error(copied: Config, damage) -> None:
    path = Path(copied.tokens) / "image-000001.tar.image.tokens.safetensors"
    damage(path)
    with pytest.raises(UserError) as caught:
        opened(copied)
    assert re.fullmatch(
        rf"{path} is no whole file of ids \(.+\): remove it, and run `bevt tokens` .*", str(caught.value)
    )


def test_missing_file_is_named_with_the_command(copied: Config) -> None:
    (Path(copied.tokens) / "image-000002.tar.image.tokens.safetensors").unlink()
    with pytest.raises(UserError, match="image-000002.tar.image.tokens.safetensors is missing: run `bevt tokens`"):
        opened(copied)
    with pytest.raises(UserError, match="ids of other settings: data.flip=0.5, this run 0.25"):
        take(set_value(copied, "data.flip", 0.25), 1)


def test_changed_shard_is_refused(kept: Config) -> None:
    with closing(Storage(kept.data)) as storage:
        shards = storage.shards(kept.data.images, "image")
    contract = contract_of(kept, "image")
    assert len(open_ids(kept.tokens, shards[0], "image", contract).rows) == 9
    crcs = (shards[0].crcs[0] ^ 1, *shards[0].crcs[1:])
    with pytest.raises(UserError, match="image-000000.tar has changed: remove it"):
        open_ids(kept.tokens, replace(shards[0], crcs=crcs), "image", contract)
    with pytest.raises(UserError, match="is not in it: remove it"):
        open_ids(kept.tokens, replace(shards[0], keys=("new", *shards[0].keys[1:])), "image", contract)


def test_shards_of_one_name_are_refused(kept: Config) -> None:
    with closing(Storage(kept.data)) as storage:
        shards = storage.shards(kept.data.images, "image")
        with pytest.raises(UserError, match="2 shards would have the file image-000000.tar.image.tokens"):
            open_all(storage, kept.tokens, [*shards, replace(shards[0], path="/b/image-000000.tar")], "image", {})


def test_damaged_ids_count_as_a_bad_sample(copied: Config, tmp_path: Path) -> None:
    for path in Path(copied.tokens).glob("image-*"):
        rewritten(path, lambda tensors: tensors["ids"].__setitem__((0, 0), tensors["ids"][0, 0] ^ 1))
    ledger = tmp_path / "run"
    for had, made in zip(take(copied, 6, folder=ledger), take(live(copied), 6), strict=True):
        same = [i for i, keys in enumerate(zip(had.image.keys, made.image.keys, strict=True)) if len(set(keys)) == 1]
        assert torch.equal(had.image.only(same).targets, tokenize(TOKENIZER, made).image.only(same).targets)
    reasons = [json.loads(line)["reason"] for line in (ledger / LEDGER).read_text().splitlines()]
    assert len(reasons) == 3 and all("its ids in" in reason and "are damaged" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.crops": 0}, "tokens=.* needs data.crops"),
        ({"target": "features", "teacher.name": "resnet10t"}, "tokens=.* are ids: leave it out with target=features"),
    ],
)
def test_settings_that_cannot_have_kept_ids(kept: Config, changes: dict, message: str) -> None:
    for key, value in changes.items():
        kept = set_value(kept, key, value)
    with pytest.raises(UserError, match=message):
        validate(kept)
