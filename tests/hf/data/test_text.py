"""Token blocks, and the order in which micro-batches come."""

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_tokenizers import letters

from ds_interlock.errors import DataError
from ds_interlock.hf.data.sources import load_records
from ds_interlock.hf.data.text import (
    BlockIterator,
    TokenBlocks,
    Tokens,
    tokenise_documents,
    unigram_perplexity,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def tokens_of(number):
    """0 to number - 1, in pieces as from a file."""
    return Tokens(np.array_split(np.arange(number, dtype=np.int32), 4))


def blocks_of(num_blocks, seq_length=3):
    return TokenBlocks(tokens_of(num_blocks * seq_length + 1), seq_length)


def numbers_of(micro_batch, seq_length=3):
    """Which blocks of ``blocks_of`` a micro-batch is made of."""
    return [int(row[0]) // seq_length for row in micro_batch[0]]


def test_documents_become_one_sequence_with_ends(tmp_path):
    texts = [letter * number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz", 1)]
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(texts))
    tokenizer = letters(model_max_length=5, pad_token="<s>")
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    tokenizer(texts, padding=True, truncation=True)  # which stays set
    data = load_records([str(path)], task="text", seed=3)
    both = [tokenise_documents(part, tokenizer)[:] for part in (data.train, data.validation)]
    expected = [
        [id for record in part for id in (*ids[texts.index(record.text)], 1)]
        for part in (data.train, data.validation)
    ]
    assert [part.dtype for part in both] == [torch.int64] * 2
    assert [part.tolist() for part in both] == expected


def test_documents_of_a_data_set_that_has_blank_rows(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.csv").write_text("text,n\na,1\n,2\nb,3\n  ,4\nc,5\n")
    data = load_records(dataset=str(tmp_path / "corpus"), task="text", seed=1)
    tokens = [tokenise_documents(part, letters())[:].tolist() for part in (data.train, data.validation)]
    assert [len(part) for part in tokens] == [4, 2]
    assert sorted(tokens[0] + tokens[1]) == [1, 1, 1, 3, 4, 5]


def test_a_slice_of_tokens_crosses_pieces():
    tokens = tokens_of(10)
    assert [tokens[start : start + 4].tolist() for start in (0, 2, 8)] == [[0, 1, 2, 3], [2, 3, 4, 5], [8, 9]]
    assert (len(tokens), tokens[3:3].tolist(), len(Tokens([]))) == (10, [], 0)


def test_labels_are_the_next_tokens_and_cover_all_but_a_rest():
    blocks = TokenBlocks(tokens_of(12), seq_length=5)
    inputs, labels = blocks.stack(range(len(blocks)))
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert labels.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


@pytest.mark.bad_input
def test_too_small_for_one_batch_says_how_much_is_needed():
    blocks = TokenBlocks(tokens_of(50), seq_length=7)
    blocks.require(7, "training")
    with pytest.raises(
        DataError, match=r"training text has 50 tokens, and one batch needs 57 \(8 blocks of 7"
    ):
        blocks.require(8, "training")
    with pytest.raises(DataError, match="50 tokens"):
        BlockIterator(blocks, 4, num_replicas=2)


def test_replicas_share_an_epoch_without_overlap():
    replicas = [BlockIterator(blocks_of(14), 2, replica=r, num_replicas=3, seed=4) for r in range(3)]
    assert replicas[0].num_micro_batches == 2
    epoch = [n for iterator in replicas for _ in range(2) for n in numbers_of(next(iterator))]
    assert len(set(epoch)) == 12


def test_epochs_differ_and_leave_out_others():
    iterator = BlockIterator(blocks_of(7), 2, seed=4)
    epochs = [[n for _ in range(3) for n in numbers_of(next(iterator))] for _ in range(12)]
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 12
    assert set().union(*epochs) == set(range(7))


def test_order_of_the_text_is_kept_without_shuffling():
    iterator = BlockIterator(blocks_of(5), 2, shuffle=False)
    assert [numbers_of(next(iterator)) for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]


@pytest.mark.parametrize("position", [0, 4, 5, 23])
def test_a_resumed_iterator_goes_on_as_an_undisturbed_one(position):
    def fresh():
        return BlockIterator(blocks_of(11), 2, replica=1, num_replicas=2, seed=6)

    undisturbed, resumed = fresh(), fresh()
    for _ in range(position):
        next(undisturbed)
    resumed.load_state_dict(undisturbed.state_dict())
    for (input_a, label_a), (input_b, label_b) in itertools.islice(zip(undisturbed, resumed, strict=True), 9):
        assert torch.equal(input_a, input_b)
        assert torch.equal(label_a, label_b)


@pytest.mark.bad_input
def test_a_position_in_other_data_is_refused():
    state = BlockIterator(blocks_of(11), 2, seed=6).state_dict()
    with pytest.raises(DataError, match="this run: seed was 6 and is 7"):
        BlockIterator(blocks_of(11), 3, seed=7).load_state_dict(state)


def test_unigram_perplexity_by_hand():
    train, validation = [np.array([0, 0]), np.array([0, 1])], torch.tensor([0, 2])
    # Counts plus one: 4, 2, 1, 1 of 8.
    expected = math.exp(-(math.log(4 / 8) + math.log(1 / 8)) / 2)
    assert unigram_perplexity(train, validation, vocab_size=4) == pytest.approx(expected, rel=1e-12)
