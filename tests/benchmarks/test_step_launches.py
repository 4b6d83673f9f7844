"""What the host starts in a whole step of `tiny`: bounds for pretraining and fine-tuning, with graphs and without."""

from benchmarks.step_launches import finetuning, pretraining, table

SHAPE = "tiny", 2, 64


def test_launches_of_a_pretraining_step():
    """136 parameters in some ten buckets. Graphs: of both streams, forward and backward, and of the tokenizer."""
    off, on = (pretraining(*SHAPE, with_graphs=graphs) for graphs in (False, True))
    assert off.names["window_attention_fwd_small_kernel"] == off.names["prepare_kernel"] == 16, "a block and stream"
    assert off.found["gradients into buckets"] <= 12, "DeepSpeed copies each of 136"
    assert off.found["update"] <= 33
    assert off.found.total() <= 1062, off.found
    assert on.names["replayed graph"] == 5
    assert on.names["window_attention_fwd_small_kernel"] == 0
    assert on.found["backward pass"] <= 85, "without graphs the sums of both streams' gradients alone are 119"
    assert on.found.total() <= 295, on.found
    assert off.found["other"] == on.found["other"] == 0, "each has a part"
    last = table({"off": off, "on": on}).splitlines()[-1]
    assert last == f"| **in all** | **{off.found.total()}** | **{on.found.total()}** |"


def test_launches_of_a_fine_tuning_step_with_graphs():
    """15 groups by layer, of each an AdamW; what one stream's replay leaves is copied at once."""
    on = finetuning(*SHAPE, with_graphs=True)
    assert (on.names["replayed graph"], on.names["_fused_adamw_"]) == (2, 15)
    assert on.found.total() <= 245, on.found
