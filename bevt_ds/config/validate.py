"""Validates a configuration before startup, and splits a step over ranks.

What a single field may be stands with the field (schema.py); here are the rules that join several.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from bevt_ds.config.loggers import LOGGERS, LogConfig
from bevt_ds.config.parse import Leaf, Section, config_fields, get_value
from bevt_ds.config.samples import DataConfig, LabelledDataConfig, ViewsConfig
from bevt_ds.config.schema import (
    Config,
    FinetuneConfig,
    FinetuneTrainConfig,
    InferenceConfig,
    ProbeRunConfig,
    RunConfig,
    RunT,
    StreamsTrainConfig,
    TrainingConfig,
    UnlabelledConfig,
)
from bevt_ds.config.targets import TokenizerConfig
from bevt_ds.config.tokenizing import TokenizerTrainingConfig, levels_problems
from bevt_ds.errors import UserError
from bevt_ds.tokenizer_names import unknown_name

WEIGHTS_OF = {  # tokenizers that need weights, but for dalle -> which
    "vq": "the folder of a run of bevt_ds/train_tokenizer.py",
    "huggingface": "a folder that save_pretrained of transformers wrote",
    "torchscript": "a file such as Cosmos' encoder.jit",
}


def validate(config: RunT, values: Mapping[str, Any] | None = None) -> RunT:
    """Check what can be known without shards, weights or ranks; returns the config itself.

    values: the DeepSpeed JSON of a training.

    Raises:
        UserError: the first field that cannot work, with the reason.
    """
    _raise_first(problems(config, values))
    return config


def problems(config: RunConfig, values: Mapping[str, Any] | None = None) -> Iterator[str]:
    """All that `validate` finds. Rules that join fields are held only against fields that are in their own bounds."""
    out_of_bounds = list(_field_problems(config))
    yield from out_of_bounds
    if not out_of_bounds:
        yield from _rules(config, values)


def _rules(config: RunConfig, values: Mapping[str, Any] | None) -> Iterator[str]:
    if isinstance(config, TrainingConfig) and values is not None:
        yield from _masters(config, values)
    if isinstance(config, TrainingConfig):
        yield from _loggers(config.log)
        spikes = "train.max_spike with train.precision=fp16: a step that is left out lowers its loss scale; use bf16."
        yield from unless(not config.train.max_spike or config.train.precision != "fp16", spikes)
    if isinstance(config, UnlabelledConfig):
        yield from _samples(config.data)
        yield from _unlabelled(config)
    if isinstance(config, TokenizerTrainingConfig):
        yield from levels_problems(config.model.levels)
    if isinstance(config, Config):
        yield from _pretraining(config)
        yield from _targets(config)
    elif isinstance(config, FinetuneConfig):
        yield from _finetuning(config)
    if isinstance(config, FinetuneConfig | InferenceConfig):
        yield from _labelled(config.data)
        yield from _crop("views.short_side", config.views.short_side, config.data.size)


def check_fields(config: Section, prefix: str = "") -> None:
    """Hold every value of a configuration, or of the section at `prefix`, against what stands with its field.

    Raises:
        UserError: the first that does not fit, with what it must be.
    """
    _raise_first(_field_problems(config, prefix))


def _field_problems(config: Section, prefix: str = "") -> Iterator[str]:
    for leaf in config_fields(type(config)):
        yield from _value_problems(prefix + leaf.key, leaf, get_value(config, leaf.key))


def _value_problems(key: str, leaf: Leaf, value: Any) -> Iterator[str]:
    if get_origin(leaf.type) is Literal:
        allowed = get_args(leaf.type)
        yield from unless(value in allowed, f"{key}={value}: must be {' or '.join(map(str, allowed))}.")
        return
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            problem = leaf.field.problem(number)
            yield from unless(problem is None, f"{key}={value}: must be {problem}.")


def zero_stage(values: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed JSON."""
    return (values.get("zero_optimization") or {}).get("stage", 0)


def _loggers(log: LogConfig) -> Iterator[str]:
    names = log.names
    for name in names:
        yield from unless(
            name in LOGGERS, f"log.to={log.to}: {name!r} is none of {', '.join(LOGGERS)}; none alone is for none."
        )
    yield from unless(len(set(names)) == len(names), f"log.to={log.to}: a logger is named twice.")


def _masters(config: TrainingConfig, values: Mapping[str, Any]) -> Iterator[str]:
    """Half precision needs ZeRO: without it DeepSpeed has neither fp32 sums of gradients nor fp32 weights to save."""
    precision, stage = config.train.precision, zero_stage(values)
    yield from unless(
        precision == "fp32" or stage != 0,
        f"train.precision={precision} with ZeRO stage 0, where DeepSpeed adds gradients up in {precision}: use"
        " --deepspeed_config zero1, which needs no more memory, or train.precision=fp32.",
    )


def _samples(data: DataConfig) -> Iterator[str]:
    """The sizes of pretraining's samples, and their masks."""
    mask, cells = data.mask, (data.size // 16) ** 2
    yield from unless(
        data.token_size * 2 == data.size,
        f"data.token_size={data.token_size}: must be half of data.size={data.size}.",
    )
    yield from unless(
        data.short_side[0] <= data.short_side[1],
        f"data.short_side={data.short_side}: the first must not be larger.",
    )
    yield from _crop("data.short_side", data.short_side[0], data.size)
    yield from unless(
        int(mask.ratio * cells) >= 1,
        f"data.mask.ratio={mask.ratio}: must mask at least one of {cells} cells.",
    )
    yield from unless(
        mask.tube[0] <= mask.tube[1],
        f"data.mask.tube={mask.tube}: must be two shares of the clip, the smaller first.",
    )


def _length(train: StreamsTrainConfig | FinetuneTrainConfig) -> Iterator[str]:
    yield from unless(
        train.epochs + train.steps > 0, "train.epochs and train.steps are both 0: there is nothing to do."
    )


def _unlabelled(config: UnlabelledConfig) -> Iterator[str]:
    data, train = config.data, config.train
    yield from _length(train)
    yield from unless(
        train.global_clips + train.global_images > 0,
        "train.global_clips and train.global_images are both 0: there is nothing to train on.",
    )
    yield from unless(
        train.micro_clips % data.clips_per_video == 0,
        f"train.micro_clips={train.micro_clips}: must be a multiple of data.clips_per_video={data.clips_per_video},"
        " because one rank decodes a video once for all its clips.",
    )
    yield from unless(
        data.crops % data.clips_per_video == 0,
        f"data.crops={data.crops}: must be a multiple of data.clips_per_video={data.clips_per_video}: an epoch takes so"
        " many crops of a video.",
    )


def _pretraining(config: Config) -> Iterator[str]:
    data, train, probe = config.data, config.train, config.probe
    yield from unless(
        train.min_gain <= 0 or bool(data.eval_videos or data.eval_images or data.holdout),
        f"train.min_gain={train.min_gain} needs held-out samples: data.holdout, or the shards data.eval_videos and"
        " data.eval_images.",
    )
    yield from unless(
        not probe.every or bool(probe.train and probe.val and train.global_clips),
        f"probe.every={probe.every} needs labelled shards, probe.train and probe.val, and clips to train on.",
    )


def _finetuning(config: FinetuneConfig) -> Iterator[str]:
    train, data = config.train, config.data
    yield from _length(train)
    yield from _crop("data.short_side", data.short_side, data.size)
    yield from unless(
        not (train.mixup or train.cutmix) or train.micro_clips % 2 == 0,
        f"train.mixup and train.cutmix mix pairs of clips: train.micro_clips={train.micro_clips} must be even.",
    )


def check_labelled(data: LabelledDataConfig) -> None:
    """Check what can be known of labelled data without its shards.

    Raises:
        UserError: the first field that cannot work, with the reason.
    """
    check_fields(data, "data.")
    _raise_first(_labelled(data))


def _labelled(data: LabelledDataConfig) -> Iterator[str]:
    yield from unless(
        data.crop_area[0] <= data.crop_area[1],
        f"data.crop_area={data.crop_area}: must be two shares of the frame, the smaller first.",
    )
    yield from unless(
        data.crop_aspect[0] <= data.crop_aspect[1],
        f"data.crop_aspect={data.crop_aspect}: must be two ratios, the smaller first.",
    )
    yield from unless(
        data.decoder in ("auto", "cpu"),
        f"data.decoder={data.decoder}: labelled videos are decoded on the CPU; use data.decoder=auto.",
    )


def check_views(data: LabelledDataConfig, views: ViewsConfig) -> None:
    """Check the views of a test, and that they can hold the crop. UserError: the first field that cannot work."""
    check_fields(views, "views.")
    check_holds_crop("views.short_side", views.short_side, data.size)


def check_holds_crop(key: str, side: int, size: int) -> None:
    """The crop is taken from a frame whose short side is `side` pixels. UserError: it does not fit."""
    _raise_first(_crop(key, side, size))


def _crop(key: str, side: int, size: int) -> Iterator[str]:
    yield from unless(side >= size, f"{key}={side}: a side below data.size={size} cannot hold the crop.")


def require_inputs(config: RunConfig) -> None:
    """Check that the shards are named and that the files which the configuration names are there.

    Raises:
        UserError: what is missing, and where it goes.
    """
    _raise_first(missing_inputs(config))


def missing_inputs(config: RunConfig) -> Iterator[str]:
    """All that `require_inputs` finds."""
    if isinstance(config, InferenceConfig):
        yield from _weights(config)
    if isinstance(config, UnlabelledConfig):
        yield from _streams(config)
    if isinstance(config, Config):
        yield from target_files(config)
    if isinstance(config, TokenizerTrainingConfig):
        path = config.perceptual.weights
        yield from unless(not path or Path(path).is_file(), f"perceptual.weights={path}: no such file.")
    if isinstance(config, FinetuneConfig | ProbeRunConfig):
        yield from _shards("data.train", config.data.train)
    if isinstance(config, InferenceConfig):
        yield from _shards("data.val", config.data.val)
    if isinstance(config, TrainingConfig):
        for name in config.log.names:
            yield from unless(
                name not in LOGGERS or find_spec(name) is not None,
                f"log.to={config.log.to}: the package {name} is not installed: pip install {name}",
            )
        # A run that continues does not read it; one that finds nothing to continue from fails on reading it.
        yield from unless(
            not config.init_from or config.resume != "never" or Path(config.init_from).exists(),
            f"init_from={config.init_from}: no such file or folder.",
        )


def _streams(config: UnlabelledConfig) -> Iterator[str]:
    data, train = config.data, config.train
    yield from unless(
        bool(data.videos) or not train.global_clips,
        "data.videos is empty: name the shards, or train.global_clips=0.",
    )
    yield from unless(
        bool(data.images) or not train.global_images,
        "data.images is empty: name the shards, or train.global_images=0.",
    )


def _targets(config: Config) -> Iterator[str]:
    teacher, features = config.teacher, config.target == "features"
    given = next((f"teacher.{name}={value}" for name, value in vars(teacher).items() if value), "")
    yield from unknown_name(config.tokenizer.name)
    yield from unless(
        bool(teacher.name or teacher.weights) or not features,
        "target=features needs a frozen network: teacher.name, one of timm's, or teacher.weights, a run of ours.",
    )
    yield from unless(
        not config.tokens or bool(config.data.crops),
        f"tokens={config.tokens} needs data.crops, how many crops a sample has: without, no crop comes twice.",
    )
    yield from unless(
        not config.tokens or not features, f"tokens={config.tokens} are ids: leave it out with target=features."
    )
    yield from unless(
        features or not given, f"{given}: a teacher makes no ids: say target=features, or leave teacher.* out."
    )


def target_files(config: Config) -> Iterator[str]:
    """What is missing of the files that a run's targets are made with."""
    if config.target == "ids":
        yield from tokenizer_files(config.tokenizer)
        return
    teacher, path = config.teacher, Path(config.teacher.weights)
    there = not teacher.weights or (path.is_file() if teacher.name else path.exists())
    yield from unless(there, f"teacher.weights={teacher.weights}: no such file{'' if teacher.name else ' or folder'}.")


def tokenizer_files(tokenizer: TokenizerConfig) -> Iterator[str]:
    """What is missing of the files that a tokenizer is read from."""
    yield from unless(
        tokenizer.name != "dalle" or bool(tokenizer.weights),
        "tokenizer.weights is empty: download encoder.pkl of the DALL-E dVAE (about 215 MB; openai/DALL-E names the"
        " address) and pass tokenizer.weights=PATH/encoder.pkl, or use tokenizer.name=random_projection.",
    )
    for name, what in WEIGHTS_OF.items():
        yield from unless(
            tokenizer.name != name or bool(tokenizer.weights),
            f"tokenizer.weights is empty: tokenizer.name={name} needs {what}.",
        )
    there = Path(tokenizer.weights).is_file() if tokenizer.name == "dalle" else Path(tokenizer.weights).exists()
    named = tokenizer.weights and tokenizer.name in ("dalle", *WEIGHTS_OF)
    yield from unless(not named or there, f"tokenizer.weights={tokenizer.weights}: no such file.")
    decoder = tokenizer.decoder if tokenizer.name == "dalle" else ""
    yield from unless(not decoder or Path(decoder).is_file(), f"tokenizer.decoder={decoder}: no such file.")


def _weights(config: InferenceConfig) -> Iterator[str]:
    yield from unless(
        bool(config.weights), "weights= is missing: name a run's folder, saved weights, or an official file."
    )
    there = not config.weights or Path(config.weights).exists()
    yield from unless(there, f"weights={config.weights}: no such file or folder.")


def micro_steps(config: TrainingConfig, world: int) -> int:
    """Forward passes a rank makes in one step of a run of any kind; all its streams take the same number.

    Raises:
        UserError: the global batch does not divide; the message lists micro-batches that do.
    """
    return micro_steps_of(config.train.streams, world)


def micro_steps_of(streams: Mapping[str, tuple[int, int]], world: int) -> int:
    """`micro_steps` from what a run's streams take: samples a step, and samples of a rank's forward pass."""
    sizes = {name: both for name, both in streams.items() if both[0] > 0}
    counts = {name: _accumulation(name, sizes, world) for name in sizes}
    if len(set(counts.values())) > 1:
        raise UserError(
            f"clips need {counts['clips']} forward passes a step and images {counts['images']}: they must need as"
            f" many. The number is train.global_* / (train.micro_* x {world} ranks)."
        )
    return next(iter(counts.values()))


def ranks_that_divide(streams: Mapping[str, tuple[int, int]]) -> list[int]:
    """The numbers of ranks that a step of these streams can be divided into, with micro-batches that fit it."""
    shared = gcd(*(total for total, _ in streams.values()))
    return [n for n in range(1, shared + 1) if shared % n == 0]


def _accumulation(name: str, sizes: Mapping[str, tuple[int, int]], world: int) -> int:
    total, micro = sizes[name]
    if micro > 0 and total % (micro * world) == 0:
        return total // (micro * world)
    fits = [m for m in range(1, total // world + 1) if total % (m * world) == 0]
    raise UserError(
        f"train.global_{name}={total} does not divide into micro-batches of train.micro_{name}={micro} on"
        f" {world} ranks: {_micro_advice(name, fits, sizes, world) if fits else _ranks_advice(name, sizes, world)}."
    )


def _micro_advice(name: str, fits: list[int], sizes: Mapping[str, tuple[int, int]], world: int) -> str:
    ranks = _fitting_worlds(sizes)
    others = f"; or start it on {', '.join(map(str, ranks))} rank{'s' * (ranks != [1])}" if ranks else ""
    return f"with {world} ranks train.micro_{name} can be {', '.join(map(str, fits))}{others}"


def _ranks_advice(name: str, sizes: Mapping[str, tuple[int, int]], world: int) -> str:
    ranks = ", ".join(map(str, ranks_that_divide(sizes)))
    return f"train.global_{name} must be a multiple of the {world} ranks; {ranks} ranks divide the step"


def _fitting_worlds(sizes: Mapping[str, tuple[int, int]]) -> list[int]:
    """Numbers of ranks on which all streams divide as they are."""
    least = min(total for total, _ in sizes.values())
    whole = [micro > 0 and total % micro == 0 for total, micro in sizes.values()]
    passes = {total // micro for total, micro in sizes.values()} if all(whole) else set()
    return [n for n in range(1, least + 1) if len(passes) == 1 and min(passes) % n == 0]


def unless(holds: bool, message: str) -> list[str]:
    """The message, unless something holds."""
    return [] if holds else [message]


def _raise_first(messages: Iterable[str]) -> None:
    for message in messages:
        raise UserError(message)


def need_shards(key: str, patterns: str) -> None:
    """Labelled shards must be named at a dotted key. UserError: they are not."""
    _raise_first(_shards(key, patterns))


def _shards(key: str, patterns: str) -> list[str]:
    return unless(bool(patterns), f"{key} is empty: name the labelled shards.")
