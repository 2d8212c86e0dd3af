"""Whole training jobs: one loop, and a task for each of ``train_lm``, ``train_resnet`` and ``finetune``.

    deepspeed --module ds_interlock.jobs.finetune --deepspeed_config config.json --model ...

A program that a launcher has started calls the same on every rank:
``finetune.run(FinetuneArguments(deepspeed_config="config.json", model=...))`` returns the metrics.
"""

import logging

from ds_interlock.jobs.quiet import is_of_use

# Before anything imports DeepSpeed, which logs at once.
logging.getLogger("DeepSpeed").addFilter(is_of_use)
