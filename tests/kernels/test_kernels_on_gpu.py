"""What only a GPU can tell: every shipped configuration, once for its values and a thousand times for its bits."""

from dataclasses import replace

import pytest

from benchmarks import kernels, kernels_cases, kernels_providers

CASES = [replace(case, batch=2) for case in kernels_cases.soak_cases()]


@pytest.mark.gpu
def test_every_shipped_configuration_is_as_exact_as_pytorch(dtype):
    for case in CASES:
        kernels_providers.check_correct(case, "cuda", dtype, "triton")


@pytest.mark.gpu
def test_every_shipped_configuration_gives_equal_bits_in_a_thousand_launches():
    kernels.soak("cuda", 1000, CASES)
