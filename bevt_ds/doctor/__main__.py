"""`python -m bevt_ds.doctor`, for launchers: `torchrun --nproc_per_node 8 -m bevt_ds.doctor`."""

from bevt_ds.config.command_line import run
from bevt_ds.doctor.cli import main

if __name__ == "__main__":
    run(main)
