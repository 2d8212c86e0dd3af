"""Benchmarks, one command each: ``python -m benchmarks.NAME --help``."""

import os

# Read by DeepSpeed when it is first imported. The engines are compared in processes on CPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
