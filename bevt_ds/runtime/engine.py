"""The training engine, DeepSpeed's, and what is saved of it. Only the engine's own files (engine*.py) import deepspeed.

Loss scaling: the model returns this micro-batch's share of a loss whose denominator counts the GLOBAL batch (masked
cells, or clips), so gradients must be summed over ranks and micro-steps. DeepSpeed averages over ranks, hence the
factor `world` in `backward`; its division by the accumulation steps is switched off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from bevt_ds.batch import DTYPES, Batch
from bevt_ds.config.deepspeed import resolve
from bevt_ds.config.engines import ranks_a_node, room_problems
from bevt_ds.config.schema import TrainingConfig
from bevt_ds.config.validate import zero_stage
from bevt_ds.errors import UserError
from bevt_ds.model.containers import FROZEN
from bevt_ds.model.tensor_file import read_tensors
from bevt_ds.runtime.bucket_sums import add_up_by_bucket, fill_by_bucket
from bevt_ds.runtime.distributed import Ranks
from bevt_ds.runtime.engine_setup import make_optimizer, require_supported, splitter
from bevt_ds.runtime.engine_shards import load_shard, take_up
from bevt_ds.runtime.guard import Guard, Verdict
from bevt_ds.runtime.pieces import COUNTERS, MOMENTS, WEIGHTS, Piece, SavedPieces, Snapshot, share, take_snapshot

TAG = "state"
COUNTED = ("skipped_steps", "global_steps", "global_samples")  # what DeepSpeed's engine counts
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what changes in its dynamic loss scaler


class Engine:
    """A model under DeepSpeed, stepped by this project's schedule."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        values: dict[str, Any],
        ranks: Ranks,
        width: int,
        groups: list[dict[str, Any]],
        schedule: Callable[[int], float],
        modules: Iterable[tuple[str, nn.Module]] | None = None,
    ):
        """Wrap `model` according to the run's configuration, of any kind, and the DeepSpeed JSON `values`.

        Args:
            width: channels of the model's last stage.
            groups: the optimizer's parameter groups, see optim.py; none is empty. A parameter without `requires_grad`
                is in none: it keeps its value, to the last bit, and is saved and exported in fp32 all the same.
            schedule: the learning rate of update number n, from 0.
            modules: of a model on the meta device: all its modules by name, each of which comes with the values of its
                own parameters, on the CPU. None: the model has them. ZeRO-3 splits each before the next one comes, so
                that no rank ever holds the whole model.

        Raises:
            UserError: what `require_supported` finds, or a disk that is too small for what is offloaded.
        """
        sizes = [p.numel() for p in model.parameters()]
        local = ranks_a_node(os.environ, ranks.world)
        settings = resolve(values, config, ranks.world, max(sizes), sum(sizes), width, local)
        require_supported(config, ranks.device, settings)
        for problem in room_problems(config, settings, sum(sizes), ranks.world, local):
            raise UserError(problem)
        self.ranks, self._schedule = ranks, schedule
        self._lr_scales = [group.pop("lr_scale", 1.0) for group in groups]
        self.dtype = DTYPES[config.train.precision]
        self.last_lr = 0.0
        self._frozen: dict[str, Tensor] = {}
        places = {parameter: name for name, parameter in model.named_parameters()}
        self._begin(model.named_modules() if modules is None else modules, settings)
        made = dict(model.named_parameters())
        groups = [group | {"params": [made[places[p]] for p in group["params"]]} for group in groups]
        self.ds, *_ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(groups, config.optim, settings),
            config=settings,
            dist_init_required=False,
        )
        self.ds.checkpoint_engine.load = load_shard
        add_up_by_bucket(self.ds.optimizer)
        fill_by_bucket(self.ds.optimizer)
        self.guard = Guard(self.ds, safe_get_full_grad)

    def _begin(self, modules: Iterable[tuple[str, nn.Module]], settings: dict[str, Any]) -> None:
        """Keep what is frozen, and under ZeRO-3 split every module's parameters over the ranks. Collective.

        DeepSpeed keeps fp32 masters of what its optimizer owns alone; of the others it has the compute dtype's bits.
        """
        split = splitter(settings, self.dtype) if zero_stage(settings) == 3 else None
        for place, module in modules:
            own = {f"{place}.{name}".lstrip("."): p for name, p in module.named_parameters(recurse=False)}
            self._frozen |= {name: p.detach().cpu().clone() for name, p in own.items() if not p.requires_grad}
            if split:
                split(list(own.values()))

    @property
    def module(self) -> nn.Module:
        """The model itself."""
        return self.ds.module

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.ds.zero_optimization_stage())

    def forward(self, *inputs: Batch | Tensor | None) -> Any:
        """The model's output for one micro-batch, pixels in the compute dtype."""
        return self.ds(*(_cast(value, self.dtype) for value in inputs))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of this micro-batch's share of the global loss; NaN if the loss is not finite."""
        one = 1 + 0 * loss.detach()  # or NaN: a gradient can be finite where the loss is not
        self.ds.backward(loss * self.ranks.world * one, scale_wrt_gas=False)

    def step(self, step: int) -> Verdict | None:
        """After every micro-step; the last one of step number `step` updates the weights, if loss and gradient allow.

        Returns:
            What has become of the step; None before its last micro-step.
        """
        self.last_lr = self._schedule(step)
        for group, scale in zip(self.ds.optimizer.param_groups, self._lr_scales, strict=True):
            group["lr"] = self.last_lr * scale
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()
            return None
        self.guard.before_step()
        self.ds.step()
        return self.guard.after_step()

    def grad_norm(self) -> float:
        """The gradient's global L2 norm before clipping, of the last step."""
        total = self.guard.total
        return float(self.ds.get_global_grad_norm() if total is None else total)

    @property
    def skipped_steps(self) -> int:
        """Steps since step 0 that were left out because their loss or gradient was not finite."""
        return int(self.ds.skipped_steps)

    def count_skipped(self) -> None:
        """Count the last step as left out; DeepSpeed itself does so where it decides."""
        if self.guard.on_device:
            self.ds.skipped_steps += 1

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients, inside the block."""
        self.ds.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.ds.train()

    def weights(self) -> dict[str, Tensor]:
        """The fp32 master weights by name, on the CPU; complete on rank 0, empty elsewhere. Collective."""
        result = {}
        for name, parameter in self.module.named_parameters():
            full = self._frozen[name] if name in self._frozen else self._full(parameter)
            if self.ranks.is_main:
                result[name] = full.float().cpu().clone()
        if self.ranks.is_main:
            result |= {name: buffer.cpu().clone() for name, buffer in self.module.named_buffers()}
        return result

    def shown_weights(self) -> dict[str, Tensor]:
        """The weights by name as the network computes with them, in its precision, on the CPU; as `weights`."""
        if self.stage == 3:
            return {n: w.to(self.dtype) if w.is_floating_point() else w for n, w in self.weights().items()}
        shown = self.module.state_dict() if self.ranks.is_main else {}
        return {name: value.detach().to("cpu", copy=True) for name, value in shown.items()}

    def masters(self) -> list[Tensor]:
        """This rank's part of the fp32 master weights, which each step changes in place."""
        if self.stage == 3:
            return [part.data for part in self.ds.optimizer.fp32_partitioned_groups_flat]
        return [part.data for group in self.ds.optimizer.param_groups for part in group["params"]]

    @contextmanager
    def holding(self, masters: list[Tensor]) -> Iterator[None]:
        """Other master weights, and the model made from them, inside the block. Collective."""
        ours = [part.clone() for part in self.masters()]
        try:
            self._take(masters)
            yield
        finally:
            self._take(ours)

    def _take(self, masters: Sequence[Tensor]) -> None:
        """Put other numbers in the place of the masters, and make the model from them. Collective."""
        for own, other in zip(self.masters(), masters, strict=True):
            own.copy_(other)
        self._show_masters()

    def _show_masters(self) -> None:
        """Make the model's parameters, in the compute type, from the masters, as the end of a step does. Collective."""
        optimizer = self.ds.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer.checkpoint_event_prologue()  # splits what lies whole on every rank between steps
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()

    def _full(self, parameter: nn.Parameter) -> Tensor:
        """One whole fp32 master weight. Collective."""
        full = safe_get_full_fp32_param(parameter)
        return parameter.detach() if full is None else full  # without ZeRO, in fp32, a parameter is its own master

    def _pieces(self) -> list[Piece]:
        """Which elements of which parameters this rank's masters and moments are."""
        optimizer, trained = self.ds.optimizer, [(n, p) for n, p in self.module.named_parameters() if p.requires_grad]
        if self.stage == 0:
            flats = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
            return [Piece(name, 0, p.numel(), flats[id(p)], 0) for name, p in trained]
        if self.stage == 3:
            return [piece for name, p in trained if (piece := self._split_piece(name, p)).size > 0]
        mapped = [(name, p._hp_mapping) for name, p in trained if p._hp_mapping is not None]
        places = [(name, m.lp_fragment_address, m.hp_fragment_address, m.param_group_index) for name, m in mapped]
        return [Piece(name, ours.start, ours.numel, flat, kept.start) for name, ours, kept, flat in places]

    def _split_piece(self, name: str, parameter: nn.Parameter) -> Piece:
        """A parameter's part on this rank under ZeRO-3, which pads the last rank's; its size may be 0 or less."""
        optimizer = self.ds.optimizer
        flat, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = size * self.ranks.rank
        return Piece(name, start, min(size, parameter.ds_numel - start), flat, offset)

    def _kinds(self) -> dict[str, list[Tensor]]:
        """The masters and both moments of this rank, which each step changes in place. The moments are made first."""
        optimizer, keys = self.ds.optimizer, self._state_keys()
        for key in keys:
            if not optimizer.state[key]:
                step = 0 if self.ds.zero_cpu_offload() else torch.zeros((), device=key.device)
                optimizer.state[key].update({"step": step} | {name: torch.zeros_like(key.data) for name in MOMENTS})
        moments = {name: [optimizer.state[key][name] for key in keys] for name in MOMENTS}
        return {WEIGHTS: self.masters()} | moments

    def _state_keys(self) -> list[Tensor]:
        """What the optimizer's state is filed under, in the order of `masters`."""
        if self.stage == 3:
            return list(self.ds.optimizer.fp32_partitioned_groups_flat)
        return [part for group in self.ds.optimizer.param_groups for part in group["params"]]

    def is_finite(self, **more: list[Tensor]) -> bool:
        """Whether all weights, buffers and moments are finite numbers, on every rank. Collective.

        more: further tensors like `masters`. What DeepSpeed pads its buffers with is left out: it is whatever was in
        the memory.
        """
        pieces = self._pieces()
        tensors = [piece.of(flats) for flats in (self._kinds() | more).values() for piece in pieces]
        finite = [
            torch.isfinite(t.detach()).all() for t in [*tensors, *self.module.parameters(), *self.module.buffers()]
        ]
        return self.ranks.all_hold(bool(torch.stack([f.to(self.ranks.device) for f in finite]).all()))

    def optimizer_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds."""
        states = self.ds.optimizer.state.values()
        return sum(t.numel() * t.element_size() for s in states for t in s.values() if isinstance(t, Tensor))

    def snapshot(self, **more: list[Tensor]) -> Snapshot:
        """A copy of all that training changes, this rank's share, on the CPU.

        more: further tensors like `masters`, by what they are.
        """
        kinds, pieces = self._kinds() | more, self._pieces()
        if self.stage == 0:
            pieces = share(pieces, self.ranks.rank, self.ranks.world)
        buffers = {name: buffer.to("cpu", copy=True) for name, buffer in self.module.named_buffers()}
        return take_snapshot(pieces, kinds, buffers | self._frozen, self._counters())

    def _counters(self) -> dict[str, Any]:
        """The numbers of the optimizer and of the loss's scale, and the shapes of the parameters."""
        updates = max((int(state["step"]) for state in self.ds.optimizer.state.values()), default=0)
        scaler = getattr(self.ds.optimizer, "loss_scaler", None)
        scale = {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)}
        trained = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        shapes = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in trained}
        counted = {name: getattr(self.ds, name) for name in COUNTED}
        return {"updates": updates, "loss_scale": scale, "shapes": shapes} | counted

    def load(self, folder: Path, **more: list[Tensor]) -> None:
        """Go on from a checkpoint's `snapshot`s, of any number of ranks, ZeRO stage and precision. Collective.

        Raises:
            UserError: nothing to load, or it is of another model.
        """
        if not (folder / TAG / COUNTERS).is_file():
            return self._load_shards(folder)
        with SavedPieces(folder / TAG) as saved:
            saved.load(self._pieces(), self._kinds() | more)
            self._show_masters()
            self._take_whole(saved.whole())
            self._take_counters(saved.counters)

    def _take_counters(self, counters: dict[str, Any]) -> None:
        """Set the numbers of the optimizer and of the loss's scale; the latter where both runs scale it."""
        for own in self.ds.optimizer.state.values():
            step = own["step"]
            own["step"] = torch.full_like(step, counters["updates"]) if torch.is_tensor(step) else counters["updates"]
        for name in COUNTED:
            setattr(self.ds, name, counters[name])
        scaler = getattr(self.ds.optimizer, "loss_scaler", None)
        if self.dtype is torch.float16 and SCALER[0] in counters["loss_scale"]:
            for name, value in counters["loss_scale"].items():
                setattr(scaler, name, value)

    def _take_whole(self, whole: dict[str, Tensor]) -> None:
        """Set frozen parameters and buffers. Collective."""
        self._frozen = {name: whole[name] for name in self._frozen}
        places = dict(chain(self.module.named_parameters(), self.module.named_buffers()))
        for name, value in whole.items():
            if self.stage == 3 and name in self._frozen:
                with deepspeed.zero.GatheredParameters([places[name]], modifier_rank=0):
                    places[name].data.copy_(value)
            else:
                places[name].data.copy_(value)

    def _load_shards(self, folder: Path) -> None:
        """Read DeepSpeed's own shards, which earlier versions wrote; of the same ranks, stage and precision.

        Raises:
            UserError: nothing to load, or a version wrote it that trained the parameters which are frozen here.
        """
        if self._frozen:
            if not (folder / TAG / FROZEN).is_file():
                raise UserError(
                    f"{folder} was written by an older version, whose optimizer also changed the parts of the stream"
                    " that is not trained: begin a new run from its weights with init_from and another output_dir."
                )
            self._frozen = read_tensors(folder / TAG / FROZEN)
        take_up(self.ds, folder, TAG, self.ranks)


def _cast(value: Batch | Tensor | None, dtype: torch.dtype) -> Batch | Tensor | None:
    if isinstance(value, Batch):
        return value.cast(dtype)
    return value.to(dtype) if value is not None and value.is_floating_point() else value
