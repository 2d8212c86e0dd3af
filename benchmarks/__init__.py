"""Benchmarks, one command each: ``python -m benchmarks.NAME --help``."""

import measuring  # noqa: F401  # before DeepSpeed: it chooses the CPU
