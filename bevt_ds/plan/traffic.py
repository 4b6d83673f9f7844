"""Bytes that collectives move in one update.

Letters: n ranks, S bytes of a collective's whole tensor, P parameters, m micro-steps an update, g and p bytes of a
gradient and of a parameter on the wire.

A rank sends (n-1)/n S in a ring's reduce-scatter or all-gather, and twice that in an all-reduce, which is one after
the other. In a ring's reduce or broadcast n-1 of n ranks send S, so that a rank's mean is (n-1)/n S as well. NCCL and
gloo may choose other algorithms; none sends less for large tensors, save where a switch adds them up.

ZeRO (Rajbhandari et al. 2020, section 7) needs per update, each term times (n-1)/n:
stage 1: P g (reduce-scatter, once an update) + P p (all-gather of updated parameters);
stage 2: P g at every micro-step, because only its part of the sum is kept, + P p;
stage 3: at every micro-step 2 P p (parameters for the forward and for the backward pass) + P g.

DeepSpeed 0.19.8 all-reduces gradients in stages 1 and 2, and in stage 3 gathers parameters once a micro-step where all
of them stay within stage3_max_reuse_distance; `benchmarks.scaling` counts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .memory import LIVE


def sent_bytes(payload: Mapping[str, float], ranks: int) -> dict[str, float]:
    """Bytes that a rank sends, by collective, if each is a ring."""
    once = (ranks - 1) / ranks
    return {kind: size * once * (2 if kind == "all_reduce" else 1) for kind, size in payload.items()}


def expected_bytes(stage: int, parameters: int, ranks: int, micro_steps: int, width: int) -> float:
    """Bytes that a rank sends in one update according to ZeRO's paper; `width` is g = p.

    Raises KeyError for a stage other than 1, 2, 3.
    """
    copies = {1: 2, 2: micro_steps + 1, 3: 3 * micro_steps}[stage]
    return copies * parameters * width * (ranks - 1) / ranks


def payload(parameters: int, micro_steps: int, width: int, zero: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of the tensors that DeepSpeed gives to each kind of collective in one update.

    `zero`: the section zero_optimization of its JSON. Quantised weights travel in 8 bits (qwZ) and gradients in 4, in
    two hops (qgZ); Wang et al. 2023, "ZeRO++".
    """
    whole, stage = parameters * width, zero.get("stage", 0)
    if stage == 0:
        return {"all_reduce": whole}
    if stage < 3:
        return {"all_reduce": whole * (micro_steps if stage == 2 else 1), "all_gather": whole}
    passes = 1 if parameters <= zero.get("stage3_max_reuse_distance", LIVE) else 2
    weights = passes * micro_steps * (parameters if zero.get("zero_quantized_weights") else whole)
    if zero.get("zero_quantized_gradients"):
        return {"all_gather": weights, "all_to_all": micro_steps * parameters}
    return {"all_gather": weights, "reduce_scatter": micro_steps * whole}


def sent(parameters: int, ranks: int, micro_steps: int, width: int, zero: Mapping[str, Any]) -> dict[str, float]:
    """Bytes that a rank sends in one update, by collective."""
    return sent_bytes(payload(parameters, micro_steps, width, zero), ranks) if ranks > 1 else {}
