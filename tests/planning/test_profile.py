"""Profiles: to a file and back, to the costs of stages, and what is said of a file that is none."""

import json

import pytest
from profiles import layer, profile

from ds_interlock.config import HeadConfig
from ds_interlock.errors import ConfigError
from ds_interlock.planning.profile import Profile, unit_profile
from ds_interlock.schedule import CostModel, GradientFlowPlan
from ds_interlock.schedule.action import Action


def test_a_profile_comes_back_from_its_file(tmp_path):
    path = tmp_path / "new" / "profile.json"
    profile().save(path)
    assert Profile.load(path) == profile()
    assert [p.name for p in path.parent.iterdir()] == ["profile.json"]


def test_the_costs_of_stages_are_the_sums_of_their_layers():
    p = profile(6)
    costs = p.cost_model([0, 2, 6])
    assert costs.forward == pytest.approx([2.1, 1.2 + 1.0 + 1.1 + 1.2])
    assert costs.input_gradient == pytest.approx([1.25 * 2.1, 1.25 * 4.5])
    assert costs.weight_gradient == pytest.approx([0.75 * 2.1, 0.75 * 4.5])
    assert costs.optimizer == pytest.approx([0.021, 0.045])
    assert (costs.head, costs.final_head, costs.head_optimizer) == ([0.5] * 2, 0.125, [0.02] * 2)
    blocks = {"blocks": (2, 1), "block_seconds": 0.25, "block_optimizer_seconds": 0.01}
    deep = p.model_copy(update={"head": p.head.model_copy(update=blocks)}).cost_model([0, 2, 4, 6])
    assert (deep.head, deep.head_optimizer) == ([1.0, 0.75, 0.75], [0.04, 0.03, 0.03])
    # Where no block was profiled it costs what the layer in the middle costs, 1.2 in each unit.
    config = HeadConfig(blocks=(2, 1), sequence_fraction=0.25)
    deep = p.cost_model([0, 2, 6], config)
    assert deep.head == pytest.approx([0.5 + 2 * 0.9, 0.5 + 0.9])
    assert deep.head_optimizer == pytest.approx([0.02 + 2 * 0.012, 0.02 + 0.012])
    assert (costs.latency, costs.bandwidth) == (0.001, 1e6)


def test_messages_have_the_size_of_the_hidden_state_at_the_border():
    costs = profile(6).cost_model([0, 2, 6])
    assert costs.message_bytes(Action.parse("0SEND_F0")) == 11.0 + 4.0  # with the labels
    assert costs.message_bytes(Action.parse("1SEND_I0@0")) == 11.0


def test_a_micro_batch_in_flight_keeps_its_input_too():
    assert profile(6).activation_bytes([0, 2, 6]) == [2001.0, 11.0 + 4 * 1000 + 2 + 3 + 4 + 5]


def test_a_head_inside_a_stage_cuts_it_by_the_cost_of_its_layers():
    costs = CostModel(forward=10.0, input_gradient=20.0, layer_weights=[1.0, 1.0, 3.0, 1.0])
    plan = GradientFlowPlan.n_wise(window=1.5, stage_bounds=[0, 2, 4])
    assert costs.seconds(plan, Action.parse("1F0@0")) == pytest.approx(7.5)
    assert costs.seconds(plan, Action.parse("1F0")) == pytest.approx(2.5)
    assert costs.seconds(plan, Action.parse("1I0@0")) == pytest.approx(15.0)


def test_a_stage_steps_its_heads_too():
    plan = GradientFlowPlan.local(3)
    costs = CostModel(optimizer=2.0, head_optimizer=0.5)
    assert costs.seconds(plan, Action.parse("0S4")) == 2.5
    assert costs.seconds(plan, Action.parse("2S4")) == 2.0  # the final loss has no head of its own


def test_no_stage_begins_behind_the_last_layer_with_weights():
    even = [layer(n) for n in range(5)]
    soft_cap = layer(5, seconds=3.0).model_copy(update={"num_parameters": 0})
    assert profile(layers=[*even, soft_cap]).balanced_bounds(2) == [0, 4, 6]
    assert profile(layers=[*even, layer(5, seconds=3.0)]).balanced_bounds(2) == [0, 4, 6]
    assert profile(layers=[*even, soft_cap]).balanced_bounds(3) == [0, 2, 4, 6]
    assert unit_profile(6, 2).balanced_bounds(3) == [0, 2, 4, 6]


def test_equal_layers_make_stages_of_one():
    costs = unit_profile(num_layers=8, layers_per_stage=2).cost_model([0, 2, 4, 6, 8])
    assert costs.forward == costs.input_gradient == costs.weight_gradient == [1.0] * 4
    assert unit_profile(8, 2).is_unit
    assert not profile().is_unit


BAD = {
    "no JSON": ("{", "Invalid JSON"),
    "no profile": ("[1, 2]", "should be an object"),
    "a missing key": (
        json.dumps({**json.loads(profile().model_dump_json()), "head": {"type": "linear"}}),
        r"head\.seconds: Field required",
    ),
    "a negative time": (
        profile().model_dump_json().replace('"loss_seconds":0.125', '"loss_seconds":-1'),
        "loss_seconds: Input should be greater than or equal to 0",
    ),
    "an unknown key": (
        json.dumps({**json.loads(profile().model_dump_json()), "heads": 2}),
        "heads: Extra inputs",
    ),
    "no layers": (json.dumps({**json.loads(profile().model_dump_json()), "layers": []}), "layers"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_profile_is_an_error_that_says_why(tmp_path, name):
    text, message = BAD[name]
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Profile.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.bad_input
def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: cannot read the profile.*ds-interlock profile"):
        Profile.load(tmp_path / "none.json")
