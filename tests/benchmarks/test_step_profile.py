"""The profile of a step: parts, operators and files on a CPU, and what is of the device from made-up kernels."""

import gzip
import json
from types import SimpleNamespace

import torch

from benchmarks.step_batch import resident_batch
from benchmarks.step_parts import PARTS, covered
from benchmarks.step_profile import DEVICE, NOT_MEASURED, _device, write_profile
from bevt_ds import BEVT
from bevt_ds.model.tokenizers import RandomProjectionTokenizer, tokenize

SIZES = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window": (2, 2, 2), "vocab_size": 16}


def test_profile_on_a_cpu_has_the_host_and_says_what_is_not_measured(tmp_path):
    model = BEVT(**SIZES)
    batch = tokenize(RandomProjectionTokenizer(16), resident_batch(1, 1, 2, 64))
    result = write_profile(lambda: model(batch).loss.backward(), model, "cpu", tmp_path)
    assert json.loads((tmp_path / "profile.json").read_text()) == result
    assert list(result["host_ms"]) == list(PARTS)
    assert all(result["host_ms"][name] > 0 for name in ("attention", "linears", "stems", "head and loss"))
    assert result["operators"] > 100
    assert {result[name] for name in DEVICE} == {NOT_MEASURED}
    assert "function calls" in (tmp_path / "host.txt").read_text()
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert any("aten::addmm" in str(event.get("name")) for event in trace["traceEvents"])


def test_idle_share_counts_overlapping_kernels_once():
    """Two kernels side by side keep the device as busy as one; a range of the profiler is no work."""
    assert covered([(0, 10), (5, 15), (20, 30), (21, 22)]) == 25
    kinds = torch.autograd.DeviceType

    def kernel(name, start, end):
        return SimpleNamespace(name=name, device_type=kinds.CUDA, time_range=SimpleNamespace(start=start, end=end))

    work = [kernel("gemm", 0, 4000), kernel("copy", 2000, 6000), kernel("part: linears", 0, 9000)]
    launched = [SimpleNamespace(name="gemm", duration=4000.0), SimpleNamespace(name="Memcpy HtoD", duration=4000.0)]
    span = SimpleNamespace(start=0, end=1)
    mark = SimpleNamespace(name="part: linears", kernels=[], cpu_parent=None, sequence_nr=-1, time_range=span)
    op = SimpleNamespace(name="aten::mm", kernels=launched, cpu_parent=mark, sequence_nr=-1, time_range=span)
    calls = [
        SimpleNamespace(name=name, kernels=[], cpu_parent=op, sequence_nr=-1, time_range=span)
        for name in ("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch", "cudaMemcpyAsync")
    ]
    found = _device(SimpleNamespace(events=lambda: work), [mark, op, *calls], step_ms=8.0)
    assert found["device_busy_ms"] == 6.0
    assert found["idle_share"] == 0.25
    assert (found["launches"], found["launch_calls"]) == (1, 3)
    assert found["device_ms"]["linears"] == 8.0
