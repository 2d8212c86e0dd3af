"""``launcher/finetune.py`` on tiny models of every family: what goes in comes out, what it says is true."""

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankPool
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "launcher"), str(ROOT / "tests" / "hf")]

from families import DECODERS, ENCODERS, save_tiny, tiny_tokenizer  # noqa: E402

from ds_interlock.hf.rows import ClassifiedRows, PaddedRows, Rows  # noqa: E402
from ds_interlock.hf.samples import encode_classified, encode_records  # noqa: E402
from ds_interlock.hf.sources import load_records, read_records  # noqa: E402

SEQ_LENGTH = 24
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_print": None,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}},
}
INTERLOCK = {"mode": "interlock", "window": 2, "timeout_seconds": 60}


def finetune(argv: list[str]) -> None:
    """The job, as a function that the pool's ranks can call."""
    import finetune as job

    job.main(argv)


@pytest.fixture(scope="module")
def ranks2() -> Iterator[RankPool]:
    """Two ranks that stay up over the tests of this file."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of text for a language model (train.jsonl, valid.jsonl), and two classes of them."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    words = ["ab", "ba", "abba", "cab", "bac", "aa", "bb", "cc"]
    for name, number in (("train", 60), ("valid", 11)):
        texts = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(number)]
        write_lines(folder / f"{name}.jsonl", [{"text": text} for text in texts])
        classes = [{"text": text[:12], "label": "cab" if "c" in text[:12] else "none"} for text in texts]
        write_lines(folder / f"{name}_classes.jsonl", classes)
    return folder


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(
    pool: RankPool,
    folder: Path,
    data: Path,
    *arguments: object,
    section: dict[str, Any] | None = INTERLOCK,
    config: dict[str, Any] | None = None,
    task: str = "causal",
) -> dict[str, Any]:
    """Fine-tunes ``folder/model`` into ``folder/out``; returns the metrics."""
    contents = {**CONFIG, **(config or {})}
    if section is not None:
        contents["interlock"] = section
    (folder / "config.json").write_text(json.dumps(contents))
    suffix = "_classes" if task == "classification" else ""
    argv = [
        *("--deepspeed_config", folder / "config.json", "--model", folder / "model", "--task", task),
        *("--train_file", data / f"train{suffix}.jsonl", "--validation_file", data / f"valid{suffix}.jsonl"),
        *("--seq_length", SEQ_LENGTH, "--max_steps", 2, "--output_dir", folder / "out"),
        *arguments,
    ]
    pool.run(finetune, argv=[str(word) for word in argv])
    metrics: dict[str, Any] = json.loads((folder / "out" / "metrics.json").read_text())
    return metrics


def loss_of(model: Any, rows: Rows[Any]) -> float:
    """Transformers' own loss: the mean over all labels, row by row."""
    total, count = 0.0, 0
    for number in range(len(rows.samples)):
        inputs, labels = rows.stack([(number,)])
        named = dict(zip(rows.names, inputs, strict=True))
        with torch.no_grad():
            logits = model(**named).logits
        chosen = labels.flatten() != -100
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        total += losses[chosen].double().sum().item()
        count += int(chosen.sum())
    return total / count


def validation_rows(data: Path) -> PaddedRows:
    records = read_records([str(data / "valid.jsonl")])
    return PaddedRows(encode_records(records, tiny_tokenizer(), SEQ_LENGTH).samples, SEQ_LENGTH)


def state_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("family", DECODERS)
def test_without_a_learning_rate_the_model_comes_out_as_it_went_in(
    family: str, ranks4: RankPool, data: Path, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path / "model")
    section = None if family == "opt, projected" else INTERLOCK  # refused outside global, see below
    metrics = run(ranks4, tmp_path, data, "--learning_rate", 0, section=section)
    before, after = (state_of(folder) for folder in (tmp_path / "model", tmp_path / "out" / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected = loss_of(model, validation_rows(data))
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", dtype=torch.float32)
    assert loss_of(again, validation_rows(data)) == pytest.approx(metrics["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_classify_with_heads_on_the_stages(
    family: str, ranks4: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path / "model", num_labels=2)
    section = {"mode": "local", "timeout_seconds": 60}
    arguments = "--max_steps", 60, "--learning_rate", 2e-3
    metrics = run(ranks4, tmp_path, data, *arguments, section=section, task="classification")
    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    assert metrics["eval_accuracy"] >= 0.8
    assert sum(name.startswith("eval_loss_after_layer") for name in metrics) == 3
    records = load_records(
        [str(data / "train_classes.jsonl")], [str(data / "valid_classes.jsonl")], task="classification"
    )
    samples = encode_classified(records.validation, tiny_tokenizer(), SEQ_LENGTH, records.label_ids).samples
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "hf")
    assert model.config.id2label == {0: "cab", 1: "none"}
    assert loss_of(model, ClassifiedRows(samples, SEQ_LENGTH)) == pytest.approx(
        metrics["eval_loss"], abs=1e-5
    )


@pytest.mark.parametrize(
    "section",
    [None, {"mode": "local"}, {"mode": "interlock", "window": 1.5}, {"mode": "interlock", "window": 2}],
    ids=lambda section: str(section and section.get("window", section["mode"])),
)
def test_every_mode_trains_and_exports_what_it_evaluated(
    section: dict[str, Any] | None, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    save_tiny("llama, tied", tmp_path / "model")
    section = section and {**section, "timeout_seconds": 60}
    metrics = run(ranks2, tmp_path, data, "--max_steps", 12, "--eval_steps", 6, section=section)
    assert metrics["eval_loss"] < metrics["first_eval_loss"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", dtype=torch.float32)
    keeps_ties = section is None or section.get("window") == 2  # of two stages: global
    assert model.config.tie_word_embeddings == keeps_ties
    assert loss_of(model, validation_rows(data)) == pytest.approx(metrics["eval_loss"], abs=1e-5)
    log = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 6, 12]
    assert (tmp_path / "out" / "checkpoints" / "best").is_dir()
