"""The job ``train_lm`` on the ranks of a pool: its modes, its results, and its errors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import log_of, refusal, tiny_tokenizer
from ranks import RankPool
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from ds_interlock.jobs.train_lm import LMArguments, run

ROOT = Path(__file__).parents[2]
SMALL = ["--vocab_size", "300", "--seq_length", "16", "--width", "16", "--num_blocks", "4"]
SMALL += ["--num_heads", "2", "--max_eval_samples", "32"]


def write_text(folder: Path) -> Path:
    """Thirty documents in a small, regular language."""
    folder.mkdir()
    for number in range(30):
        words = [f"{'abc'[(number + i) % 3] * 2} and {'xyz'[i % 3] * (1 + i % 2)};" for i in range(120)]
        (folder / f"{number:02}.txt").write_text(f"Chapter {number}.\n" + " ".join(words))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training text."""
    return write_text(tmp_path_factory.mktemp("lm") / "text")


def arguments(
    output_dir: Path, *words: object, config: object = ROOT / "configs/interlock.json"
) -> list[str]:
    argv = ["--deepspeed_config", config, "--output_dir", output_dir, "--generate", 0, *SMALL, *words]
    return [str(word) for word in argv]


def train(argv: list[str]) -> None:
    """The job, as a function that the pool's ranks can call."""
    from ds_interlock.jobs.train_lm import main

    main(argv)


def train_lm(pool: RankPool, output_dir: Path, *words: object, **how: Any) -> dict[str, Any]:
    """Trains into ``output_dir``; returns the metrics."""
    pool.run(train, argv=arguments(output_dir, *words, **how))
    metrics: dict[str, Any] = json.loads((output_dir / "metrics.json").read_text())
    return metrics


@pytest.mark.parametrize("mode", ["global", "local"])
def test_the_config_alone_changes_the_mode(mode: str, ranks2: RankPool, text: Path, tmp_path: Path) -> None:
    words = "--train_file", text, "--max_steps", 2, "--logging_steps", 1, "--generate", 4
    metrics = train_lm(ranks2, tmp_path, *words, config=ROOT / f"configs/{mode}.json")
    assert (metrics["mode"], metrics["steps"], metrics["num_stages"]) == (mode, 2, 2)
    assert math.isclose(metrics["validation_loss"], metrics["exported_validation_loss"], abs_tol=1e-4)
    assert metrics["validation_perplexity"] == math.exp(metrics["validation_loss"])
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2, 2]


def test_a_model_of_transformers_begins_as_its_own_code_says(
    ranks2: RankPool, text: Path, tmp_path: Path
) -> None:
    contents = json.loads((ROOT / "configs/local.json").read_text())
    contents["optimizer"]["params"]["lr"] = 0.0
    del contents["scheduler"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps(contents))
    sizes = "hidden_size=16,intermediate_size=24,num_hidden_layers=4,num_attention_heads=2,head_dim=8,"
    words = ["--deepspeed_config", config, "--output_dir", tmp_path / "out", "--train_file", text]
    words += ["--vocab_size", 300, "--seq_length", 16, "--max_eval_samples", 32, "--max_steps", 1]
    words += ["--generate", 4, "--seed", 5, "--config_name", "llama"]
    words += ["--torch_compile_backend", "eager"]
    words += ["--config_overrides", sizes + "num_key_value_heads=2,max_position_embeddings=16"]
    ranks2.run(train, argv=[str(word) for word in words])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert math.isclose(metrics["validation_loss"], metrics["exported_validation_loss"], abs_tol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf")
    assert type(model).__name__ == "LlamaForCausalLM"
    torch.manual_seed(5)
    fresh = AutoModelForCausalLM.from_config(model.config).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


def call_from_python(**values: Any) -> dict[str, Any]:
    """On a rank: a dataclass in, results out."""
    return run(LMArguments(**values))


def test_a_program_calls_the_job(ranks2: RankPool, text: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    sizes = {"seq_length": 16, "width": 16, "num_blocks": 4, "num_heads": 2, "max_eval_samples": 32}
    run_of = {"tokenizer": str(tmp_path / "tokenizer"), "streaming": True, "max_steps": 1, "generate": 0}
    run_of |= {"train_file": [f"{text}:0.7", f"{text / '01.txt'}:0.3"], "validation_file": [str(text)]}
    config = str(ROOT / "configs/local.json")
    results = ranks2.run(
        call_from_python, **sizes, **run_of, deepspeed_config=config, output_dir=str(tmp_path)
    )
    assert results[0] == results[1] == json.loads((tmp_path / "metrics.json").read_text())


def test_the_window_changes_on_the_way(ranks2: RankPool, text: Path, tmp_path: Path) -> None:
    contents = json.loads((ROOT / "configs/schedule.json").read_text())
    for number, phase in enumerate(contents["interlock"]["schedule"]):
        phase["from_step"] = number
    contents["interlock"]["myopia"] = {"every": 1}
    contents["tensorboard"] = {"enabled": True, "output_path": str(tmp_path / "monitor"), "job_name": "job"}
    config = tmp_path / "schedule.json"
    config.write_text(json.dumps(contents))
    metrics = train_lm(ranks2, tmp_path / "out", "--train_file", text, "--max_steps", 4, config=config)
    assert (metrics["mode"], metrics["steps"]) == ("schedule", 4)
    assert math.isclose(metrics["validation_loss"], metrics["exported_validation_loss"], abs_tol=1e-4)

    monitor = EventAccumulator(str(tmp_path / "monitor" / "job")).Reload()
    # Two stages: under window 1 stage 0 has a loss of its own, window 2 is global already.
    assert len(monitor.Scalars("Train/stage_0/loss_after_layer_4")) == 1
    cosines = [event.value for event in monitor.Scalars("Train/stage_0/gradient_cosine")]
    assert len(cosines) == 4
    assert -1 <= cosines[0] < 0.999
    assert cosines[2:] == [1, 1]


def test_the_configs_differ_in_their_section_alone() -> None:
    names = ("global", "local", "interlock", "schedule")
    configs = [json.loads((ROOT / f"configs/{name}.json").read_text()) for name in names]
    sections = [config.pop("interlock") for config in configs]
    assert all(config == configs[0] for config in configs)
    assert [section.get("mode") for section in sections] == ["global", "local", "interlock", None]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--train_file", "nowhere.txt"], "nowhere.txt does not exist: expected a text file"),
        (["--seq_length", 30000], "one batch"),
        (["--config_name", "llama"], "--width is of the model that is trained without --config_name"),
        (["--config_overrides", "hidden_size=8"], "--config_overrides needs --config_name"),
        (["--num_stages", 3], "--num_stages is 3: expected a divisor of 2"),
        (["--resume_from_checkpoint", "gone"], "--resume_from_checkpoint gone: there is no checkpoint"),
    ],
)
def test_one_rank_says_what_is_wrong(
    words: list[object], why: str, ranks2: RankPool, text: Path, tmp_path: Path
) -> None:
    argv = arguments(tmp_path / "out", "--train_file", text, *words)
    assert why in refusal(ranks2, argv, "train_lm")


@pytest.mark.bad_input
def test_a_process_alone_is_told_about_the_launcher(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="train_lm: start this through the launcher"):
        train(arguments(tmp_path))
