"""Runs a function on every rank of a gloo job, in processes that end with it.

Gloo's groups poll their connections for as long as their process lives, and DeepSpeed makes a dozen for
every engine: what is timed gets processes of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ds_interlock.transport.local_ranks import run_local_ranks


def run_ranks(work: Callable[..., Any], num_ranks: int, **arguments: Any) -> list[Any]:
    """Calls ``work(**arguments)`` on ``num_ranks`` ranks after process-group initialisation.

    ``work`` is at the top of a module, ``arguments`` can be pickled. Returns the results by rank.

    Raises:
        RankError: If it failed on a rank; with that rank's traceback and the end of its log.
    """
    joined = partial(_join_and_work, work, arguments)
    return run_local_ranks(joined, num_ranks, preload=["torch.distributed.pipelining"])


def _join_and_work(work: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    import ds_interlock

    ds_interlock.init_distributed(dist_backend="gloo")
    return work(**arguments)
