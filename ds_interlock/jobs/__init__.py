"""Whole training jobs: one loop, and a task for each of ``train_lm``, ``train_resnet`` and ``finetune``.

    deepspeed --module ds_interlock.jobs.finetune --deepspeed_config config.json --model ...

A program that a launcher has started calls the same on every rank:
``finetune.run(FinetuneArguments(deepspeed_config="config.json", model=...))`` returns the metrics.
"""

import logging

_USELESS = (
    "Setting accelerator to CPU",
    "Setting ds_accelerator to",
    "Attempting to get learning rate from scheduler before it has started",
)

# Before anything imports DeepSpeed, which logs at once.
logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(_USELESS))
