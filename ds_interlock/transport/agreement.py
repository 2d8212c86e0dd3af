"""What ranks must agree on before one waits for another: the configuration, and whether it is usable."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from ds_interlock.errors import ConfigError, list_faults
from ds_interlock.transport.start import control_group

Value = TypeVar("Value")


def gather(value: Value) -> list[Value]:
    """The values of all ranks; this one's alone outside a job. All ranks must call it."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def barrier() -> None:
    """Waits until all ranks have called it."""
    dist.barrier(group=control_group())


def agree(about: Mapping[str, Any], *, may_differ: Container[str] = ()) -> None:
    """Compares ``about`` (names and nested values) between all ranks; ConfigError on all if it differs.

    Paths in ``may_differ``, as ``"config.interlock.trace.path"``, are left out.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gathered = gather({name: value for name, value in _flat(about) if name not in may_differ})
    first = gathered[0]
    faults = [
        f"{name} is {first.get(name, 'missing')} on rank 0, {other.get(name, 'missing')} on rank {rank}"
        for rank, other in enumerate(gathered)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if faults:
        raise ConfigError(
            list_faults("the ranks of this job have different configurations", faults)
            + "\nStart every rank with the same JSON file and the same arguments."
        )


@contextmanager
def raised_by_all() -> Iterator[None]:
    """A ConfigError of one rank within it is raised by all: no rank waits for one that has left."""
    error: ConfigError | None = None
    try:
        yield
    except ConfigError as raised:
        error = raised
    for message in filter(None, gather(None if error is None else str(error))):
        raise ConfigError(message) from error


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, repr(value)
