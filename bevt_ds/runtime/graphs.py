"""The encoder's forward and backward pass as CUDA graphs: one launch in place of thousands. `train.graphs`.

A part of the network is captured once for each shape of its inputs, after some calls in the ordinary way, and replayed
from then on: inputs are copied into memory that stays, the graph runs, outputs and gradients lie in memory that stays.
Gradients of parameters leave through autograd as always, so DeepSpeed's hooks, accumulation, checkpoints and resume see
nothing new. Before a captured pass is relied on, it is compared with the ordinary one on the same inputs.

The order in which parameters' gradients appear is another one than without graphs, and ranks reduce buckets of them in
that order: all ranks take the same way, by agreement. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bevt_ds.config.graphs import Graphs as Switch
from bevt_ds.config.graphs import why_without_graphs
from bevt_ds.config.schema import Config, FinetuneConfig
from bevt_ds.errors import UserError
from bevt_ds.runtime.distributed import Ranks

WARM_UP = 2  # calls of a shape in the ordinary way before it is captured
SHAPES = 4  # that are captured; more would hold too much memory
REMEDY = "Use train.graphs=auto or off."
# Largest difference to the ordinary pass, relative to the largest value: a matrix product may take another algorithm.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
Run = Callable[[], Any]
Gradients = list[Tensor | None]
Pass = tuple[list[Tensor], Gradients]
Leave = Callable[[Gradients], None]


class Backend(Protocol):
    """What captures: torch's CUDA graphs, or a test's stand-in."""

    def warm_up(self, run: Run) -> None:
        """Run once as capturing wants it, so that libraries make their workspaces."""

    def capture(self, *runs: Run) -> list[tuple[Run, Any]]:
        """Of each, in the order in which they will be repeated: what repeats it into the same memory, and its result.

        RuntimeError where one cannot be captured.
        """


class CudaBackend:
    """torch.cuda.graph. Only the passes that are captured together share memory.

    A pass of another stream runs between a forward pass and its backward pass: in a common pool it could be given the
    memory of what the backward pass still reads.
    """

    def warm_up(self, run: Run) -> None:
        """On a stream of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, *runs: Run) -> list[tuple[Run, Any]]:
        """RuntimeError where one does what a graph cannot, such as wait for the device."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
        try:
            return [self._captured(run, pool) for run in runs]
        finally:  # a capture that failed may leave its own stream behind
            torch.cuda.set_stream(stream)

    def _captured(self, run: Run, pool: Any) -> tuple[Run, Any]:
        graph = torch.cuda.CUDAGraph()
        # The loader's threads use the device meanwhile, as they may.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


class Captured:
    """Forward and backward pass of one function at one shape."""

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        backend: Backend,
    ) -> None:
        """RuntimeError: it cannot be captured."""
        self.parameters, self.addresses = list(parameters), [p.data_ptr() for p in parameters]
        self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        self._wanted = [x for x in self.inputs if x.requires_grad] + self.parameters
        self.turn = 0
        live: list[Tensor] = []

        def forward() -> list[Tensor]:
            with torch.enable_grad():
                live[:] = function(*self.inputs)
            return [output.detach() for output in live]

        def backward() -> list[Tensor | None]:
            return list(torch.autograd.grad(live, self._wanted, self.gradients, allow_unused=True))

        self.gradients = [torch.zeros_like(output) for output in forward()]
        backward()
        backend.warm_up(lambda: (forward(), backward()))
        captured = backend.capture(forward, backward)
        (self._replay_forward, self.outputs), (self._replay_backward, self.results) = captured

    def fits(self) -> bool:
        """Whether the parameters lie where they lay."""
        return all(p.data_ptr() == there for p, there in zip(self.parameters, self.addresses, strict=True))

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, in memory that the next call overwrites."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.detach().copy_(given)
        self.turn += 1
        self._replay_forward()
        return self.outputs

    def backward(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs that want one and of the parameters, in memory that the next call overwrites."""
        for own, given in zip(self.gradients, gradients, strict=True):
            own.zero_() if given is None else own.copy_(given)
        self._replay_backward()
        return self.results

    def passes(self, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Pass:
        """Copies of what both passes give."""
        copies = [x.clone() for x in self.forward(inputs)]
        return copies, [None if x is None else x.clone() for x in self.backward(gradients)]


class _Replay(torch.autograd.Function):
    """A captured pass as a node of autograd."""

    @staticmethod
    def forward(ctx: Any, captured: Captured, leave: Leave, _link: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.captured, ctx.leave, ctx.wants = captured, leave, [x.requires_grad for x in inputs]
        ctx.set_materialize_grads(False)
        outputs = captured.forward(inputs)
        ctx.turn = captured.turn
        return tuple(x.detach() for x in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.turn != ctx.captured.turn:
            raise RuntimeError("train.graphs: the backward pass of an earlier forward pass, whose memory is taken")
        # Not detached: autograd then copies what it keeps, because the tensor has another owner.
        found = iter(ctx.captured.backward(gradients))
        of_inputs = [next(found) if wants else None for wants in ctx.wants]
        ctx.leave(list(found))
        return None, None, None, *of_inputs


class _Sum(torch.autograd.Function):
    """Leads autograd from the replays of a forward pass to the parameters that they share.

    The gradient of each is the sum of what the replays have `left`, all in a few multi-tensor kernels: left to autograd
    it is a kernel or two for every parameter.
    """

    @staticmethod
    def forward(ctx: Any, left: dict[str, Gradients], *parameters: Tensor) -> Tensor:
        ctx.left, ctx.count = left, len(parameters)
        ctx.set_materialize_grads(False)
        return parameters[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _link: None) -> tuple[Tensor | None, ...]:
        passes = list(ctx.left.values())
        ctx.left.clear()
        return None, *(summed(passes) if passes else [None] * ctx.count)


def summed(passes: Sequence[Gradients]) -> Gradients:
    """Of each place the sum, in memory of its own; None where no pass has anything."""
    total: Gradients = [None] * len(passes[0])
    for gradients in passes:
        new = [i for i, x in enumerate(gradients) if x is not None and total[i] is None]
        more = [i for i, x in enumerate(gradients) if x is not None and total[i] is not None]
        if more:
            torch._foreach_add_([total[i] for i in more], [gradients[i] for i in more])
        for i in new:
            total[i] = torch.empty_like(gradients[i])
        if new:
            torch._foreach_copy_([total[i] for i in new], [gradients[i] for i in new])
    return total


class Link:
    """What the replays of one forward pass share, by name: a tensor, and what they leave there in the backward pass."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self._left, self._taken = parameters, {}, set()
        self.tensor = _Sum.apply(self._left, *parameters)

    def take(self, name: str) -> Leave:
        """What takes the gradients of a replay."""
        self._taken.add(name)
        return partial(self._left.__setitem__, name)

    def serves(self, name: str, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether a replay of this name can belong to the same forward pass, as far as can be seen."""
        return name not in self._taken and self.parameters is parameters


class Graphs:
    """All that is captured of a network."""

    def __init__(self, switch: Switch, backend: Backend, agree: Callable[[bool], bool], say: Callable[[str], None]):
        """Args:
        switch: auto goes back to the ordinary way where capturing fails or gives other numbers; on: an error.
        agree: whether all ranks hold something. Collective.
        say: prints a line.
        """
        self._switch, self._backend, self._agree, self._say = switch, backend, agree, say
        self._captured: dict[tuple, Captured] = {}
        self._calls: dict[tuple, int] = {}
        self._parameters: dict[nn.Module, list[nn.Parameter]] = {}
        self._link: Link | None = None
        self._off = False

    def __call__(
        self, name: str, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], module: nn.Module
    ) -> Sequence[Tensor]:
        """function(*inputs), whose parameters are those of `module`; its gradients included. Collective.

        Raises:
            UserError: train.graphs=on, and it cannot be captured, or gives other numbers.
        """
        key = (name, *((tuple(x.shape), x.dtype, x.requires_grad) for x in inputs))
        if module not in self._parameters:
            self._parameters[module] = [p for p in module.parameters() if p.requires_grad]
        captured, parameters = self._captured.get(key), self._parameters[module]
        if captured is None or not captured.fits():
            captured = None if self._off else self._prepare(key, function, inputs, parameters)
        if captured is None:
            return function(*inputs)
        if self._link is None or not self._link.serves(name, parameters):
            self._link = Link(parameters)
        return _Replay.apply(captured, self._link.take(name), self._link.tensor, *inputs)

    def _prepare(
        self,
        key: tuple,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
    ) -> Any:
        """Capture once a shape has come often enough; None: not yet, or not at all."""
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= WARM_UP or (key not in self._captured and len(self._captured) == SHAPES):
            return None
        try:
            captured = Captured(function, inputs, parameters, self._backend)
            problem = difference(captured, function, inputs)
        except RuntimeError as error:
            problem = f"it cannot be captured ({str(error).splitlines()[0]})"
        if self._agree(problem is None):
            self._captured[key] = captured
            return captured
        self._off = True
        self._captured.clear()
        line = f"train.graphs={self._switch}: {key[0]} is not replayed, {problem or 'another rank cannot'}"
        if self._switch == "on":
            raise UserError(f"{line}. {REMEDY}")
        self._say(f"{line}: the run goes on without graphs.")
        return None


def make_graphs(config: Config | FinetuneConfig, stage: int, ranks: Ranks) -> Graphs | None:
    """CUDA graphs of a run's encoder, if the run has them; says so where it was to choose. stage: ZeRO's.

    Raises:
        UserError: train.graphs=on, and the run cannot have them.
    """
    switch = config.train.graphs
    reason = why_without_graphs(switch, config.model, stage, ranks.device.type, ranks.world)
    if reason and switch == "on":
        raise UserError(f"train.graphs=on: {reason}. {REMEDY}")
    say = partial(print, flush=True) if ranks.is_main else lambda line: None
    if switch != "off" and ranks.device.type == "cuda":
        say(f"graphs: {'off, ' + reason if reason else 'the encoder, after a comparison'} (train.graphs={switch})")
    return None if reason else Graphs(switch, CudaBackend(), ranks.all_hold, say)


def difference(captured: Captured, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> str | None:
    """How a replay differs from the ordinary pass on the same inputs; None: in nothing but rounding."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    with torch.enable_grad():
        outputs = list(function(*leaves))
    # Neither all alike nor random: a number for each place, which no generator has to be asked for.
    gradients = [torch.sin(torch.arange(x.numel(), device=x.device)).view_as(x).to(x.dtype) for x in outputs]
    wanted = [x for x in leaves if x.requires_grad] + captured.parameters
    expected = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
    found, found_gradients = captured.passes([x.detach() for x in inputs], gradients)
    pairs = [*zip(outputs, found, strict=True), *zip(expected, found_gradients, strict=True)]
    worst = [_apart(a, b) for a, b in pairs if a is not None or b is not None]
    if not worst or bool(torch.stack(worst).max() <= 1):  # a comparison with NaN is false
        return None
    return f"its numbers are not those of the ordinary pass ({sum(bool(w > 1) for w in worst)} of {len(worst)} tensors)"


def _apart(ordinary: Tensor | None, replayed: Tensor | None) -> Tensor:
    """The largest difference, 1 where it is just allowed."""
    if ordinary is None or replayed is None:
        return torch.full((), float("inf"), device=(replayed if ordinary is None else ordinary).device)
    scale = ordinary.detach().float().abs().max() * TOLERANCE[ordinary.dtype]
    return (ordinary.detach().float() - replayed.float()).abs().max() / scale.clamp(min=1e-30)
