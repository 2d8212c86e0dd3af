"""The data of the job ``finetune``: however it is dealt out, the losses are those of its labels."""

from pathlib import Path

import pytest
import torch
from finetuning import (
    LOCAL,
    SGD,
    log_of,
    loss_of,
    rows_of,
    run,
    save_tiny,
    state_of,
    tiny_tokenizer,
    write_data,
    write_lines,
)
from ranks import RankPool
from tiny_tokenizers import CHATML

from ds_interlock.hf.data.rows import PaddedRows

SPLITS = {"1x4": (1, 4, 1), "4x1": (4, 1, 1), "1x2, two replicas": (1, 2, 2)}
"""Micro-batch size, micro-batches, replicas."""


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_step_does_not_depend_on_the_split_into_micro_batches(
    packing: bool, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    states, losses = {}, {}
    for name, (size, number, replicas) in SPLITS.items():
        batch = {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": number}
        more = ["--max_steps", 1, "--num_stages", 2 // replicas, *["--packing"] * packing]
        metrics = run(ranks2, tmp_path, data, *more, config={**SGD, **batch}, out=name)
        states[name] = state_of(tmp_path / name / "hf")
        losses[name] = metrics["train_loss"], metrics["first_eval_loss"], metrics["eval_loss"]
    before = state_of(tmp_path / "model")
    for name, state in states.items():
        assert losses[name] == pytest.approx(losses["1x4"], abs=1e-5)
        for key, tensor in state.items():
            assert not torch.equal(tensor, before[key])
            torch.testing.assert_close(tensor, states["1x4"][key], rtol=0, atol=1e-6)


def test_stages_with_losses_of_their_own_do_not_depend_on_the_split_either(
    ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama", tmp_path / "model")
    states = []
    for size, number in ((1, 4), (4, 1)):
        batch = {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": number}
        run(ranks2, tmp_path, data, "--max_steps", 1, config={**SGD, **batch}, section=LOCAL)
        states.append(state_of(tmp_path / "out" / "hf"))
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_packing_is_no_other_data(family: str, ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    model = save_tiny(family, tmp_path / "model")
    packed = run(ranks2, tmp_path, data, "--packing", "--max_steps", 12, section=LOCAL)
    expected = loss_of(model, rows_of(data / "valid.jsonl"))
    assert packed["first_eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert packed["eval_loss"] < packed["first_eval_loss"]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_padding_token_that_the_model_does_not_know(
    packing: bool, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    model, tokenizer = save_tiny("llama", tmp_path / "model"), tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[pad]"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    tokenizer.save_pretrained(tmp_path / "model")
    metrics = run(ranks2, tmp_path, data, *["--packing"] * packing, section=LOCAL)
    expected = loss_of(model, rows_of(data / "valid.jsonl"))
    assert metrics["first_eval_loss"] == pytest.approx(expected, abs=1e-5)


CHAT = [
    [("user", "ab"), ("assistant", "ba ba")],
    [("system", "a"), ("user", "b"), ("assistant", "c")],
    [("user", "c"), ("assistant", "bb"), ("user", "a"), ("assistant", "aa")],
    [("user", "cab"), ("assistant", "abba")],
]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("form", ["completions", "chats"])
def test_only_what_is_to_be_learned_counts(
    form: str, packing: bool, ranks2: RankPool, tmp_path: Path
) -> None:
    model = save_tiny("llama", tmp_path / "model", max_position_embeddings=200)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    chats = [{"messages": [{"role": who, "content": what} for who, what in chat]} for chat in CHAT]
    texts = [{"prompt": "ab" * n, "completion": " cab" * (4 - n)} for n in range(1, 4)]
    lines = chats if form == "chats" else texts
    write_lines(tmp_path / "train.jsonl", lines * 20)
    write_lines(tmp_path / "valid.jsonl", lines)
    more = ["--seq_length", 150, "--max_steps", 6, *["--packing"] * packing]
    metrics = run(ranks2, tmp_path, tmp_path, *more, section=LOCAL, config={"gradient_accumulation_steps": 1})
    rows = rows_of(tmp_path / "valid.jsonl", tokenizer, 150)
    assert 0 < sum(sample.num_labels for sample in rows.samples) < rows.num_tokens
    assert metrics["first_eval_loss"] == pytest.approx(loss_of(model, rows), abs=1e-5)
    assert metrics["eval_loss"] < metrics["first_eval_loss"]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_ten_thousand_lines_of_mixed_length(packing: bool, ranks2: RankPool, tmp_path: Path) -> None:
    data = write_data(tmp_path, num_train=10_000, num_valid=500, most_words=40)
    model = save_tiny("llama", tmp_path / "model")
    more = ["--max_steps", 5, "--max_eval_samples", 17, "--logging_steps", 1, *["--packing"] * packing]
    metrics = run(ranks2, tmp_path, data, *more, section=LOCAL)
    rows = PaddedRows(rows_of(data / "valid.jsonl").samples[:17], 24)
    assert metrics["first_eval_loss"] == pytest.approx(loss_of(model, rows), abs=1e-5)
    assert [entry["step"] for entry in log_of(tmp_path / "out") if "loss" in entry] == [1, 2, 3, 4, 5]


def test_max_train_samples_are_the_first(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    few = write_lines(tmp_path / "few.jsonl", [])
    few.write_text("".join((data / "train.jsonl").read_text().splitlines(keepends=True)[:6]))
    num_samples = len(rows_of(few).samples)
    run(ranks2, tmp_path, data, "--max_train_samples", num_samples)
    run(ranks2, tmp_path, data, "--train_file", few, out="few")
    all_of_few, first = (state_of(tmp_path / out / "hf") for out in ("few", "out"))
    assert all(torch.equal(first[name], all_of_few[name]) for name in first)


def test_a_mixture_is_streamed_and_resumed(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    files = f"{data / 'train.jsonl'}:0.8", f"{data / 'valid.jsonl'}:.2"
    more = (
        "--train_file",
        *files,
        "--streaming",
        "--packing",
        "--packing_strategy",
        "wrapped",
        "--num_stages",
        1,
        "--max_steps",
        4,
    )
    run(ranks2, tmp_path, data, *more, out="whole")
    run(ranks2, tmp_path, data, *more, "--save_steps", 2)
    resume = "--resume_from_checkpoint", tmp_path / "out" / "checkpoints" / "global_step2"
    run(ranks2, tmp_path, data, *more, *resume, out="other")
    ours, theirs = (state_of(tmp_path / out / "hf") for out in ("other", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
