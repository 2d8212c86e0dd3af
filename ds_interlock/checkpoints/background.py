"""Files of a checkpoint that are written while training goes on.

    each rank    state ──torch.save──► host's memory ──► save_checkpoint returns
                                       └─ thread: files ──► "done" in the job's store
    one of them                           thread: waits for all, then renames the folder

What is written is what ``torch.save`` had put into memory, so later steps do not change it.
"""

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ds_interlock.errors import ConfigError

_LOOK_SECONDS = 0.05


class BackgroundWriter:
    """Writes one checkpoint after another, each in a thread. ``finish`` before the process ends.

    Args:
        store: The job's key-value store. All ranks must make their writer at the same point.
        num_ranks: How many ranks write.
        limit_seconds: How long the rank that completes a checkpoint waits for the others.
    """

    def __init__(self, store: Any, num_ranks: int, limit_seconds: float) -> None:
        self._store, self._num_ranks, self._limit_seconds = store, num_ranks, limit_seconds
        self._files: list[tuple[Path, io.BytesIO]] = []
        self._number = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def discard(self) -> None:
        """Forgets what was saved by a checkpoint that failed before ``start``."""
        self._files = []

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Copies ``state_dict`` to the host's memory, to be written to ``path``."""
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        self._files.append((Path(path), buffer))

    def start(self, complete: Callable[[], None] | None) -> None:
        """Begins to write what was saved; ``complete`` is called once all ranks have, where it is given."""
        files, self._files = self._files, []
        self._number += 1
        self._thread = threading.Thread(
            target=self._work,
            args=(files, complete, f"checkpoint/{self._number}"),
            name="interlock checkpoint",
            daemon=True,  # a rank that fails waits for nobody
        )
        self._thread.start()

    def finish(self) -> None:
        """Waits until the checkpoint is complete, as far as this rank has to do with it.

        Raises:
            ConfigError: If a file of this rank or another one cannot be written, or not in time.
        """
        thread, self._thread = self._thread, None
        if thread:
            thread.join()
        error, self._error = self._error, None
        if error:
            raise error

    def _work(
        self, files: list[tuple[Path, io.BytesIO]], complete: Callable[[], None] | None, key: str
    ) -> None:
        try:
            for path, buffer in files:
                _write(path, buffer)
            self._store.add(key, 1)
            if complete:
                self._wait_for_all(key)
                complete()
        except Exception as error:  # noqa: BLE001 - raised by ``finish``
            reason = str(error).partition("\n")[0]
            self._error = error
            if isinstance(error, OSError):
                self._error = ConfigError(f"the checkpoint cannot be written ({reason}): make room for it")
            self._store.set(f"{key}/error", reason)

    def _wait_for_all(self, key: str) -> None:
        deadline = time.monotonic() + self._limit_seconds
        while self._store.add(key, 0) < self._num_ranks:
            if self._store.check([f"{key}/error"]):
                reason = self._store.get(f"{key}/error").decode()
                raise ConfigError(f"another rank could not write its part of the checkpoint ({reason})")
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"not all ranks have written their files after {self._limit_seconds:g} s "
                    "(interlock.checkpoint_timeout_seconds)"
                )
            time.sleep(_LOOK_SECONDS)


def _write(path: Path, buffer: io.BytesIO) -> None:
    path.write_bytes(buffer.getbuffer())
