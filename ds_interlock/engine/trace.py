"""``"interlock": {"trace": ...}``: some batches of a training run, as a trace and a picture.

Every stage records its own actions and leaves them in the job's store; a thread of rank 0 collects them
and writes the files. No stage waits for that, and stages go on streaming.
"""

import json
import threading
from collections.abc import Sequence
from datetime import timedelta

from deepspeed.utils import logger

from ds_interlock.config.monitoring import TraceConfig
from ds_interlock.engine.ranks import StageRanks
from ds_interlock.engine.reports import job_store
from ds_interlock.engine.timeline import Recorder, Rows, from_zero, measured_and_simulated, title_of
from ds_interlock.files import replace_text
from ds_interlock.schedule.action import Action
from ds_interlock.schedule.lower import Program
from ds_interlock.schedule.render import render_svg
from ds_interlock.schedule.simulate import Span
from ds_interlock.schedule.trace import chrome_trace

_RECORDING = "interlock.trace"


class Tracer:
    """Records the batches that ``interlock.trace`` names. Every rank of the job must make one.

    Args:
        config: Which batches, and where to write.
        recorder: Notes the actions of this stage.
        ranks: This rank; rank 0 writes the files.
        timeout_seconds: How long rank 0 waits for the other stages.
    """

    def __init__(
        self, config: TraceConfig, recorder: Recorder, ranks: StageRanks, timeout_seconds: float
    ) -> None:
        self._config = config
        self._recorder = recorder
        self._ranks = ranks
        self._timeout = timedelta(seconds=timeout_seconds)
        self._store = job_store()
        self._thread: threading.Thread | None = None

    def batch_begins(self, batch: int) -> None:
        """To be called before every training batch, counted from 1."""
        if batch == self._config.batches[0]:
            self._recorder.start(_RECORDING)

    def batch_is_done(self, batch: int, program: Program, *, streaming: bool) -> None:
        """To be called after every training batch: collects the recording after the last one."""
        if batch != self._config.batches[1]:
            return
        spans = self._recorder.stop(_RECORDING)
        self._thread = threading.Thread(
            target=self._finish, args=(spans, program, streaming), name=_RECORDING, daemon=True
        )
        self._thread.start()

    def flush(self) -> None:
        """Waits until the recording is in the store and, on the rank that writes, in the files."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Warns if the run ended too early for the recording."""
        if self._thread is None and self._ranks.global_rank == 0:
            logger.warning(
                "interlock.trace: the run ended before batch %d, the last one to record; nothing was written",
                self._config.batches[1],
            )

    def _finish(self, spans: Sequence[Span], program: Program, streaming: bool) -> None:
        try:
            if self._ranks.speaks_for_stage:
                row = [[str(span.action), span.batch, span.start, span.end] for span in spans]
                self._store.set(str(self._ranks.stage), json.dumps(row))
            if self._ranks.global_rank == 0:
                self._write(self._collect(), program, streaming)
        except (OSError, RuntimeError, ValueError) as error:  # a picture must not end the training
            logger.warning("interlock.trace: nothing was written to %s: %s", self._config.path, error)

    def _collect(self) -> Rows:
        self._store.wait([str(stage) for stage in range(self._ranks.num_stages)], self._timeout)
        rows = [json.loads(self._store.get(str(stage))) for stage in range(self._ranks.num_stages)]
        return from_zero([[Span(Action.parse(text), *rest) for text, *rest in row] for row in rows])

    def _write(self, rows: Rows, program: Program, streaming: bool) -> None:
        timelines = measured_and_simulated(program, rows, streaming=streaming)
        title = title_of(program)
        replace_text(f"{self._config.path}.json", json.dumps(chrome_trace(timelines, title)))
        replace_text(f"{self._config.path}.svg", render_svg(timelines, title))
