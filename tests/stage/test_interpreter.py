"""What an interpreter asks of its messenger and its work, and programs that cannot be run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_interlock import GradientFlowPlan, InProcessPipeline, ScheduleError
from ds_interlock.schedule.action import Action, Kind
from ds_interlock.schedule.program import evaluation_program, training_program
from ds_interlock.stage.in_process import run_program
from ds_interlock.stage.interpreter import Interpreter, steps

PLAN = GradientFlowPlan.n_wise(3, 2)
WIDTH, NUM_CLASSES = 4, 3


class Notebook:
    """A messenger that notes its calls, and always has a message."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def post(self, receive: Action, batch: int) -> None:
        self.calls.append(f"post {receive} {batch}")

    def take(self, receive: Action) -> tuple[Any, ...]:
        self.calls.append(f"take {receive}")
        hidden = torch.ones(2, WIDTH)
        return (
            (hidden, torch.zeros(2, dtype=torch.int64)) if receive.kind is Kind.RECV_FORWARD else ((hidden,),)
        )

    def send(self, send: Action, batch: int, *structures: Any) -> None:
        self.calls.append(f"send {send} {batch} {len(structures)}")


def make_net() -> InProcessPipeline:
    torch.manual_seed(1)
    layers = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, NUM_CLASSES)]
    return InProcessPipeline(layers, F.cross_entropy, PLAN, lambda head: nn.Linear(WIDTH, NUM_CLASSES))


def no_data(micro_batch: int) -> tuple[Tensor, Any]:
    raise AssertionError("only the first stage reads")


def test_a_stage_between_others() -> None:
    messenger, spans, begun = Notebook(), [], []

    @contextmanager
    def span(action: Action) -> Iterator[None]:
        spans.append(str(action))
        yield

    interpreter = Interpreter(
        make_net().stages[1], messenger, no_data, begin_micro_batch=lambda: begun.append(1), span=span
    )
    interpreter.begin_batch(7, 1)
    for step in steps(training_program(PLAN, 1), 1):
        interpreter.run(*step)
    assert messenger.calls == [
        "post 1RECV_I0@1 7",
        "post 1RECV_F0 7",
        "take 1RECV_F0",
        "send 1SEND_F0 7 2",
        "send 1SEND_I0@0 7 1",
        "take 1RECV_I0@1",
    ]
    assert spans == [
        *("1RECV_F0", "1F0", "1SEND_F0", "1H0@0"),
        *("1I0@0", "1SEND_I0@0", "1RECV_I0@1", "1W0"),
    ]
    assert begun == [1]


def test_the_first_stage_loads_each_micro_batch_when_it_is_due() -> None:
    loaded: list[int] = []

    def load(micro_batch: int) -> tuple[Tensor, Any]:
        loaded.append(micro_batch)
        return torch.ones(2, WIDTH), torch.zeros(2, dtype=torch.int64)

    messenger = Notebook()
    interpreter = Interpreter(make_net().stages[0], messenger, load)
    interpreter.begin_batch(0, 3)
    with torch.no_grad():
        for step in steps(evaluation_program(PLAN, 3, all_heads=True), 0):
            interpreter.run(*step)
    assert loaded == [0, 1, 2]
    assert messenger.calls == [f"send 0SEND_F{micro_batch} 0 2" for micro_batch in range(3)]


def test_outputs_are_kept_while_they_are_wanted() -> None:
    interpreter = Interpreter(make_net().stages[2], Notebook(), no_data)
    program = steps(evaluation_program(PLAN, 2, all_heads=False), 2)
    with torch.no_grad():
        for outputs in ([], None):
            interpreter.outputs = outputs
            interpreter.begin_batch(0, 2)
            for step in program:
                interpreter.run(*step)
            if outputs is not None:
                assert [output.shape for output in outputs] == 2 * [(2, NUM_CLASSES)]


@pytest.mark.parametrize("num_micro_batches", [1, 4])
def test_every_message_is_taken_once_by_the_first_action_that_needs_it(num_micro_batches: int) -> None:
    for stage in range(PLAN.num_stages):
        actions = steps(training_program(PLAN, num_micro_batches), stage)
        posted = [action for action, _ in actions if action.kind in (Kind.RECV_FORWARD, Kind.RECV_GRADIENT)]
        taken = [receive for _, takes in actions for receive in takes]
        assert sorted(taken) == sorted(posted)


def test_stages_that_wait_for_each_other_are_refused() -> None:
    program = training_program(PLAN, 1)
    without_sends = tuple(
        tuple(action for action in actions if action.kind is not Kind.SEND_FORWARD)
        for actions in program.stages
    )
    batch = [(torch.ones(2, WIDTH), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(ScheduleError, match="the stages wait for each other"):
        run_program(replace(program, stages=without_sends), make_net().stages, batch)
