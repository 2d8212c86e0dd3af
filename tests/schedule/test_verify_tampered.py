"""Programs tampered with at random: the verifier rejects every one.

Each tampering breaks a rule by construction; where a program has no place for it, it gives None.
"""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from schedule_strategies import crossings, edit, places, plans, quick, receives_behind

from ds_interlock.errors import ScheduleError
from ds_interlock.schedule import simulate, training_program, verify
from ds_interlock.schedule.action import COMPUTE_KINDS, RECV_KINDS, SEND_KINDS, Kind
from ds_interlock.schedule.dependency import dependencies, receives_needed


def _drop(program, draw):
    stage, position = draw(st.sampled_from(places(program, lambda _: True)))
    actions = program.stages[stage]
    return edit(program, stage, actions[:position] + actions[position + 1 :])


def _duplicate(program, draw):
    stage, position = draw(st.sampled_from(places(program, lambda _: True)))
    actions = list(program.stages[stage])
    actions.insert(draw(st.integers(0, len(actions))), actions[position])
    return edit(program, stage, actions)


def _move_to_other_stage(program, draw):
    if program.plan.num_stages == 1:
        return None
    stage, position = draw(st.sampled_from(places(program, lambda _: True)))
    action = program.stages[stage][position]
    tampered = edit(program, stage, program.stages[stage][:position] + program.stages[stage][position + 1 :])
    other = draw(st.sampled_from([k for k in range(program.plan.num_stages) if k != stage]))
    actions = list(tampered.stages[other])
    actions.insert(draw(st.integers(0, len(actions))), action)
    return edit(tampered, other, actions)


def _put_before(program, stage, action, needed):
    """Moves ``action`` to just in front of ``needed``, which now stands in front of it."""
    actions = [other for other in program.stages[stage] if other != action]
    actions.insert(actions.index(needed), action)
    return edit(program, stage, actions)


def _needs_on_the_same_stage(program):
    return [
        (stage, action, needed)
        for stage, actions in enumerate(program.stages)
        for action in actions
        if action.kind in COMPUTE_KINDS
        for needed in dependencies(program.plan, action)
        if needed.stage == stage
    ]


def _before_what_it_needs(program, draw):
    return _put_before(program, *draw(st.sampled_from(_needs_on_the_same_stage(program))))


def _swap(program, stage, one, other):
    turned = {one: other, other: one}
    return edit(program, stage, [turned.get(action, action) for action in program.stages[stage]])


def _swap_with_what_it_needs(program, draw):
    return _swap(program, *draw(st.sampled_from(_needs_on_the_same_stage(program))))


def _receive_behind_its_use(program, draw):
    pairs = [
        (stage, action, receive)
        for stage, actions in enumerate(program.stages)
        for action in actions
        for receive in receives_needed(program.plan, action)
    ]
    return _put_before(program, *draw(st.sampled_from(pairs))) if pairs else None


def _swap_two_of_one_link(kinds):
    def tamper(program, draw):
        of_kinds = places(program, lambda action: action.kind in kinds)
        pairs = [
            (stage, program.stages[stage][one], program.stages[stage][other])
            for stage, one in of_kinds
            for also, other in of_kinds
            if stage == also
            and one < other
            and program.stages[stage][one].kind is program.stages[stage][other].kind
        ]
        return _swap(program, *draw(st.sampled_from(pairs))) if pairs else None

    return tamper


def _receives_behind_sends_that_cross(program, draw):
    pairs = crossings(program)
    return receives_behind(program, *draw(st.sampled_from(pairs))) if pairs else None


def _other_losses(program, draw):
    stage, position = draw(st.sampled_from(places(program, lambda action: action.kind is not Kind.LOAD)))
    action = program.stages[stage][position]
    losses = draw(st.sets(st.integers(0, program.plan.final + 1)).map(sorted).map(tuple))
    assume(losses != action.losses)
    # Whether or not the plan knows the new action, the old one is now missing.
    actions = list(program.stages[stage])
    actions[position] = replace(action, losses=losses)
    return edit(program, stage, actions)


def _other_micro_batch(program, draw):
    stage, position = draw(st.sampled_from(places(program, lambda _: True)))
    actions = list(program.stages[stage])
    shift = draw(st.integers(1, 3))
    actions[position] = replace(actions[position], micro_batch=actions[position].micro_batch + shift)
    return edit(program, stage, actions)


def _something_behind_the_step(program, draw):
    stage = draw(st.integers(0, program.plan.num_stages - 1))
    actions = list(program.stages[stage])
    actions.append(actions.pop(draw(st.integers(0, len(actions) - 2))))
    return edit(program, stage, actions)


def _fewer_slots(program, draw):
    peaks = simulate(program, num_batches=1).in_flight
    stage = draw(st.integers(0, program.plan.num_stages - 1))
    slots = list(program.slots)
    slots[stage] = draw(st.integers(0, peaks[stage] - 1))
    return replace(program, slots=tuple(slots))


def _more_slots(program, draw):
    stage = draw(st.integers(0, program.plan.num_stages - 1))
    slots = list(program.slots)
    slots[stage] = program.plan.in_flight(stage) + 1 + draw(st.integers(1, 3))
    return replace(program, slots=tuple(slots))


TAMPERINGS = {
    "drop": _drop,
    "duplicate": _duplicate,
    "move to another stage": _move_to_other_stage,
    "put before what it needs": _before_what_it_needs,
    "swap with what it needs": _swap_with_what_it_needs,
    "receive behind its use": _receive_behind_its_use,
    "swap sends of one link": _swap_two_of_one_link(SEND_KINDS),
    "swap receives of one link": _swap_two_of_one_link(RECV_KINDS),
    "swap loads": _swap_two_of_one_link({Kind.LOAD}),
    "receives behind sends that cross": _receives_behind_sends_that_cross,
    "other losses": _other_losses,
    "other micro-batch": _other_micro_batch,
    "something behind the step": _something_behind_the_step,
    "fewer slots": _fewer_slots,
    "more slots": _more_slots,
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_a_program_that_has_been_tampered_with_is_rejected(tampering):
    @settings(quick, max_examples=30)
    @given(plans(max_stages=5), st.integers(1, 4), st.integers(0, 1), st.data())
    def run(plan, num_micro_batches, extra, data):
        program = training_program(plan, num_micro_batches, extra_in_flight=extra)
        tampered = TAMPERINGS[tampering](program, data.draw)
        assume(tampered is not None)
        with pytest.raises(ScheduleError, match="program: "):
            verify(tampered, extra_in_flight=1)

    run()
