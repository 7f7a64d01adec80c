"""Benchmarks of fastopt beside torch.optim and DeepSpeed: `python -m bench.run --quick` from the repository's root."""
