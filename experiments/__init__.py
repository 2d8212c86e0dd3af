"""Experiments on quality and time, one command each: ``python -m experiments.run --help``."""

import measuring  # noqa: F401  # before DeepSpeed: it chooses the CPU
