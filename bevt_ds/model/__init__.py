"""The network and its tokenizers. Of this package they import kernels, batch, rng and errors, nothing else."""
