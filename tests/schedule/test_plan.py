"""Which loss trains which stage: the table of the design, by hand, by brute force, and its faults."""

import itertools
import math

import pytest
from schedule_strategies import bounds_of, plan_or_none, stages_of, where

from ds_interlock.errors import PlanError
from ds_interlock.schedule import GradientFlowPlan
from ds_interlock.schedule.plan import LossHead

FINAL = "final"


def test_window_2_of_4_stages_with_sum():
    plan = GradientFlowPlan.n_wise(4, 2)
    assert stages_of(plan) == [[1], [1, 2], [2, FINAL], [FINAL]]
    assert plan.heads == (LossHead(1, 2), LossHead(2, 3), LossHead(3, 4))


def test_window_2_of_4_stages_with_farthest():
    plan = GradientFlowPlan.n_wise(4, 2, "farthest")
    assert stages_of(plan) == [[1], [2], [FINAL], [FINAL]]
    assert [head.stage for head in plan.heads] == [1, 2, 3]


@pytest.mark.parametrize(
    ("window", "combine", "expected"),
    [
        # Heads sit after round(f * 4) layers of their stage, at least 1, at most 3.
        (1.25, "sum", [[(1, 5)], [(2, 9)], [(3, 13)], [FINAL]]),
        (1.25, "farthest", [[(1, 5)], [(2, 9)], [(3, 13)], [FINAL]]),
        (1.5, "sum", [[(1, 6)], [(2, 10)], [(3, 14)], [FINAL]]),
        (2.5, "sum", [[(2, 10)], [(2, 10), (3, 14)], [(3, 14), FINAL], [FINAL]]),
        (2.5, "farthest", [[(2, 10)], [(3, 14)], [FINAL], [FINAL]]),
        (3.75, "sum", [[(3, 15)], [(3, 15), FINAL], [(3, 15), FINAL], [FINAL]]),
        (1.01, "sum", [[(1, 5)], [(2, 9)], [(3, 13)], [FINAL]]),
        (1.99, "sum", [[(1, 7)], [(2, 11)], [(3, 15)], [FINAL]]),
    ],
)
def test_fractional_windows_of_4_stages_of_4_layers(window, combine, expected):
    plan = GradientFlowPlan.n_wise(window=window, combine=combine, stage_bounds=bounds_of(4, 4))
    assert where(plan) == expected


@pytest.mark.parametrize(
    ("window", "stride", "combine", "expected"),
    [
        # Heads at the ends of stages 1, 3, 5 (5 is the final loss).
        (2, 2, "sum", [[1], [1], [3], [3], [FINAL], [FINAL]]),
        (3, 2, "farthest", [[1], [3], [3], [FINAL], [FINAL], [FINAL]]),
        # Head 1 does not reach back three stages, but stage 0 has no other: the farthest in reach.
        (3, 2, "sum", [[1], [3], [3], [3, FINAL], [FINAL], [FINAL]]),
        (3, 3, "sum", [[2], [2], [2], [FINAL], [FINAL], [FINAL]]),
        (4, 3, "sum", [[2], [2], [FINAL], [FINAL], [FINAL], [FINAL]]),
    ],
)
def test_head_stride_of_6_stages(window, stride, combine, expected):
    assert stages_of(GradientFlowPlan.n_wise(6, window, combine, head_stride=stride)) == expected


def test_head_stride_with_a_fractional_window():
    # Inner heads only in stages 1 and 3 of 0..3: those where 3 - j is even.
    plan = GradientFlowPlan.n_wise(window=2.5, head_stride=2, stage_bounds=bounds_of(4, 4))
    assert where(plan) == [[(1, 6)], [(3, 14)], [(3, 14), FINAL], [FINAL]]


@pytest.mark.bad_input
def test_a_head_stride_beyond_the_window_is_refused_naming_every_stage_left_out():
    with pytest.raises(PlanError) as error:
        GradientFlowPlan.n_wise(7, 2, head_stride=3)
    message = str(error.value)
    # Heads at the ends of stages 0, 3 and 6; stages 1 and 4 reach one stage on, not two.
    assert "no loss is in reach of stage 1" in message
    assert "no loss is in reach of stage 4" in message
    assert "stage 0" not in message
    assert "use at most 2" in message


def _by_the_design(num_stages, window, combine, stride):
    """The table of docs/design.md, section 2, word for word. Losses by stage, the model's own "final"."""
    last = num_stages - 1
    whole, fractional = math.floor(window), window != math.floor(window)

    def row(k, heads):
        # "heads only at stages j with (K-1-j) divisible by s"
        heads = [j for j in heads if (last - j) % stride == 0]
        if fractional:
            return [*heads, *([FINAL] if k + whole > last else [])]
        return [FINAL if j == last else j for j in heads]

    table = []
    for k in range(num_stages):
        if fractional:
            in_reach = row(k, range(k + 1, min(k + whole, last) + 1))
            chosen = row(k, range(max(k + 1, whole), min(k + whole, last) + 1))
        else:
            in_reach = row(k, range(k, min(k + whole - 1, last) + 1))
            chosen = row(k, [j for j in range(k, min(k + whole - 1, last) + 1) if j >= whole - 1])
        if combine == "farthest" or not chosen:
            chosen = in_reach[-1:]
        if not chosen:
            return None
        table.append(chosen)
    return table


@pytest.mark.parametrize("combine", ["sum", "farthest"])
@pytest.mark.parametrize("num_stages", range(1, 8))
def test_every_small_plan_is_what_the_design_says(num_stages, combine):
    windows = [n + f for n in range(1, num_stages + 1) for f in (0, 0.25, 0.5, 0.8) if n + f <= num_stages]
    num_refused = 0
    for window, stride in itertools.product(windows, range(1, num_stages + 2)):
        plan = plan_or_none(bounds_of(num_stages, 5), window=window, combine=combine, head_stride=stride)
        expected = _by_the_design(num_stages, window, combine, stride)
        assert (plan and stages_of(plan)) == expected, (window, stride)
        num_refused += plan is None
        if plan:
            # Heads that train nothing are not built.
            assert set().union(*plan.trained_by) == set(range(len(plan.heads)))
    assert num_refused > 0 or num_stages < 2


@pytest.mark.parametrize("num_stages", [1, 3, 5])
@pytest.mark.parametrize("combine", ["sum", "farthest"])
def test_the_ends_of_the_scale(num_stages, combine):
    bounds = bounds_of(num_stages, 3)
    local = GradientFlowPlan.local(stage_bounds=bounds)
    assert GradientFlowPlan.n_wise(window=1, combine=combine, stage_bounds=bounds) == local
    assert [head.stage for head in local.heads] == list(range(num_stages))
    assert local.trained_by == tuple(frozenset({stage}) for stage in range(num_stages))
    end_to_end = GradientFlowPlan.end_to_end(stage_bounds=bounds)
    assert GradientFlowPlan.n_wise(window=num_stages, combine=combine, stage_bounds=bounds) == end_to_end
    assert end_to_end.heads == (LossHead(num_stages - 1, 3 * num_stages),)
    assert end_to_end.is_end_to_end
    assert local.is_end_to_end == (num_stages == 1)


def test_num_stages_means_one_layer_a_stage():
    assert GradientFlowPlan.n_wise(5, 3) == GradientFlowPlan.n_wise(window=3, stage_bounds=range(6))
    assert GradientFlowPlan.n_wise(5, 3).num_layers == 5


def test_deep_supervision():
    plan = GradientFlowPlan.deep_supervision(stage_bounds=[0, 2, 3, 7], head_weight=0.3)
    assert plan.heads == (LossHead(0, 2, 0.3), LossHead(1, 3, 0.3), LossHead(2, 7, 1.0))
    assert plan.trained_by == ({0, 1, 2}, {1, 2}, {2})
    # All that comes back to a stage trains everything in front of it: it travels as one sum.
    assert plan.bundles(1) == ((1, 2),)
    assert plan.bundles(2) == ((2,),)
    assert [plan.in_flight(stage) for stage in range(3)] == [3, 2, 1]


def test_head_weight_is_that_of_every_head_but_the_final_one():
    plan = GradientFlowPlan.n_wise(4, 2, head_weight=0.25)
    assert [head.weight for head in plan.heads] == [0.25, 0.25, 1.0]


def test_relays_and_in_flight_of_window_3():
    # S = {2}, {2, 3}, {2, 3, final}, {3, final}, {final}; losses 0, 1, 2.
    plan = GradientFlowPlan.n_wise(5, 3)
    assert stages_of(plan) == [[2], [2, 3], [2, 3, FINAL], [3, FINAL], [FINAL]]
    assert [plan.relays(stage) for stage in range(5)] == [(), (0,), (0, 1), (1, 2), (2,)]
    assert [plan.bundles(stage) for stage in range(5)] == [(), ((0,),), ((0,), (1,)), ((1,), (2,)), ((2,),)]
    assert [plan.in_flight(stage) for stage in range(5)] == [3, 3, 3, 2, 1]
    assert plan.losses_at(3) == (1,)


def test_a_head_inside_a_stage_does_not_train_it_but_is_relayed_by_it():
    plan = GradientFlowPlan.n_wise(window=1.5, stage_bounds=[0, 4, 10])
    assert plan.heads == (LossHead(1, 7), LossHead(1, 10))
    assert plan.trained_by == ({0}, {1})
    assert plan.relays(1) == (0,)
    assert (plan.is_inner(0), plan.is_inner(1)) == (True, False)
    assert [plan.in_flight(stage) for stage in range(2)] == [2, 1]


def test_losses_that_train_the_same_upstream_stages_travel_together():
    plan = GradientFlowPlan(
        stage_bounds=(0, 1, 2, 3, 4),
        heads=(LossHead(1, 2), LossHead(2, 3), LossHead(3, 4)),
        trained_by=({0, 1, 2}, {0, 2}, {1, 2}, {2}),
    )
    # At stage 1 all three go on to stage 0; at stage 2 losses 1 and 2 part: only 2 trains stage 1.
    assert plan.bundles(1) == ((0, 1, 2),)
    assert plan.bundles(2) == ((1,), (2,))
    assert plan.bundles(3) == ((2,),)


def _faults(**changes):
    good = {
        "stage_bounds": (0, 2, 4, 6),
        "heads": (LossHead(0, 2), LossHead(1, 4), LossHead(2, 6)),
        "trained_by": ({0}, {1}, {2}),
    }
    GradientFlowPlan(**good)
    with pytest.raises(PlanError) as error:
        GradientFlowPlan(**{**good, **changes})
    return str(error.value)


@pytest.mark.parametrize("bounds", [(1, 2, 4), (0, 2, 2, 6), (0, 4, 2, 6)])
def test_bounds_must_start_at_0_and_rise(bounds):
    assert f"stage_bounds {list(bounds)} must start at 0 and rise" in _faults(stage_bounds=bounds)


def test_a_plan_needs_heads():
    assert "heads is empty" in _faults(heads=())


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ([LossHead(7, 2), LossHead(1, 4), LossHead(2, 6)], "there is no such stage; the plan has 3"),
        ([LossHead(0, 3), LossHead(1, 4), LossHead(2, 6)], "stage 0 ends layers 1 to 2"),
        ([LossHead(0, 2, -0.5), LossHead(1, 4), LossHead(2, 6)], "its weight is -0.5, expected a positive"),
        ([LossHead(0, 2, math.nan), LossHead(1, 4), LossHead(2, 6)], "its weight is nan"),
        ([LossHead(0, 2), LossHead(1, 4), LossHead(2, 5)], "must be the final loss, after layer 6"),
        ([LossHead(1, 4), LossHead(0, 2), LossHead(2, 6)], "in the order of their layers, one a layer"),
        ([LossHead(0, 2), LossHead(0, 2), LossHead(2, 6)], "in the order of their layers, one a layer"),
    ],
)
def test_faults_of_heads(heads, expected):
    assert expected in _faults(heads=heads)


@pytest.mark.parametrize(
    ("trained_by", "expected"),
    [
        (({0}, {1, 2}), "trained_by has 2 entries for 3 stages"),
        (({0}, {1}, {2}, {2}), "trained_by has 4 entries for 3 stages"),
        (({0, 1}, set(), {2}), "stage 1 is trained by no loss"),
        (({0, 5}, {1}, {2}), "stage 0 is trained by loss 5: there are 3"),
        (({0}, {1, 0}, {2}), "stage 1 is trained by loss 0, which sits before its end"),
        (({2}, {2}, {2}), "losses [0, 1] train no stage"),
    ],
)
def test_faults_of_trained_by(trained_by, expected):
    assert expected in _faults(trained_by=trained_by)


def test_all_faults_are_told_at_once():
    message = _faults(
        heads=(LossHead(7, 2, 0.0), LossHead(1, 3), LossHead(2, 5)), trained_by=(set(), {0, 9}, {2})
    )
    assert message.startswith("gradient-flow plan: 8 faults\n")
    for part in (
        "no such stage",
        "its weight is 0.0",
        "the final loss, after layer 6",
        "stage 0 is trained by no loss",
        "stage 1 is trained by loss 0",
        "stage 1 is trained by loss 9",
        "stage 2 is trained by loss 2, which sits before its end",
        "losses [1] train no stage",
    ):
        assert part in message


@pytest.mark.parametrize("window", [1, 1.25, 2, 7.5])
@pytest.mark.parametrize("combine", ["sum", "farthest"])
def test_one_stage_is_trained_end_to_end_whatever_the_window(window, combine):
    plan = GradientFlowPlan.n_wise(window=window, combine=combine, head_stride=2, stage_bounds=[0, 1])
    assert plan == GradientFlowPlan.end_to_end(1)


@pytest.mark.bad_input
@pytest.mark.parametrize("window", [0, 0.5, -1, math.nan, math.inf])
def test_one_stage_takes_no_impossible_window(window):
    with pytest.raises(PlanError, match=rf"window is {window}"):
        GradientFlowPlan.n_wise(1, window)


@pytest.mark.bad_input
@pytest.mark.parametrize("window", [0, 0.5, -1, 3.01, 4, math.nan, math.inf])
def test_a_window_counts_between_one_and_all_stages(window):
    with pytest.raises(PlanError, match=rf"window is {window}: .* between 1 \(local\) and 3, the number"):
        GradientFlowPlan.n_wise(3, window)


@pytest.mark.bad_input
def test_faults_of_the_arguments_are_told_at_once():
    with pytest.raises(PlanError) as error:
        GradientFlowPlan.n_wise(3, 9, "mean", head_stride=0)
    message = str(error.value)
    assert "3 faults" in message
    assert "window is 9" in message
    assert 'combine is \'mean\': expected "sum" or "farthest"' in message
    assert "head_stride is 0" in message


@pytest.mark.bad_input
@pytest.mark.parametrize("stride", [0, -2, 1.5, math.nan, math.inf])
def test_a_head_stride_is_a_whole_number(stride):
    with pytest.raises(PlanError, match=f"head_stride is {stride}: expected a whole number"):
        GradientFlowPlan.n_wise(4, 3, head_stride=stride)


@pytest.mark.bad_input
def test_a_fractional_window_needs_stages_that_can_be_cut():
    with pytest.raises(PlanError) as error:
        GradientFlowPlan.n_wise(window=1.5, stage_bounds=[0, 4, 5, 6, 9])
    message = str(error.value)
    assert "a head within stage 1, which has 1 layer" in message
    assert "a head within stage 2, which has 1 layer" in message
    assert "inside stage 3" not in message


@pytest.mark.bad_input
def test_num_stages_or_stage_bounds():
    for build in (GradientFlowPlan.local, GradientFlowPlan.end_to_end, GradientFlowPlan.deep_supervision):
        with pytest.raises(PlanError, match="either num_stages"):
            build()
        with pytest.raises(PlanError, match="either num_stages"):
            build(2, stage_bounds=[0, 1, 2])
        with pytest.raises(PlanError, match=r"stage_bounds \[0\]: at least two numbers"):
            build(stage_bounds=[0])
        with pytest.raises(PlanError, match="num_stages is 0"):
            build(0)
