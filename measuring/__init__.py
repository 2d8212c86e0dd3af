"""What benchmarks and experiments measure with: sleeping layers, engines and ranks, tables and plots."""

import os

# Read by DeepSpeed when it is first imported. Engines are measured in processes on CPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
