"""``ds-interlock plan`` and ``profile``, from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_up_measurements import PROSE, use
from transformers import GPT2Config, LlamaConfig, XLMConfig

from ds_interlock import cli
from ds_interlock.planning.profile import Profile

SECTION = {"mode": "interlock", "window": 2}


@pytest.fixture(autouse=True)
def _made_up_measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, tmp_path, *PROSE)


def config(folder: Path, section: dict[str, Any] | None = SECTION, **keys: Any) -> str:
    path = folder / "config.json"
    contents: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4, **keys}
    if section is not None:
        contents["interlock"] = section
    path.write_text(json.dumps(contents))
    return str(path)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_plan_of_a_config_beside_global(tmp_path, capsys):
    assert cli.main(["plan", config(tmp_path), "--stages", "8"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "stage 7" in lines[0]  # the plan as a picture
    (configured,) = [line.split() for line in lines if "window 2 *" in line]
    assert configured[3:8] == ["17.2", "1.92", "70%", "1.10", "1.74"]
    (reference,) = [line.split() for line in lines if "global (1F1B)" in line and " 33 " in line]
    assert reference[2:7] == ["33", "1.00", "100%", "1.00", "1.00"]
    assert "local  " not in out
    assert 'measured in "prose" (8 Transformer blocks of width 64 in 8 stages, 3 seeds): window 2' in lines
    assert lines[-1].startswith("Interlocking pays with 4 micro-batches on 8 stages")


SCHEDULE = [
    {"from_step": 0, "window": 1},
    {"from_step": 2000, "window": 2},
    {"from_step": 8000, "mode": "global"},
]


def test_of_a_schedule_every_phase_is_played(tmp_path, capsys):
    path = config(tmp_path, {"schedule": SCHEDULE})
    phases = plan(capsys, path, "--stages", "8")["phases"]
    assert [phase["from_step"] for phase in phases] == [0, 2000, 8000]
    configured = [phase["settings"][0] for phase in phases]
    assert [setting["name"] for setting in configured] == ["local", "window 2", "global (1F1B)"]
    alone = plan(capsys, config(tmp_path), "--stages", "8")
    assert configured[1] == alone["settings"][0]
    assert "from_step" not in alone
    assert cli.main(["plan", config(tmp_path, {"schedule": SCHEDULE}), "--stages", "8"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("From step")] == [
        "From step 0:",
        "From step 2000:",
        "From step 8000:",
    ]
    assert out.endswith("How well the schedule as a whole learns was not measured.\n")
    assert cli.main(["plan", config(tmp_path, {"schedule": SCHEDULE[:2]}), "--stages", "8"]) == 0
    assert 'The schedule as a whole was measured in our experiment "prose"' in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--svg", "--trace", "--html"])
def test_a_picture_is_of_one_phase(tmp_path, capsys, flag):
    path = tmp_path / "picture"
    assert cli.main(["plan", config(tmp_path, {"schedule": SCHEDULE}), flag, str(path)]) == 2
    assert f"{flag}: a picture is of one plan, but interlock.schedule has 3 phases" in capsys.readouterr().err
    assert not path.exists()


def test_compare_shows_every_setting(tmp_path, capsys):
    found = plan(capsys, config(tmp_path), "--stages", "8", "--micro-batches", "1", "--compare")
    names = [setting["name"] for setting in found["settings"]]
    assert names == [
        "window 2",
        "global (1F1B)",
        "global (ZB-H1)",
        "local",
        "window 2, stride 2",
        "window 3",
        "window 3, stride 2",
        "window 3, stride 3",
        "local, 1 block",
        "window 2, 1 block",
        "window 3, 1 block",
    ]
    by_name = {setting["name"]: setting for setting in found["settings"]}
    assert by_name["local"]["speed"] == pytest.approx(24 / 3.3)
    assert by_name["window 2"]["speed_to_loss"] == pytest.approx(24 / 5.3 / 1.1)
    assert by_name["window 2"]["measured"]["experiment"] == "prose"
    assert found["unit"] == "forwards"
    assert found["pays"] is True
    assert found["best_interlock"] == "window 2"
    assert (by_name["local"]["gap_recovered"], by_name["local"]["speed_to_loss"]) == (0.0, None)
    assert by_name["window 3, stride 2"]["gap_recovered"] is None
    assert found["no_better"] == ["window 1.25", "window 1.25, 1 extra", "window 1.5", "window 1.5, 1 block"]
    (schedule,) = found["schedules"]
    assert schedule["name"] == found["best_schedule"] == "local, then window 2"
    assert schedule["phases"] == [[0, "local"], [0.4, "window 2"]]
    assert schedule["speed_to_loss"] == pytest.approx(24 / (0.4 * 3.3 + 0.8 * 5.3))


def test_the_table_says_what_was_not_measured_and_what_was_not_reached(tmp_path, capsys):
    assert cli.main(["plan", config(tmp_path), "--stages", "8", "--compare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line[:20].strip(): line[20:].split() for line in lines}
    assert cells["local"][2:6] == ["0%", "not", "reached", "-"]
    assert cells["window 3, stride 2"][2:6] == ["-", "not", "measured", "-"]
    assert cells["local, then window 2"][:6] == ["-", "2.50,", "1.92", "59%", "1.20", "1.73"]
    assert any(
        line.startswith("left out, not measured to learn better than local: window 1.25") for line in lines
    )


@pytest.mark.parametrize(
    ("section", "name"), [(None, "global (1F1B)"), ({"mode": "local"}, "local"), (SECTION, "window 2")]
)
def test_the_section_alone_says_what_is_configured(tmp_path, capsys, section, name):
    assert plan(capsys, config(tmp_path, section))["configured"] == name


def test_micro_batches_come_from_the_config(tmp_path, capsys):
    assert plan(capsys, config(tmp_path, gradient_accumulation_steps=7))["num_micro_batches"] == 7
    by_batch = config(tmp_path, gradient_accumulation_steps=None, train_batch_size=12)
    assert plan(capsys, by_batch)["num_micro_batches"] == 6


def test_bounds_of_ones_own(tmp_path, capsys):
    found = plan(capsys, config(tmp_path), "--bounds", "0,1,6")
    assert found["stage_bounds"] == [0, 1, 6]
    assert found["settings"][0]["bubble_fraction"] > 0.3  # one stage has a fifth of the other's work


def test_costs_estimated_from_a_hugging_face_config_alone(tmp_path, capsys):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6, "vocab_size": 1000}
    GPT2Config(**sizes).save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--seq-length", "32", "--stages", "3"]
    found = plan(capsys, config(tmp_path), *options, "--tflops", "1", "--bandwidth", "10", "--latency", "7")
    assert found["unit"] == "s"
    assert "1 TFLOP/s, links of 10 GB/s and 7 us" in found["costs"]
    assert found["stage_bounds"][-1] == 6 + 3  # in front and behind the blocks, the unembedding
    twice = plan(capsys, config(tmp_path), *options, "--tflops", "2", "--bandwidth", "20", "--latency", "3.5")
    for one, other in zip(found["settings"], twice["settings"], strict=True):
        assert one["batch_seconds"] == pytest.approx(2 * other["batch_seconds"])
        assert one["activation_bytes"] == other["activation_bytes"]
        assert all(size > 0 for size in one["activation_bytes"])


def test_planned_stages_are_told_as_the_flag_of_a_job(tmp_path, capsys):
    LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=4).save_pretrained(
        tmp_path / "model"
    )
    options = ["--model", str(tmp_path / "model"), "--seq-length", "16", "--bounds", "0,3,7"]
    assert cli.main(["plan", config(tmp_path), *options]) == 0
    assert "a job with these stages: --stage_bounds 0,3,7" in capsys.readouterr().out.splitlines()
    assert cli.main(["plan", config(tmp_path)]) == 0
    assert "--stage_bounds" not in capsys.readouterr().out  # equal layers are of no model


def test_what_cannot_be_cut_is_not_planned(tmp_path, capsys):
    XLMConfig(emb_dim=32, n_layers=2, n_heads=2).save_pretrained(tmp_path / "model")
    for command in ("plan", "profile"):
        assert cli.main([command, config(tmp_path), "--model", str(tmp_path / "model")]) == 2
        assert "cannot be cut into pipeline layers" in capsys.readouterr().err


def test_pictures_and_traces_of_what_is_shown(tmp_path, capsys):
    svg, trace = tmp_path / "new" / "plan.svg", tmp_path / "plan.trace"
    plan(capsys, config(tmp_path), "--compare", "--svg", str(svg), "--trace", str(trace))
    for name in ("window 2:", "global (ZB-H1):", "window 3, stride 2:"):
        assert name in svg.read_text()
    processes = [
        event["args"]["name"]
        for event in json.loads(trace.read_text())["traceEvents"]
        if event["name"] == "process_name"
    ]
    assert len(processes) == 11
    assert processes[0].startswith("window 2:")


def test_a_page_of_the_configured_stages_and_micro_batches(tmp_path, capsys):
    page = tmp_path / "plan.html"
    plan(capsys, config(tmp_path), "--bounds", "0,1,3", "--micro-batches", "3", "--html", str(page))
    text = page.read_text()
    assert '"configured":{"K":2,"M":3,"name":"window 2"}' in text


def test_a_profile_measured_here_feeds_the_plan(tmp_path, capsys):
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": 50}
    GPT2Config(**sizes).save_pretrained(tmp_path / "model")
    path = tmp_path / "profile.json"
    section = {**SECTION, "head": {"type": "low_rank", "rank": 3}}
    words = ["--seq-length", "16", "--micro-batch-size", "3", "--rounds", "2", "-o", str(path)]
    arguments = ["profile", config(tmp_path, section), "--model", str(tmp_path / "model"), *words]
    assert cli.main(arguments) == 0
    assert "7 layers" in capsys.readouterr().out
    profile = Profile.load(path)
    assert (profile.micro_batch_size, profile.seq_length) == (3, 16)
    names = [layer.name for layer in profile.layers]
    assert names == ["0 Front", *(f"{n} Block" for n in range(1, 5)), "5 End", "6 Unembedding"]
    assert profile.layers[0].num_parameters == (50 + 1024) * 32  # tokens and positions
    assert profile.layers[-1].num_parameters == 50 * 32  # tied, and yet the last stage has one of its own
    for block in profile.layers[1:5]:
        assert min(block.forward_seconds, block.input_gradient_seconds, block.optimizer_seconds) > 0
        assert block.output_bytes == 3 * 16 * 32 * 4
        assert block.num_parameters == 12 * 32 * 32 + 13 * 32
        assert block.activation_bytes > block.output_bytes
    assert profile.head.num_parameters == 2 * 32 + 3 * 32 + 3 * 50
    assert profile.latency_seconds > 0
    assert profile.bandwidth_bytes_per_second
    found = plan(capsys, config(tmp_path, section), "--profile", str(path), "--stages", "2")
    assert found["costs"] == profile.source
    assert found["settings"][0]["batch_seconds"] > 0


BAD = {
    "no such file": (["none.json"], "cannot read the DeepSpeed config"),
    "no such profile": (["CONFIG", "--profile", "none.json"], "cannot read the profile"),
    "more stages than layers": (
        ["CONFIG", "--bounds", "0,1,2", "--stages", "3"],
        "--bounds has 2 stages and --stages is 3",
    ),
    "a window longer than the pipeline": (["CONFIG", "--stages", "2"], "interlock.window 3"),
    "no such model": (["CONFIG", "--model", "no/such/model"], "--model no/such/model: no Hugging Face"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_status_2(tmp_path, capsys, name):
    arguments, message = BAD[name]
    path = config(tmp_path, {**SECTION, "window": 3})
    assert cli.main(["plan", *(path if word == "CONFIG" else word for word in arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys",
    [{"gradient_accumulation_steps": "auto"}, {"gradient_accumulation_steps": 0}],
    ids=["auto", "0"],
)
def test_a_config_that_does_not_say_how_many_micro_batches(tmp_path, capsys, keys):
    assert cli.main(["plan", config(tmp_path, **keys)]) == 2
    assert "gradient_accumulation_steps: got" in capsys.readouterr().err
    assert cli.main(["plan", config(tmp_path, **keys), "--micro-batches", "2"]) == 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "words",
    [["--stages", "0"], ["--micro-batches", "x"], ["--bounds", "1,2"], ["--tflops", "-1"]],
    ids=" ".join,
)
def test_bad_numbers_are_refused_by_the_parser(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", config(tmp_path), *words])
    assert caught.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_planning_imports_neither_torch_nor_deepspeed(tmp_path):
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'deepspeed', 'transformers', 'numpy']));"
    code = f"{block} from ds_interlock import cli; sys.exit(cli.main(sys.argv[1:]))"
    words = ["plan", config(tmp_path), "--compare", "--svg", str(tmp_path / "plan.svg")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert done.returncode == 0, done.stderr
