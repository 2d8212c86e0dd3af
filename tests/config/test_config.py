"""The "interlock" section: what it means, and that each fault is named by its JSON key."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ds_interlock.config import HeadConfig, InterlockConfig, check_deepspeed, check_filled_in
from ds_interlock.config import reference as config_reference
from ds_interlock.config.parts import MyopiaConfig, PhaseConfig, TraceConfig
from ds_interlock.errors import ConfigError, PlanError
from ds_interlock.schedule.phases import PlanSchedule
from ds_interlock.schedule.plan import GradientFlowPlan

BOUNDS = [0, 2, 5, 7, 9]

EVERYTHING = {
    "mode": "interlock",
    "window": 3,
    "combine": "farthest",
    "head_stride": 2,
    "streaming": False,
    "tied_weights": "error",
    "transport": "gloo",
    "timeout_seconds": 12.5,
    "setup_timeout_seconds": 60.5,
    "checkpoint_timeout_seconds": 90.5,
    "async_save": True,
    "nonfinite": "skip",
    "extra_in_flight": 4,
    "head": {
        "type": "lens",
        "translator": "before_norm",
        "objective": {"cross_entropy": 0.5, "kl": 0.25},
        "fused": False,
        "blocks": (2, 1),
        "token_fraction": 0.25,
        "sequence_fraction": 0.75,
        "learning_rate_scale": 2.0,
        "weight": 0.5,
        "rank": 7,
        "refresh_every": 6,
        "warmup_steps": 3,
        "warmup_learning_rate": 0.01,
    },
    "trace": {"path": "runs/trace", "batches": [3, 4]},
    "myopia": {"every": 7},
}

SCHEDULE = [
    {"from_step": 0, "window": 1.5, "combine": "farthest"},
    {"from_step": 20, "mode": "interlock"},
    {"from_step": 50, "mode": "local"},
    {"from_step": 80, "mode": "global"},
]


def section(**keys: object) -> dict[str, object]:
    return {"train_batch_size": 8, "interlock": keys}


def error_of(config: object) -> str:
    with pytest.raises(ConfigError) as caught:
        InterlockConfig.from_deepspeed(config)
    return str(caught.value)


# What the section means.


def test_every_key_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "interlock.json"
    path.write_text(json.dumps(section(**EVERYTHING)))
    assert InterlockConfig.from_deepspeed(path).model_dump(exclude={"schedule"}) == EVERYTHING
    assert InterlockConfig.from_deepspeed(str(path)) == InterlockConfig.from_deepspeed(section(**EVERYTHING))


def test_every_key_of_the_section_is_covered_above() -> None:
    keys = EVERYTHING.keys() | {"schedule"}  # which stands in place of two of them, and has tests of its own
    assert keys == InterlockConfig.model_fields.keys()
    assert EVERYTHING["head"].keys() == HeadConfig.model_fields.keys()
    for model, keys in ((InterlockConfig, EVERYTHING), (HeadConfig, EVERYTHING["head"])):
        for name, field in model.model_fields.items() - {("schedule", model.model_fields.get("schedule"))}:
            assert keys[name] != field.default, f"{name} is tested at its default"


def test_no_section_is_global() -> None:
    config = InterlockConfig.from_deepspeed({"train_batch_size": 8})
    assert config == InterlockConfig()
    assert config.is_global
    assert config.window is None
    assert config.plan(BOUNDS) == GradientFlowPlan.end_to_end(stage_bounds=BOUNDS)


def test_comments_are_allowed_as_deepspeed_allows_them(tmp_path: Path) -> None:
    path = tmp_path / "commented.json"
    path.write_text('{\n  // how gradients flow\n  "interlock": {"mode": "local"}  # every stage alone\n}')
    assert InterlockConfig.from_deepspeed(path).mode == "local"


def test_the_window_of_mode_interlock_is_2_if_not_given() -> None:
    assert InterlockConfig(mode="interlock").window == 2
    assert InterlockConfig(mode="interlock", window=1.5).window == 1.5
    assert repr(InterlockConfig(mode="interlock", window=3.0).window) == "3"


def test_local_plan_has_weighted_heads() -> None:
    config = InterlockConfig.from_deepspeed(section(mode="local", head={"weight": 0.5}))
    expected = GradientFlowPlan.n_wise(None, 1, stage_bounds=BOUNDS, head_weight=0.5)
    assert config.plan(BOUNDS) == expected
    assert [head.weight for head in config.plan(BOUNDS).heads] == [0.5, 0.5, 0.5, 1.0]
    assert not config.is_global


def test_interlock_plan_takes_every_key_that_shapes_it() -> None:
    plan = InterlockConfig.from_deepspeed(section(**EVERYTHING)).plan(BOUNDS)
    expected = GradientFlowPlan.n_wise(
        None, 3, "farthest", head_stride=2, stage_bounds=BOUNDS, head_weight=0.5
    )
    assert plan == expected
    assert plan != GradientFlowPlan.n_wise(None, 3, "sum", stage_bounds=BOUNDS, head_weight=0.5)


def test_a_schedule_has_a_plan_for_every_phase() -> None:
    config = InterlockConfig.from_deepspeed(section(schedule=SCHEDULE, head={"weight": 0.5}))
    schedule = config.plan_schedule(BOUNDS)
    n_wise = partial(GradientFlowPlan.n_wise, None, stage_bounds=BOUNDS, head_weight=0.5)
    assert [phase.from_step for phase in schedule.phases] == [0, 20, 50, 80]
    assert [phase.plan for phase in schedule.phases] == [
        n_wise(1.5, "farthest"),
        n_wise(2, "sum"),
        n_wise(1),
        GradientFlowPlan.end_to_end(stage_bounds=BOUNDS),
    ]
    assert not config.is_global
    with pytest.raises(ConfigError, match=r"interlock\.schedule: a schedule of 4 phases has no single plan"):
        config.plan(BOUNDS)


def test_all_other_keys_hold_for_every_phase() -> None:
    keys = {"head_stride": 2, "combine": "farthest", "timeout_seconds": 5.0, "streaming": False}
    config = InterlockConfig.from_deepspeed(section(schedule=[{"from_step": 0, "window": 3}], **keys))
    assert config.phases == ((0, InterlockConfig(mode="interlock", window=3, **keys)),)
    config = InterlockConfig.from_deepspeed(
        section(schedule=[{"from_step": 0, "window": 3, "combine": "sum"}], **keys)
    )
    assert config.phases[0][1].combine == "sum"


def test_a_section_without_a_schedule_is_a_schedule_of_one_phase() -> None:
    config = InterlockConfig(mode="interlock", window=3)
    assert config.phases == ((0, config),)
    assert config.plan_schedule(BOUNDS) == PlanSchedule.constant(config.plan(BOUNDS))
    assert InterlockConfig(schedule=[PhaseConfig(from_step=0, mode="global")]).is_global


def test_what_a_head_is_by_default_depends_on_the_model() -> None:
    def resolved(pretrained: bool, **keys: Any) -> tuple[str, int | None]:
        head = HeadConfig(**keys).resolve(pretrained=pretrained)
        assert head.rank == keys.get("rank", 64)
        return head.type, head.warmup_steps

    assert resolved(False) == ("norm_linear", 0)
    assert resolved(False, type="lens") == ("lens", 0)
    assert resolved(True, rank=3) == ("lens", 20)
    assert resolved(True, warmup_steps=0) == ("lens", 0)
    assert resolved(True, type="linear") == ("linear", 0)
    assert resolved(True, type="linear", warmup_steps=7) == ("linear", 7)
    assert HeadConfig(objective="kl").resolve(pretrained=True).objectives == {"kl": 1}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "cross_entropy"),
        ({"objective": {"kl": 1}}, "kl"),
        ({"objective": {"reconstruction": 2, "kl": 1}}, {"kl": 1.0, "reconstruction": 2.0}),
        ({"cross_entropy_weight": 1.0, "kl_weight": 0.0}, "cross_entropy"),
        ({"kl_weight": 0.5}, {"cross_entropy": 1.0, "kl": 0.5}),
        ({"cross_entropy_weight": 0, "kl_weight": 1}, "kl"),
    ],
)
def test_what_a_head_learns_from(keys: dict[str, Any], expected: Any) -> None:
    head = HeadConfig(**keys)
    assert head.objective == expected
    assert head.needs_base == (expected != "cross_entropy")
    assert HeadConfig(**head.model_dump()) == head
    assert hash(HeadConfig(**head.model_dump())) == hash(head)


def test_a_config_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        InterlockConfig().mode = "local"  # type: ignore[misc]


# What is wrong with it.


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"head": {"typ": "linear"}},
            'interlock.head.typ: unknown key; did you mean "type"?  valid keys: type,',
        ),
        ({"Window": 2}, 'interlock.Window: unknown key; did you mean "window"?  valid keys: mode, window,'),
        ({"zzz": 2}, "interlock.zzz: unknown key; valid keys: mode, window,"),
        ({"mode": "lokal"}, 'interlock.mode: got "lokal", expected "global", "local" or "interlock"'),
        ({"mode": "interlock", "window": "2"}, 'interlock.window: got "2", expected a valid number'),
        (
            {"mode": "interlock", "window": 0.5},
            "interlock.window: got 0.5, expected greater than or equal to 1",
        ),
        ({"mode": "interlock", "window": True}, "interlock.window: got true, expected a valid number"),
        ({"mode": "local", "window": 2}, 'interlock.window: got 2, but mode is "local", which has no window'),
        ({"window": 2}, 'interlock.window: got 2, but mode is "global", which has no window'),
        ({"head_stride": 1.5}, "interlock.head_stride: got 1.5, expected a valid integer"),
        ({"head_stride": 0}, "interlock.head_stride: got 0, expected greater than or equal to 1"),
        ({"streaming": "yes"}, 'interlock.streaming: got "yes", expected a valid boolean'),
        ({"tied_weights": "tie"}, 'interlock.tied_weights: got "tie", expected "untie", "sync" or "error"'),
        ({"timeout_seconds": 0}, "interlock.timeout_seconds: got 0, expected greater than 0"),
        ({"extra_in_flight": -1}, "interlock.extra_in_flight: got -1, expected greater than or equal to 0"),
        ({"head": "linear"}, 'interlock.head: got "linear", expected an object with some of the keys type,'),
        ({"head": {"token_fraction": 0}}, "interlock.head.token_fraction: got 0, expected greater than 0"),
        ({"head": {"type": "block_linear"}}, 'interlock.head.type: got "block_linear", which is now type'),
        ({"head": {"blocks": -1}}, "interlock.head.blocks: got -1, expected a whole number, 0 or more, or a"),
        ({"head": {"blocks": [1, True]}}, "interlock.head.blocks: got [1, true], expected a whole number"),
        ({"head": {"blocks": []}}, "interlock.head.blocks: got [], expected a whole number, 0 or more"),
        ({"head": {"token_fraction": 1.5}}, "interlock.head.token_fraction: got 1.5, expected less than or"),
        ({"head": {"weight": float("nan")}}, "interlock.head.weight: got NaN, expected"),
        (
            {"head": {"objective": "kl", "type": "low_rank"}},
            'interlock.head.objective: got "kl", but type is "low_rank": only a lens has the base',
        ),
        (
            {"head": {"objective": "ce"}},
            'interlock.head.objective: got "ce", expected "cross_entropy", "kl" or "reconstruction", or an '
            "object of them with factors above 0",
        ),
        ({"head": {"objective": {"kl": 0}}}, 'interlock.head.objective: got {"kl": 0}, expected "cross_'),
        ({"head": {"objective": ["kl"]}}, 'interlock.head.objective: got ["kl"], expected "cross_entropy",'),
        ({"head": {"cross_entropy_weight": 0}}, "interlock.head.objective: got {}, expected "),
        (
            {"head": {"kl_weight": -1}},
            'interlock.head.objective: got {"cross_entropy": 1.0, "kl": -1}, expec',
        ),
        (
            {"head": {"objective": "kl", "kl_weight": 1}},
            "interlock.head.kl_weight: unknown key; ",
        ),
        (
            {"head": {"translator": "norm"}},
            'interlock.head.translator: got "norm", expected "after_norm" or "before_norm"',
        ),
        ({"head": {"warmup_steps": 2.5}}, "interlock.head.warmup_steps: got 2.5, expected a valid integer"),
        (
            {"head": {"warmup_learning_rate": 0}},
            "interlock.head.warmup_learning_rate: got 0, expected greater than 0",
        ),
        ({"head": {"rank": 0}}, "interlock.head.rank: got 0, expected greater than or equal to 1"),
        (
            {"schedule": SCHEDULE, "mode": "global"},
            "interlock: schedule and mode are both given: remove mode, or schedule",
        ),
        (
            {"schedule": SCHEDULE, "mode": "interlock", "window": 2},
            "interlock: schedule and mode and window are both given: remove mode and window, or schedule",
        ),
        ({"schedule": []}, "interlock.schedule: it has no phases: the first must begin at step 0"),
        ({"schedule": {}}, "interlock.schedule: got {}, expected a valid list"),
        (
            {"schedule": [2]},
            "interlock.schedule[0]: got 2, expected an object with some of the keys from_step",
        ),
        ({"schedule": SCHEDULE[1:]}, "interlock.schedule: the first phase begins at step 20, expected 0"),
        (
            {"schedule": [SCHEDULE[0], SCHEDULE[2], SCHEDULE[1]]},
            "interlock.schedule: the phases begin at steps [0, 50, 20], expected rising numbers",
        ),
        (
            {"schedule": [SCHEDULE[0], SCHEDULE[0]]},
            "interlock.schedule: the phases begin at steps [0, 0], expected rising numbers",
        ),
        ({"schedule": [{"window": 2}]}, "interlock.schedule[0].from_step: missing, expected a value"),
        (
            {"schedule": [{"from_step": -1, "window": 2}]},
            "interlock.schedule[0].from_step: got -1, expected greater than or equal to 0",
        ),
        (
            {"schedule": [SCHEDULE[0], {"from_step": 1.5, "window": 2}]},
            "interlock.schedule[1].from_step: got 1.5, expected a valid integer",
        ),
        (
            {"schedule": [{"from_step": 0}]},
            "interlock.schedule[0].window: missing, and so is mode: say one of them",
        ),
        (
            {"schedule": [{"from_step": 0, "mode": "local", "window": 2}]},
            'interlock.schedule[0].window: got 2, but mode is "local", which has no window',
        ),
        (
            {"schedule": [{"from_step": 0, "window": 0.5}]},
            "interlock.schedule[0].window: got 0.5, expected greater than or equal to 1",
        ),
        (
            {"schedule": [{"from_step": 0, "mode": "lokal"}]},
            'interlock.schedule[0].mode: got "lokal", expected "global", "local" or "interlock"',
        ),
        (
            {"schedule": [{"from_step": 0, "window": 2, "combine": "all"}]},
            'interlock.schedule[0].combine: got "all", expected "sum" or "farthest"',
        ),
        (
            {"schedule": [{"from_step": 0, "window": 2, "head_stride": 2}]},
            "interlock.schedule[0].head_stride: unknown key; valid keys: from_step, mode, window, combine",
        ),
        ({"myopia": {}}, "interlock.myopia.every: missing, expected a value"),
        ({"myopia": {"every": 0}}, "interlock.myopia.every: got 0, expected greater than or equal to 1"),
        ({"myopia": 500}, "interlock.myopia: got 500, expected an object with some of the keys every"),
        ({"trace": {"batches": [1, 2]}}, "interlock.trace.path: missing, expected"),
        ({"trace": {"path": ""}}, 'interlock.trace.path: got "", expected'),
        (
            {"trace": {"path": "t", "batches": [3, 2]}},
            "interlock.trace.batches: got [3, 2], expected [first, last]",
        ),
        (
            {"trace": {"path": "t", "batches": [0, 2]}},
            "interlock.trace.batches: got [0, 2], expected [first, last]",
        ),
        (
            {"trace": {"path": "t", "batches": [1]}},
            "interlock.trace.batches: got [1], expected [first, last]",
        ),
        ({"trace": {"path": "t", "file": 1}}, "interlock.trace.file: unknown key; valid keys: path, batches"),
        (
            {"trace": True},
            "interlock.trace: got true, expected an object with some of the keys path, batches",
        ),
    ],
)
def test_a_fault_is_named_by_its_key(keys: dict[str, object], expected: str) -> None:
    assert expected in error_of(section(**keys))


@pytest.mark.bad_input
def test_all_faults_come_at_once() -> None:
    message = error_of(
        {"interlok": {}, "interlock": {"mode": "lokal", "head": {"typ": 1, "rank": 0}, "head_stride": 0}}
    )
    assert message.startswith("DeepSpeed config: 5 faults\n")
    keys = (
        "interlok",
        "interlock.mode",
        "interlock.head.typ",
        "interlock.head.rank",
        "interlock.head_stride",
    )
    for key in keys:
        assert f"\n  - {key}: " in message


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["interlok", "Interlock", "inter_lock", "interlocks"])
def test_a_misspelt_section_is_not_passed_over(name: str) -> None:
    assert error_of({name: {"mode": "local"}}).endswith(f'{name}: unknown section; did you mean "interlock"?')


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("value", "shown"), [(None, "null"), (True, "true"), ([], "[]"), ("local", '"local"')]
)
def test_a_section_that_is_no_object(value: object, shown: str) -> None:
    message = error_of({"interlock": value})
    assert f"interlock: got {shown}, expected an object with some of the keys mode, window," in message


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n  "interlock": {"mode": "local"\n', "line 3"),
        ('{"interlock": }', "line 1, column 15: not valid JSON"),
        ("[1, 2]", "got [1, 2], expected a JSON object"),
        ("  \n", "expected a JSON object"),
        ('{"interlock": {"mode": "local", "mode": "global"}}', 'the same object has "mode" more than once'),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    message = error_of(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


@pytest.mark.bad_input
def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    assert error_of(missing).startswith(f"{missing}: cannot read the DeepSpeed config:")
    assert "cannot read" in error_of(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    assert "cannot read" in error_of(tmp_path / "latin.json")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"mode": "interlock", "window": 9}, "interlock.window 9"),
        ({"mode": "interlock", "window": 2, "head_stride": 3}, "interlock.head_stride 3"),
        ({"mode": "local", "head_stride": 2}, "interlock.head_stride 2"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_keys(keys: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        InterlockConfig.from_deepspeed(section(**keys)).plan(BOUNDS)
    assert expected in str(caught.value)
    assert "do not fit a model of 4 stages" in str(caught.value)


@pytest.mark.bad_input
def test_a_phase_that_does_not_fit_is_named() -> None:
    schedule = [{"from_step": 0, "window": 2}, {"from_step": 9, "window": 9}]
    config = InterlockConfig.from_deepspeed(section(schedule=schedule))
    with pytest.raises(ConfigError, match=r"interlock\.schedule\[1\]: .*interlock\.window 9.*4 stages"):
        config.plan_schedule(BOUNDS)


@pytest.mark.bad_input
def test_bad_bounds_are_not_blamed_on_the_section() -> None:
    with pytest.raises(PlanError, match="stage_bounds"):
        InterlockConfig(mode="local").plan([0, 3, 3])


# DeepSpeed's own keys.


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled: true is not supported: "),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: 2 is not supported: "),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: 3 is not supported: "),
        ({"pipeline": {"use_reentrant": True}}, "pipeline.use_reentrant: true is not supported: "),
    ],
)
def test_deepspeed_settings_refused(config: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_deepspeed(config)
    assert key in str(caught.value)


@pytest.mark.bad_input
def test_what_only_the_trainer_of_transformers_fills_in_is_named() -> None:
    config = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": "auto"}},
    }
    with pytest.raises(ConfigError, match=r': train_batch_size, bf16\.enabled, .*\.weight_decay: "auto"'):
        check_filled_in(config)
    check_filled_in({"zero_optimization": config["zero_optimization"], "optimizer": {}})


@pytest.mark.bad_input
def test_deepspeed_settings_refused_together() -> None:
    with pytest.raises(ConfigError, match="3 faults") as caught:
        check_deepspeed(
            {
                "fp16": {"enabled": True},
                "zero_optimization": {"stage": 3},
                "pipeline": {"use_reentrant": True},
            }
        )
    assert "bf16" in str(caught.value)


def test_deepspeed_settings_that_work() -> None:
    check_deepspeed({})
    check_deepspeed(
        {
            "bf16": {"enabled": True},
            "fp16": {"enabled": False},
            "zero_optimization": {"stage": 1},
            "pipeline": {"use_reentrant": False},
        }
    )


# The reference.


def test_every_key_is_described() -> None:
    for model in (InterlockConfig, HeadConfig, TraceConfig, MyopiaConfig, PhaseConfig):
        for name, field in model.model_fields.items():
            assert field.description, name


def test_the_committed_reference_is_up_to_date() -> None:
    committed = Path(__file__).parents[2] / "docs" / "config.md"
    assert committed.read_text(encoding="utf-8") == config_reference.reference(), (
        "docs/config.md is out of date: run `make docs`"
    )
