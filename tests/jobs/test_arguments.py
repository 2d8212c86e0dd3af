"""Arguments of the jobs: from a command line or from Python, with one sentence for what makes no sense."""

import re
from pathlib import Path
from typing import Any

import pytest

from ds_interlock import ConfigError
from ds_interlock.jobs.arguments import RunArguments, parse_arguments
from ds_interlock.jobs.finetune import FinetuneArguments
from ds_interlock.jobs.train_lm import LMArguments
from ds_interlock.jobs.train_resnet import ResNetArguments

LM: dict[str, Any] = {"deepspeed_config": "x"}
FINETUNE: dict[str, Any] = {**LM, "model": "m"}


def test_a_command_line_and_python_give_the_same() -> None:
    words = "--deepspeed --deepspeed_config x --data_dir d --block bottleneck --no_augment --max_steps 3"
    expected = ResNetArguments(
        deepspeed=True,
        deepspeed_config="x",
        data_dir=Path("d"),
        block="bottleneck",
        no_augment=True,
        max_steps=3,
    )
    assert parse_arguments(ResNetArguments, None, words.split()) == expected
    assert (expected.head_channels, expected.head_size) == ([64, 64], 7)
    assert parse_arguments(ResNetArguments, None, [*words.split(), "--head_channels"]).head_channels == []
    lm = parse_arguments(
        LMArguments, None, ["--deepspeed_config", "x", "--train_file", "a", "b", "--dropout", "0.1"]
    )
    assert lm == LMArguments(deepspeed_config="x", train_file=["a", "b"], dropout=0.1)
    assert FinetuneArguments(**FINETUNE).max_steps == 200
    assert (lm.max_steps, lm.eval_steps, lm.num_stages, lm.local_rank) == (400, 100, None, -1)


def test_help_lists_the_arguments_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(FinetuneArguments, "What it does.", ["--help"])
    text = capsys.readouterr().out
    assert "What it does." in text
    assert re.findall(r"^(.*):$", text, re.MULTILINE) == [
        "options", "model", "data", "what trains, and how fast", "run", "compilation", "results"
    ]  # fmt: skip
    assert "tokens of a sample (512)" in text


WRONG: list[tuple[type[RunArguments], dict[str, Any], str]] = [
    (LMArguments, {}, "--deepspeed_config is needed: the mode is set there, as in configs/interlock.json"),
    (ResNetArguments, {}, "--deepspeed_config is needed: .* configs/resnet/interlock.json"),
    (ResNetArguments, {**LM, "max_steps": 0}, "--max_steps is 0: expected at least 1"),
    (ResNetArguments, {**LM, "seed": -1}, "--seed is -1: expected at least 0"),
    (ResNetArguments, {**LM, "max_train_samples": -1}, "--max_train_samples is -1: expected at least 0"),
    (LMArguments, {**LM, "generate": -1}, "--generate is -1: expected at least 0"),
    (FinetuneArguments, {**FINETUNE, "lora_r": -1}, "--lora_r is -1: expected at least 0"),
    (FinetuneArguments, {**FINETUNE, "max_eval_samples": 0}, "--max_eval_samples is 0: expected at least 1"),
    (FinetuneArguments, {**FINETUNE, "max_shard_size": "5"}, "--max_shard_size 5: expected a size such as 5"),
    (FinetuneArguments, {**FINETUNE, "lora_r": 2, "lora_dropout": 1.0}, "--lora_dropout is 1: expected"),
    (FinetuneArguments, {**FINETUNE, "packing": True, "task": "classification"}, "--packing is for language"),
    (FinetuneArguments, {**FINETUNE, "merge_adapter": True}, "there is no adapter without --lora_r"),
    (FinetuneArguments, {**FINETUNE, "lora_r": 2, "export_heads": True}, "it needs --merge_adapter"),
    (FinetuneArguments, {**FINETUNE, "load_in_4bit": True}, "--load_in_4bit needs --lora_r: weights in 4"),
    (FinetuneArguments, {**FINETUNE, "load_best_model_at_end": True}, "needs --eval_steps"),
    (FinetuneArguments, {**FINETUNE, "streaming": True}, "--streaming needs --max_steps: a stream does not"),
    (LMArguments, {**LM, "streaming": True}, "--streaming needs --max_steps: a stream does not say"),
    (LMArguments, {**LM, "streaming": True, "max_steps": 1}, "--streaming needs --tokenizer: training one"),
    (LMArguments, {**LM, "dataset": ["a:0.7", "b"]}, "--dataset a:0.7 b: expected a weight above 0 for each"),
    (FinetuneArguments, {**FINETUNE, "max_steps": 0}, "--max_steps is 0: expected at least 1"),
    (LMArguments, {**LM, "preprocessing_num_workers": 0}, "--preprocessing_num_workers is 0: expected"),
]  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(("kind", "values", "why"), WRONG, ids=[why for _, _, why in WRONG])
def test_what_makes_no_sense_is_named(kind: type[RunArguments], values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        kind(**values)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--maximum_steps 5", r"unrecognized arguments: --maximum_steps 5 \(--help lists all arguments\)"),
        ("--max_steps five", "argument --max_steps.*: invalid int value: 'five'"),
        ("--shortcut C", "argument --shortcut: .*'C'"),
    ],
)
def test_a_wrong_word_on_a_command_line_is_named(words: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_arguments(ResNetArguments, None, ["--deepspeed_config", "x", *words.split()])
