"""``ds-interlock verify``: right plans pass, wrong gradients and wrong input do not, nothing hangs."""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_interlock import cli
from ds_interlock.config import InterlockConfig
from ds_interlock.schedule import Program, training_program
from ds_interlock.schedule.action import RECV_KINDS, Action
from ds_interlock.schedule.picture import draw_plan
from ds_interlock.schedule.plan import GradientFlowPlan
from ds_interlock.stage.work import StageWork
from ds_interlock.verification import checks, job
from ds_interlock.verification.checks import FLOAT64_LIMIT, Check, gradients_in_process, worst_error
from ds_interlock.verification.job import Outcome, Run
from ds_interlock.verification.reference import small_model, stage_of

BOUNDS = [0, 3, 5, 7]
WINDOW_2 = {"mode": "interlock", "window": 2, "combine": "sum"}


def write(folder: Path, section: dict[str, Any], **deepspeed: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"train_batch_size": 3, **deepspeed, "interlock": section}))
    return str(path)


def no_processes(*_: Any, **__: Any) -> Any:
    raise AssertionError("wrong input must be found before any process is started")


# With real processes.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_stages", "section"),
    [
        (
            2,
            {
                "mode": "interlock",
                "window": 1.5,
                "head": {"type": "shared", "blocks": 1, "weight": 0.7, "learning_rate_scale": 3.0},
            },
        ),
        (
            3,
            {
                "mode": "interlock",
                "window": 2,
                "combine": "farthest",
                "streaming": False,
                "extra_in_flight": 1,
                "head": {"token_fraction": 0.5},
            },
        ),
    ],
    ids=["window 1.5", "farthest"],
)
def test_right_plans_pass(
    num_stages: int, section: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, section, optimizer={"type": "AdamW", "params": {"lr": 7.0}})
    status = cli.main(["verify", config, "--stages", str(num_stages), "--seed", "5", "--json"])
    printed = capsys.readouterr()
    assert status == 0, printed
    report = json.loads(printed.out)
    assert len(report["plan"]["trained_by"]) == num_stages
    assert len(report["checks"]) == num_stages + 6
    assert all(check["num_parameters"] > 0 for check in report["checks"])
    fraction = section["head"].get("token_fraction", 1)
    assert any("token_fraction 0.5" in note for note in report["notes"]) == (fraction < 1)
    shared = section["head"].get("type") == "shared"
    assert any("refresh_every 20 is more" in note for note in report["notes"]) == shared


def fail_on_rank_1(*_: Any) -> Any:
    if os.environ["RANK"] == "1":
        raise ValueError("no such library")
    return []


def never_end(*_: Any) -> Any:
    time.sleep(600)


def test_a_process_that_fails_is_named_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_run_all", fail_on_rank_1)
    assert cli.main(["verify", write(tmp_path, WINDOW_2), "--stages", "2"]) == 1
    assert "the processes could not run the plan\n  rank 1: ValueError: no such library" in (
        capsys.readouterr().err
    )


def test_processes_that_take_too_long_are_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_run_all", never_end)
    others = set(multiprocessing.active_children())
    assert cli.main(["verify", write(tmp_path, {"mode": "local"}), "--stages", "2", "--timeout", "0.2"]) == 1
    assert "0 of 7 runs in 2 processes were finished after 0.2 seconds" in capsys.readouterr().err
    assert set(multiprocessing.active_children()) <= others


def test_a_program_that_could_stand_still_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reversed_receives(plan: GradientFlowPlan, *arguments: Any, **options: Any) -> Program:
        program = training_program(plan, *arguments, **options)
        stages = tuple(
            tuple(sorted(actions, key=lambda action: action.kind in RECV_KINDS)) for actions in program.stages
        )
        return replace(program, stages=stages)

    monkeypatch.setattr(checks, "run_job", no_processes)
    monkeypatch.setattr(checks, "training_program", reversed_receives)
    assert cli.main(["verify", write(tmp_path, WINDOW_2), "--stages", "2"]) == 1
    assert "which it needs" in capsys.readouterr().err


# In place of the processes: what they would give, with a fault or without.


def gradients_instead_of_processes(monkeypatch: pytest.MonkeyPatch, faulty: str | None = None) -> None:
    """Takes what the runs give from one process; ``faulty`` names a gradient to falsify in the first."""

    def run_job(bounds: Sequence[int], runs: Sequence[Run], *, seed: int, **_: Any) -> dict[Run, Outcome]:
        outcomes = {}
        for run in runs:
            found, _ = gradients_in_process(run.interlock, run.interlock.plan(bounds), seed)
            outcomes[run] = Outcome({n: g.float() for n, g in found.items()}, found, torch.tensor(0.5))
        if faulty is not None:
            outcomes[runs[0]].gradients[faulty] *= 1.001
        return outcomes

    monkeypatch.setattr(checks, "run_job", run_job)


def test_the_table_of_a_right_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients_instead_of_processes(monkeypatch)
    assert cli.main(["verify", write(tmp_path, WINDOW_2), "--stages", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" pass\n") == 9
    assert "all 9 checks passed" in printed
    assert "5 programs verified" in printed
    assert "loss 0, after layer 4" in printed


def test_of_a_schedule_every_phase_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients_instead_of_processes(monkeypatch)
    schedule = [{"from_step": 0, "window": 1}, {"from_step": 30, "mode": "global"}]
    config = write(tmp_path, {"schedule": schedule})
    assert cli.main(["verify", config, "--stages", "3"]) == 0
    printed = capsys.readouterr().out
    assert "From step 0:" in printed
    assert "From step 30:" in printed
    assert printed.count("checks passed") == 2
    assert cli.main(["verify", config, "--stages", "3", "--json"]) == 0
    phases = json.loads(capsys.readouterr().out)["phases"]
    assert [phase["from_step"] for phase in phases] == [0, 30]
    assert [phase["plan"]["trained_by"] for phase in phases] == [[[0], [1], [2]], [[0], [0], [0]]]
    gradients_instead_of_processes(monkeypatch, faulty="3.linear.weight")
    assert cli.main(["verify", config, "--stages", "3"]) == 1


def test_a_wrong_gradient_fails_the_line_of_its_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients_instead_of_processes(monkeypatch, faulty="3.linear.weight")
    assert cli.main(["verify", write(tmp_path, WINDOW_2), "--stages", "3"]) == 1
    printed = capsys.readouterr().out
    (stage_1,) = [line for line in printed.splitlines() if "float32, stage 1" in line]
    assert stage_1.split()[-1] == "FAIL"
    assert stage_1.split()[-3] == "1.0e-03"
    # The other numbers of micro-batches are compared with the faulty run as well.
    assert "4 of 9 checks failed" in printed


@pytest.mark.parametrize(
    ("section", "function", "status"),
    [
        (WINDOW_2, "layers_and_inputs", 1),
        (WINDOW_2, "usual_layers_and_inputs", 0),
        ({"mode": "local"}, "layers_and_inputs", 0),
        ({"mode": "global"}, "layers_and_inputs", 0),
    ],
)
def test_layers_of_the_user_are_walked_back_twice_where_stages_relay(
    section: dict[str, Any],
    function: str,
    status: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradients_instead_of_processes(monkeypatch)
    arguments = "--stages", "3", "--layers-from", f"overwriting_kernels:{function}"
    assert cli.main(["verify", write(tmp_path, section), *arguments]) == status
    lines = [line for line in capsys.readouterr().out.splitlines() if "gradients of another walk" in line]
    assert [line.split()[-1] for line in lines if "ScalesWhatItSaved" in line] == ["FAIL"] * status
    assert len(lines) == (0 if section is not WINDOW_2 else 3 if status else 2)


def test_layers_from_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for function in ("overwriting_kernels", "overwriting_kernels:nothing", "nowhere:layers", ":layers"):
        assert cli.main(["verify", write(tmp_path, WINDOW_2), "--layers-from", function]) == 2
        assert f"--layers-from {function}: expected MODULE:FUNCTION" in capsys.readouterr().err


def test_global_has_nothing_to_stream(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients_instead_of_processes(monkeypatch)
    assert cli.main(["verify", write(tmp_path, {"mode": "global"}), "--stages", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not any("streaming" in check["name"] for check in report["checks"])
    assert "streaming" in report["notes"][0]


# The comparison itself.


@pytest.mark.parametrize(
    "section",
    [
        {"mode": "global"},
        {"mode": "local", "head": {"type": "linear", "weight": 0.3}},
        WINDOW_2 | {"head": {"type": "norm_linear", "blocks": 1}},
        WINDOW_2 | {"window": 2.5},
        WINDOW_2 | {"combine": "farthest", "head_stride": 2},
    ],
    ids=["global", "local", "blocks", "window 2.5", "stride"],
)
def test_one_process_agrees_with_autograd(section: dict[str, Any]) -> None:
    interlock = InterlockConfig.model_validate(section)
    found, expected = gradients_in_process(interlock, interlock.plan(BOUNDS), seed=3)
    assert found["0.norm.weight"].dtype == torch.float64
    assert worst_error(found, expected) < FLOAT64_LIMIT


def test_a_relay_that_is_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    relay = StageWork._relay

    def half_of_stage_1(self: StageWork, action: Action) -> Any:
        gradients = relay(self, action)
        return tuple(gradient / 2 for gradient in gradients) if self.stage == 1 else gradients

    monkeypatch.setattr(StageWork, "_relay", half_of_stage_1)
    interlock = InterlockConfig.model_validate(WINDOW_2)
    plan = interlock.plan(BOUNDS)
    found, expected = gradients_in_process(interlock, plan, seed=3)
    wrong = {
        stage_of(plan, name) for name in found if worst_error({0: found[name]}, {0: expected[name]}) > 1e-3
    }
    assert wrong == {0}, "stage 0 is trained through stage 1, and by nothing else"


def test_errors_are_relative_to_each_parameter() -> None:
    expected = {"a": torch.tensor([100.0, 1.0]), "b": torch.tensor([0.5])}
    found = {"a": torch.tensor([100.0, 2.0]), "b": torch.tensor([0.51])}
    assert worst_error(found, expected) == pytest.approx(0.02)
    assert worst_error(expected, expected) == 0


@pytest.mark.parametrize(
    "found",
    [{}, {"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(3)}, {"a": torch.full((2,), 1e-30)}],
    ids=["missing", "too many", "shape", "not zero"],
)
def test_what_cannot_be_compared_is_infinitely_wrong(found: dict[str, torch.Tensor]) -> None:
    assert worst_error(found, {"a": torch.zeros(2)}) == math.inf


def test_not_a_number_is_no_pass() -> None:
    error = worst_error({"a": torch.tensor([math.nan])}, {"a": torch.tensor([1.0])})
    check = Check("gradients", 1, error, limit=1.0)
    assert not check.passed
    assert replace(check, error=0.5).passed


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_the_small_model_has_as_many_layers_as_asked_for(num_layers: int) -> None:
    assert len(small_model(num_layers, seed=1)) == num_layers


# The picture.


def test_a_plan_is_drawn_as_arrows_over_the_stages_it_trains() -> None:
    plan = GradientFlowPlan.n_wise(None, 2, "farthest", stage_bounds=BOUNDS, head_weight=0.5)
    assert draw_plan(plan).splitlines() == [
        "  stage 0     stage 1     stage 2     stage",
        "=========== =========== ===========",
        "    0-2         3-4         5-6       layers",
        "<-----------..........o               loss 0, after layer 4, weight 0.5",
        "            <---------------------o   the final loss",
        "--- trains the stage    ... passes through it",
    ]


def test_a_head_inside_a_stage_is_drawn_inside_it() -> None:
    picture = draw_plan(GradientFlowPlan.n_wise(None, 1.5, stage_bounds=[0, 2, 6]))
    assert "<-----------.....o        loss 0, after layer 3" in picture.splitlines()


# The command line.


@pytest.mark.parametrize("command", [[], ["verify"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    assert "verify" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "arguments", "said"),
    [
        ({"mode": "interlock", "windw": 2}, [], 'did you mean "window"?'),
        (WINDOW_2 | {"window": 3}, ["--stages", "2"], "interlock.window 3"),
        (WINDOW_2, ["--stages", "5", "--layers", "3"], "5 stages for 3 layers"),
        (WINDOW_2 | {"window": 1.5}, ["--stages", "4", "--layers", "4"], "at least 2 layers"),
    ],
    ids=["misspelt key", "window", "layers", "no room for a head"],
)
def test_wrong_input(
    section: dict[str, Any],
    arguments: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "run_job", no_processes)
    assert cli.main(["verify", write(tmp_path, section), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("ds-interlock: ")
    assert said in printed.err


def test_a_missing_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path / "interlok.json")]) == 2
    assert "interlok.json: cannot read the DeepSpeed config" in capsys.readouterr().err


@pytest.mark.bad_input
def test_settings_that_training_refuses_are_refused_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, WINDOW_2, fp16={"enabled": True})
    assert cli.main(["verify", config]) == 2
    assert "fp16.enabled" in capsys.readouterr().err


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments", [["--stages", "0"], ["--layers", "x"], ["--timeout", "-1"], ["--window"]]
)
def test_wrong_arguments(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", write(tmp_path, WINDOW_2), *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
