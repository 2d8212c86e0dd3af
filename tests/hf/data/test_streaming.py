"""Streams: every sample once in an epoch, shared out between replicas, and resumed exactly."""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import samples_of
from tiny_tokenizers import letters

from ds_interlock.errors import DataError
from ds_interlock.hf.data import streaming
from ds_interlock.hf.data.batches import BatchShape
from ds_interlock.hf.data.rows import PackedRows, PaddedRows
from ds_interlock.hf.data.samples import Sample, encode_records
from ds_interlock.hf.data.sources import read_records
from ds_interlock.hf.data.streaming import (
    StreamingBatches,
    names_of_streams,
    open_stream,
    rows_of_stream,
    validation_records,
)
from ds_interlock.hf.data.text import (
    BlockRows,
    TokenBlocks,
    Tokens,
    encode_blocks,
    mix_blocks,
    tokenise_documents,
)
from ds_interlock.hf.data.tokenised import Samples, mix

LENGTH = 12
ENCODE = partial(encode_records, tokenizer=letters(), seq_length=LENGTH)
BLOCKS = partial(encode_blocks, tokenizer=letters(), seq_length=LENGTH)
FILLS: dict[str, Callable[..., Any]] = {
    "padded": partial(PaddedRows, seq_length=LENGTH),
    "packed": partial(PackedRows, seq_length=LENGTH),
    "blocks": partial(BlockRows, seq_length=LENGTH),
}


@pytest.fixture(autouse=True)
def _small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streaming, "_BLOCK", 7)


@pytest.mark.bad_input
def test_a_fault_far_down_the_stream_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    write(tmp_path / "corpus" / "train-1.jsonl", texts("a", 20))
    write(tmp_path / "corpus" / "train-2.jsonl", [{"prompt": "a", "completion": "b"}] * 8)
    stream = batches([open_stream([], str(tmp_path / "corpus"), None)], "padded", num_replicas=1)
    with pytest.raises(
        DataError, match=r"the streamed training data cannot be loaded: Couldn't cast"
    ) as raised:
        list(islice(stream, 99))
    assert "\n" not in str(raised.value)


def texts(letter: str, number: int) -> list[dict[str, str]]:
    return [{"text": letter * (1 + n % 9)} for n in range(number)]


def write(path: Path, values: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def batches(
    parts: Any, fill: str, replica: int = 0, weights: Any = None, num_replicas: int = 2
) -> StreamingBatches:
    """Batches of two micro-batches; as if the other replica had no labels."""

    def of_epoch(epoch: int) -> Any:
        how = {"replica": replica, "num_replicas": num_replicas, "seed": 3 + epoch}
        encode = BLOCKS if fill == "blocks" else ENCODE
        return rows_of_stream(parts, weights, encode, FILLS[fill], **how)

    shape = BatchShape(2, 2, num_replicas)
    how: dict[str, Any] = {"replica": replica, "add_up": lambda number: number, "seed": 3}
    sources = names_of_streams(parts, weights)
    return StreamingBatches(of_epoch, FILLS[fill], shape, **how, sources=sources)


@pytest.mark.parametrize("weights", [None, (0.7, 0.3)], ids=["all", "weighted"])
@pytest.mark.parametrize("fill", ["padded", "packed"])
def test_a_resumed_stream_goes_on_as_an_undisturbed_one(fill: str, weights: Any, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{letter}.jsonl", texts(letter, 23)) for letter in "ab"]
    parts = [open_stream([file], None, None) for file in files]
    undisturbed = batches(parts, fill, weights=weights)
    for _ in range(3):  # over ends of blocks and epochs, in the middle of a batch, too
        for _ in range(5):
            next(undisturbed)
        resumed = batches(parts, fill, weights=weights)
        resumed.load_state_dict(undisturbed.state_dict())
        twin = batches(parts, fill, weights=weights)
        twin.load_state_dict(undisturbed.state_dict())
        for _ in range(19):
            (inputs_a, labels_a), (inputs_b, labels_b) = next(twin), next(resumed)
            assert all(map(torch.equal, (*inputs_a, *labels_a), (*inputs_b, *labels_b)))
        resumed.load_state_dict(undisturbed.state_dict())
        for _ in range(4):
            (inputs_a, labels_a), (inputs_b, labels_b) = next(undisturbed), next(resumed)
            assert all(map(torch.equal, (*inputs_a, *labels_a), (*inputs_b, *labels_b)))


@pytest.mark.bad_input
def test_a_position_in_another_stream_is_refused(tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    folders = [(tmp_path, "a"), (tmp_path, "b"), (moved, "a")]
    a, b, also_a = (
        open_stream([write(folder / f"{letter}.jsonl", texts(letter, 23))], None, None)
        for folder, letter in folders
    )
    state = batches([a], "padded").state_dict()
    batches([also_a], "padded").load_state_dict(state)
    batches([a], "padded").load_state_dict({k: v for k, v in state.items() if k != "sources"})  # as it was
    others: list[tuple[Any, Any, str]] = [
        ([b], None, "b.jsonl line"),
        ([a, b], None, "a.jsonl line, b.jsonl line"),
        ([a, b], (0.7, 0.3), "a.jsonl line, b.jsonl line, 0.7, 0.3"),
    ]
    for parts, weights, sources in others:
        other = batches(parts, "padded", weights=weights)
        with pytest.raises(DataError, match=f"sources was a.jsonl line and is {sources}$"):
            other.load_state_dict(state)


def test_blocks_of_a_stream_are_one_sequence_of_tokens(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", texts("a", 23))
    records = read_records([file], "text")
    blocks = TokenBlocks(tokenise_documents(records, letters()), LENGTH)
    *others, last = BLOCKS(list(records))
    inputs, labels = BlockRows(last.samples, LENGTH).stack([(number,) for number in range(len(blocks))])
    expected = blocks.stack(range(len(blocks)))
    assert torch.equal(inputs, expected[0])
    assert torch.equal(labels, expected[1])
    assert not any(one.samples for one in others)
    undisturbed, resumed = (batches([open_stream([file], None, None, "text")], "blocks") for _ in "ab")
    for _ in range(3):
        next(undisturbed)
    resumed.load_state_dict(undisturbed.state_dict())
    (inputs, (labels, _)), (expected_inputs, (expected_labels, _)) = next(resumed), next(undisturbed)
    assert torch.equal(inputs, expected_inputs)
    assert torch.equal(labels, expected_labels)


def test_replicas_share_the_records_out(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", texts("a", 30))
    parts = [open_stream([file], None, None)]
    streams = [
        list(rows_of_stream(parts, None, ENCODE, FILLS["padded"], replica=r, num_replicas=2, seed=s))
        for r, s in ((0, 0), (1, 0), (0, 1))
    ]
    lengths = [[len(tokens) for row in stream for tokens in row["tokens"]] for stream in streams]
    expected = Counter(min(LENGTH, 1 + n % 9) + 2 for n in range(30))
    assert Counter(chain(*lengths[:2])) == expected
    assert lengths[0] != lengths[2], "another order"
    (_, (labels, normaliser)) = next(batches(parts, "padded"))
    assert labels.shape[0] == 2
    assert normaliser.item() > 0


def test_a_data_set_is_streamed(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": "ab"}, {"text": ""}, {"text": "cd"}])
    write(folder / "validation.jsonl", [{"text": "d"}, {"text": "a"}, {"text": "b"}])
    stream = open_stream([], str(folder), None)
    rows = rows_of_stream([stream], None, ENCODE, FILLS["packed"], replica=0, num_replicas=1, seed=0)
    (row,) = rows
    assert sorted(row["tokens"]) == [[0, 3, 4, 1], [0, 5, 6, 1]]
    validation = validation_records(str(folder), None, 2)
    assert validation is not None
    assert [record.text for record in validation] == ["d", "a"]
    next(batches([stream], "packed", num_replicas=1))


@pytest.mark.bad_input
def test_a_stream_with_nothing_to_learn(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "a" * 20, "completion": "b"}])
    with pytest.raises(DataError, match="nothing to learn in this replica's training data"):
        next(batches([open_stream([file], None, None)], "padded"))
    with pytest.raises(DataError, match=r"a.jsonl line 1: the keys are \"body\""):
        open_stream([write(tmp_path / "a.jsonl", [{"body": "a"}])], None, None)


def test_a_mixture_has_the_shares_of_its_weights() -> None:
    parts = [Samples.of([Sample([n, number], [number, n]) for number in range(40)]) for n in (1, 2)]
    mixed = mix(parts, (0.75, 0.25), seed=0)
    counts = np.bincount([sample.ids[0] for sample in mixed])
    assert counts[1] / len(mixed) == pytest.approx(0.75, abs=0.08)
    assert {(*sample.ids,) for sample in mixed} == {(n, number) for n in (1, 2) for number in range(40)}
    assert list(mix(parts, None, seed=0)) == [*parts[0], *parts[1]]
    blocks = [TokenBlocks(Tokens([np.full(40 * 3 + 2, n, np.int32)]), 3) for n in (1, 2)]
    firsts = mix_blocks(blocks, (0.75, 0.25), seed=0).stack(range(len(mixed)))[0].unique(dim=1)[:, 0]
    assert firsts.tolist() == [sample.ids[0] for sample in mixed], "none has tokens of both"
    assert samples_of([]) == []
