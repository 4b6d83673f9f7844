"""Every number of a run, in frozen typed dataclasses. A recipe returns one of them; `key=value` reaches every field.

`RunConfig` is what every run has. `Config` (pretraining) and `FinetuneConfig` extend it through `TrainingConfig`,
`EvaluateConfig` and `ProbeRunConfig` through `InferenceConfig`. A field is `Annotated[type, Field("what it means",
...)]`: the text is what `--help` prints, and fields.py says what else stands there. `Literal` types are the allowed
values.

Defaults of pretraining are those of BEVT's joint stage; PT below is the original's
configs/recognition/swin/swin_base_patch244_window877_bevt_in1k_k400.py at xyzforever/BEVT@8881b21. Defaults of
fine-tuning are those on Kinetics-400: swin_base_patch244_window877_bevt_finetune_k400.py there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated as A
from typing import ClassVar, Literal, TypeVar

from bevt_ds.config.fields import Field as F
from bevt_ds.config.graphs import REPLAY, Graphs
from bevt_ds.config.loggers import LogConfig
from bevt_ds.config.samples import DataConfig, LabelledDataConfig, SamplingConfig, ViewsConfig
from bevt_ds.config.targets import TargetsConfig

Kernels = Literal["auto", "triton", "torch"]
Precision = Literal["bf16", "fp16", "fp32"]


# The network


@dataclass(frozen=True)
class NetworkConfig:
    """What the training loop asks of any network."""

    kernels: ClassVar[Kernels] = "torch"
    compile: ClassVar[bool] = False


@dataclass(frozen=True)
class BackboneConfig(NetworkConfig):
    """Video Swin. Width, depths and heads belong to the preset that `name` names."""

    name: A[Literal["tiny", "swin_t", "swin_s", "swin_b", "swin_l", "swin_h", "swin_g"], "preset of the backbone"] = (
        "swin_b"
    )
    window: A[
        tuple[int, int, int],
        F("attention window in tokens: time, height, width; loaded tables are resized to it", least=1),
    ] = (8, 7, 7)
    small_windows: A[
        Literal["exact", "official"],
        "maps smaller than the window, at 192 px and below. exact: the bias of each pair is its offset's;"
        " official: as the original and torchvision, for their weights",
    ] = "exact"
    drop_path: A[float, F("stochastic depth of the last block, linear from 0", below=1)] = 0.3
    checkpointing: A[bool, F("recompute blocks in the backward pass: less memory, more time", resume="free")] = False
    recompute: A[
        Literal["block", "attention"], F("checkpointing: whole blocks, or their attention alone", resume="free")
    ] = "block"
    recompute_every: A[int, F("checkpointing: each n-th block of a stage", least=1, resume="free")] = 1
    compile: A[
        bool,
        F(
            "torch.compile blocks, and the tokenizer if any: the first steps take minutes; not with ZeRO-3",
            resume="free",
        ),
    ] = False
    kernels: A[Kernels, F("provider of attention, gather and loss", resume="free")] = "auto"


@dataclass(frozen=True)
class ModelConfig(BackboneConfig):
    """The network of pretraining."""

    image_windows: A[
        Literal["official", "swin"],
        "official: images mask un-shifted blocks too, as the released weights do; swin: the textbook",
    ] = "official"


@dataclass(frozen=True)
class ClassifierConfig(BackboneConfig):
    """The network of fine-tuning: backbone, global average pool, dropout, linear head."""

    dropout: A[float, F("of the pooled features, in front of the head", below=1)] = 0.5


# Optimizer and training loop


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW, cosine with warm-up, clipping."""

    lr: A[float, F("peak learning rate; it is not scaled by the batch", above=0, resume="override")] = 5e-4
    betas: A[tuple[float, float], F("AdamW's decay of the two moments", below=1)] = (0.9, 0.999)
    eps: A[float, F("AdamW's epsilon", above=0)] = 1e-8
    weight_decay: A[float, F("AdamW's decoupled decay; of which parameters: see optim.py")] = 0.05
    warmup_ratio: A[float, F("share of the cosine's value at step 0", resume="override")] = 0.1
    clip_grad: A[float, F("bound on the gradient's global L2 norm; 0: no clipping", resume="override")] = 3.0


@dataclass(frozen=True)
class OptimConfig(AdamWConfig):
    """The optimizer of pretraining (PT, and mmcv's defaults that PT relies on)."""

    warmup_steps: A[int, F("steps of linear warm-up (the original: 10 epochs)", resume="override")] = 9370


@dataclass(frozen=True)
class FinetuneOptimConfig(AdamWConfig):
    """AdamW with layer-wise rates, cosine by epoch with warm-up, clipping, EMA."""

    lr: A[float, F("learning rate of the head; it is not scaled by the batch", above=0, resume="override")] = 3e-4
    weight_decay: A[float, F("AdamW's decoupled decay")] = 1e-3
    layer_decay: A[
        float, F("the rate shrinks by this a layer, from the head to the stem; 1: no decay", above=0, most=1)
    ] = 0.9
    backbone_scale: A[float, F("factor on the backbone's rate, for recipes without layer decay", above=0)] = 1.0
    groups: A[
        Literal["official", "intended"],
        "official: bias tables at the head's rate and norms decayed, which is what the original's optimizer does;"
        " intended: what its configuration says",
    ] = "official"
    warmup_epochs: A[float, F("epochs of linear warm-up", resume="override")] = 2.5
    clip_grad: A[float, F("bound on the gradient's global L2 norm; 0: no clipping", resume="override")] = 40.0
    ema: A[
        float,
        F("weight of the new parameters in their moving average, each step; 0: none", below=1),
    ] = 0.0


@dataclass(frozen=True)
class LoopConfig:
    """Batch, precision, and what is written when. A step is one update of the weights over the global batch."""

    global_clips: A[int, F("clips a step, over all ranks; 0: no video stream")] = 256
    micro_clips: A[int, F("clips a rank takes in one forward pass", resume="free")] = 4
    precision: A[Precision, F("compute type; master weights are fp32", resume="override")] = "bf16"
    seed: A[int, F("seed of everything random; on resume, of what is drawn from there on", resume="override")] = 0
    skip_steps: A[
        int,
        F("steps whose samples are passed over; on resume, a number larger by N skips the next N", resume="override"),
    ] = 0
    log_every: A[int, F("steps from one line of log.jsonl to the next", least=1, resume="free")] = 10
    checkpoint_every: A[
        int, F("steps from one checkpoint to the next; one is written at the end too", least=1, resume="free")
    ] = 1000
    offload_dir: A[
        str, F("folder on a local disk of each node, for a DeepSpeed JSON that offloads to nvme", resume="free")
    ] = ""
    keep_checkpoints: A[int, F("older checkpoints are removed beyond this number", least=1, resume="free")] = 2
    max_skipped: A[
        tuple[int, int],
        F("steps skipped as not finite, in a row and in all, after which one more stops the run", resume="free"),
    ] = (5, 50)
    max_spike: A[
        float,
        F(
            "standard deviations by which a micro-batch's loss may be over those of the last steps, else the step is"
            " skipped; 0: any; 6 is usual",
            least=0,
            resume="override",
        ),
    ] = 0.0
    rank_deadline: A[
        float,
        F(
            "seconds without a sign of a rank until the others end; see docs/reliability.md",
            least=5,
            resume="free",
        ),
    ] = 120.0
    grace_seconds: A[
        float,
        F("from a request to stop to the end, committed or not; 0: as a step and a commit take", resume="free"),
    ] = 0.0

    @property
    def streams(self) -> dict[str, tuple[int, int]]:
        """Samples a step over all ranks, and those of a rank's forward pass, by what the samples are."""
        return {"clips": (self.global_clips, self.micro_clips)}


@dataclass(frozen=True)
class StreamsTrainConfig(LoopConfig):
    """Length and batch of a training on clips, images, or both, without labels."""

    epochs: A[
        int, F("passes over the videos, or images if there are only these; in place of steps", resume="override")
    ] = 0
    steps: A[int, F("optimizer steps (the original: 150 epochs of 240k clips); 0: from epochs", resume="override")] = (
        140_550
    )
    global_images: A[int, F("images a step, over all ranks; 0: no image stream")] = 2048
    micro_images: A[int, F("images a rank takes in one forward pass", resume="free")] = 32
    eval_batches: A[int, F("held-out micro-batches of the closing summary", least=1, resume="free")] = 4

    @property
    def streams(self) -> dict[str, tuple[int, int]]:
        """As LoopConfig's, with the images."""
        return super().streams | {"images": (self.global_images, self.micro_images)}


@dataclass(frozen=True)
class TrainConfig(StreamsTrainConfig):
    """Length and batch of pretraining."""

    graphs: A[Graphs, REPLAY] = "off"
    min_gain: A[
        float,
        F(
            "exit 1 unless both losses end so far below a blind guess: nats, of features a share; 0: no check",
            resume="free",
        ),
    ] = 0.0


@dataclass(frozen=True)
class FinetuneTrainConfig(LoopConfig):
    """Length, batch and regularisation of fine-tuning."""

    epochs: A[
        int, F("passes over the training videos; steps = epochs * (videos // global_clips)", resume="override")
    ] = 60
    steps: A[int, F("steps instead of epochs; 0: from epochs", resume="override")] = 0
    global_clips: A[int, F("clips a step, over all ranks", least=1)] = 64
    micro_clips: A[
        int,
        F("clips a rank takes in one forward pass; with mixup or cutmix not on resume", least=1, resume="free"),
    ] = 2
    graphs: A[Graphs, REPLAY] = "off"
    label_smoothing: A[float, F("of the cross-entropy", below=1)] = 0.0
    mixup: A[float, F("mixup's alpha (timm); 0: none")] = 0.0
    cutmix: A[float, F("cutmix's alpha (timm); 0: none. With both, each batch takes one of the two")] = 0.0
    val_every: A[
        int,
        F("epochs from one validation to the next; one follows the last step too", least=1, resume="free"),
    ] = 5


# Runs


@dataclass(frozen=True)
class RunConfig:
    """What every run has. `recipe` names the function of recipes.py that made it."""

    program: ClassVar[str] = ""  # the file that starts such a run

    recipe: A[str, "the starting point; see the list above"] = ""
    output_dir: A[str, F("what the run writes; empty: runs/RECIPE, runs/RECIPE-2, ...", resume="free")] = ""


@dataclass(frozen=True)
class TrainingConfig(RunConfig):
    """What every training has; the sections are of narrower types in each kind of training."""

    model: NetworkConfig = field(default_factory=NetworkConfig)
    data: SamplingConfig = field(default_factory=SamplingConfig)
    optim: AdamWConfig = field(default_factory=AdamWConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    log: LogConfig = field(default_factory=LogConfig)
    init_from: A[
        str,
        F("weights to start from: a run's folder, saved weights, or an official file; empty: none", resume="free"),
    ] = ""
    resume: A[
        str,
        F("never | auto (the newest checkpoint of output_dir, if any) | a checkpoint's folder", resume="free"),
    ] = "never"
    dry_run: A[bool, F("print the resolved config, parameters and steps, and stop", resume="free")] = False


@dataclass(frozen=True)
class OnlineProbeConfig:
    """How good the features are while they are pretrained; the training itself stays the same to the last bit."""

    every: A[int, F("steps from one probe to the next, and one after the last; 0: none", resume="free")] = 0
    train: A[str, F("some hundred labelled videos, sampled as data.videos; see docs/evaluation.md", resume="free")] = ""
    val: A[str, F("labelled shards that probe_top1 is measured on", resume="free")] = ""


@dataclass(frozen=True)
class UnlabelledConfig(TrainingConfig):
    """A training on clips, images, or both, without labels: of BEVT, or of a tokenizer (tokenizing.py)."""

    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: StreamsTrainConfig = field(default_factory=StreamsTrainConfig)


@dataclass(frozen=True)
class Config(TargetsConfig, UnlabelledConfig):
    """A pretraining run."""

    program: ClassVar[str] = "bevt_ds/pretrain.py"

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init_head: A[
        bool,
        F("take the head of init_from; false: it starts fresh, for another vocabulary or target", resume="free"),
    ] = True
    probe: OnlineProbeConfig = field(default_factory=OnlineProbeConfig)


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """A fine-tuning run."""

    program: ClassVar[str] = "bevt_ds/finetune.py"

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)


@dataclass(frozen=True)
class InferenceConfig(RunConfig):
    """What every measurement of trained weights has. What is not given is the choice of the run that they are from."""

    weights: A[str, "trained weights: a run's folder, saved weights, or an official file"] = ""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    precision: A[Precision, "compute type of the network; probabilities are averaged, and probes fitted, in fp32"] = (
        "bf16"
    )
    kernels: A[Kernels, "provider of windowed attention"] = "auto"


@dataclass(frozen=True)
class EvaluateConfig(InferenceConfig):
    """A test of a fine-tuned classifier. The recipe stands in for the run of weights that lie in no run's folder."""

    program: ClassVar[str] = "bevt_ds/evaluate.py"

    output_dir: A[str, "what is written; empty: eval-1, eval-2, ... in the run's folder, or else in runs/"] = ""


@dataclass(frozen=True)
class ProbeConfig:
    """The small classifier on frozen features. Its training is V-JEPA's (facebookresearch/jepa, configs/evals)."""

    kind: A[
        Literal["attentive", "linear", "knn"],
        "attentive: a query attends to all tokens; linear: on their mean; knn: votes of the nearest training videos",
    ] = "attentive"
    epochs: A[int, F("passes over the training features; not for knn", least=1)] = 20
    least_steps: A[int, F("steps that are made at least, in more epochs if the set is small; not for knn")] = 500
    batch: A[int, F("videos a step, over all ranks; not for knn", least=1)] = 64
    lr: A[float, F("AdamW's learning rate, cosine to 0; not for knn", above=0)] = 1e-3
    weight_decay: A[float, F("AdamW's decoupled decay; not for knn")] = 0.01
    seed: A[int, F("seed of the probe's initialisation and of the order of its batches")] = 0
    k: A[int, F("knn: neighbours that vote", least=1)] = 20
    temperature: A[float, F("knn: a vote weighs exp(cosine / temperature)", above=0)] = 0.07
    cache_bytes: A[int, F("memory that a rank may use for training features", least=1)] = 32 << 30


@dataclass(frozen=True)
class ProbeRunConfig(InferenceConfig):
    """A probe of frozen features. How clips are sampled is the probed run's choice, unless given."""

    program: ClassVar[str] = "bevt_ds/probe.py"

    probe: ProbeConfig = field(default_factory=ProbeConfig)
    output_dir: A[str, "what is written; empty: probe-1, probe-2, ... in the run's folder, or else in runs/"] = ""


RunT = TypeVar("RunT", bound=RunConfig)
TrainingT = TypeVar("TrainingT", bound=TrainingConfig)
InferenceT = TypeVar("InferenceT", bound=InferenceConfig)
