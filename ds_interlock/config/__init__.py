"""The configuration: the ``"interlock"`` section of a DeepSpeed config, and the keys around it."""

from ds_interlock.config.deepspeed import REFUSALS, Refusal, check_deepspeed, check_filled_in, read_deepspeed
from ds_interlock.config.section import HeadConfig, InterlockConfig

__all__ = [
    "REFUSALS",
    "HeadConfig",
    "InterlockConfig",
    "Refusal",
    "check_deepspeed",
    "check_filled_in",
    "read_deepspeed",
]
