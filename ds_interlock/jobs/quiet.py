"""Keeps out of a job's output what libraries write there and what says nothing to its user."""

import io
import logging
from contextlib import redirect_stdout

_USELESS = (
    "Setting accelerator to CPU",
    "Setting ds_accelerator to",
    "Attempting to get learning rate from scheduler before it has started",
)


def is_of_use(record: logging.LogRecord) -> bool:
    """A filter of DeepSpeed's logger."""
    return not record.getMessage().startswith(_USELESS)


def quiet() -> redirect_stdout[io.StringIO]:
    """Within it nothing is printed: DeepSpeed's pipeline module prints its topology and all its layers."""
    return redirect_stdout(io.StringIO())
