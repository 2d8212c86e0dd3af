"""What each position of a sample is to say: by hand on a tokenizer of letters."""

import numpy as np
import pytest
from encoded import samples_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import bert, byte_level, letters

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.hf.data.records import Classified, Completion, Document
from ds_interlock.hf.data.rows import PackedRows
from ds_interlock.hf.data.samples import (
    Sample,
    encode_classified,
    encode_records,
    encode_wrapped,
)
from ds_interlock.hf.data.tokenised import Samples

START, END, A, B, C, D = 0, 1, 3, 4, 5, 6  # ids of ``letters``
N = IGNORED_LABEL
LETTERS = letters()


def documents(*texts):
    return [Document(text, f"document {number}") for number, text in enumerate(texts)]


def completions(*pairs):
    return [Completion(*pair, f"line {number}") for number, pair in enumerate(pairs)]


def test_a_document_is_learned_whole_and_ends():
    samples = samples_of(encode_records(documents("ab", "c"), LETTERS, 8))
    assert samples == [Sample([START, A, B], [A, B, END]), Sample([START, C], [C, END])]


def test_a_long_document_is_cut_into_pieces():
    (first, second) = samples_of(encode_records(documents("abcd"), LETTERS, 3))
    assert first == Sample([START, A, B], [A, B, C])
    assert second == Sample([C, D], [D, END])
    # Seq_length + 1 tokens are one piece.
    assert samples_of(encode_records(documents("ab"), LETTERS, 3)) == [Sample([START, A, B], [A, B, END])]


TEXTS = st.text("abcd \n", max_size=30).map(lambda text: text + "a")


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5), st.integers(1, 12))
def test_every_token_of_a_document_but_the_first_is_a_label_once(texts, seq_length):
    samples = samples_of(encode_records(documents(*texts), LETTERS, seq_length))
    labels = [label for sample in samples for label in sample.labels]
    assert labels == [token for text in texts for token in [*LETTERS(text)["input_ids"][1:], END]]
    assert max(len(sample.ids) for sample in samples) <= seq_length
    assert all(sample.ids[1:] == sample.labels[:-1] for sample in samples)


def test_special_tokens_are_not_doubled():
    assert samples_of(encode_records(documents("<s>a</s>"), LETTERS, 8)) == [Sample([START, A], [A, END])]
    (sample,) = samples_of(encode_records(completions(("<s>a", "b</s>")), LETTERS, 8))
    assert sample == Sample([START, A, B], [N, B, END])


def test_only_the_completion_is_learned_and_its_end():
    (sample,) = samples_of(encode_records(completions(("ab", "cd")), LETTERS, 8))
    assert sample == Sample([START, A, B, C, D], [N, N, C, D, END])
    assert sample.num_labels == 3


def test_prompt_and_completion_are_one_text():
    tokenizer = byte_level()
    (sample,) = samples_of(encode_records(completions(("hello ", "there")), tokenizer, 20))
    assert tokenizer.decode([*sample.ids, sample.labels[-1]]) == "hello there<|endoftext|>"
    assert tokenizer.decode([x for x in sample.labels if x != N]) == " there<|endoftext|>"


def test_long_prompts_are_cut_and_dropped_if_nothing_is_left():
    encoded = list(encode_records(completions(("ab", "cd"), ("abcd", "a"), ("a", "b")), LETTERS, 3))
    kept = [Sample([START, A, B], [N, N, C])], [], [Sample([START, A, B], [N, B, END])]
    assert [one.samples for one in encoded] == list(kept)
    assert [one.was_cut for one in encoded] == [True, True, False]


def test_records_of_different_kinds_keep_their_order():
    records = [*documents("a"), *completions(("b", "c")), *documents("d")]
    samples = samples_of(encode_records(records, LETTERS, 8))
    assert [sample.ids[1] for sample in samples] == [A, B, D]


def test_more_records_than_are_tokenised_together():
    samples = samples_of(encode_records(documents(*(["a", "bb", "ccc"] * 700)), LETTERS, 8))
    assert [len(sample.ids) for sample in samples] == [2, 3, 4] * 700


@pytest.mark.bad_input
def test_a_tokenizer_must_know_an_end():
    with pytest.raises(DataError, match="neither an eos_token nor a sep_token"):
        list(encode_records(documents("a"), letters(eos_token=None), 8))
    assert samples_of(encode_records(documents("a"), letters(eos_token=None, sep_token="b"), 8))[
        0
    ].labels == [
        A,
        B,
    ]


@pytest.mark.bad_input
def test_classified_texts_cannot_train_a_language_model():
    with pytest.raises(DataError, match="line 0: a classified text"):
        list(encode_records([Classified("a", None, 1, "line 0")], LETTERS, 8))


def test_classified_texts_and_pairs():
    records = [Classified("w0 w1", None, "no", "line 0"), Classified("w0", "w1 w2", "yes", "line 1")]
    samples = samples_of(encode_classified(records, bert(), 8, {"no": 0, "yes": 1}))
    assert samples == [
        Sample([2, 4, 5, 3], [0], [0, 0, 0, 0]),
        Sample([2, 4, 3, 5, 6, 3], [1], [0, 0, 0, 1, 1, 1]),
    ]
    data = list(encode_classified(records, bert(pair=False), 5, {"no": 0, "yes": 1}))
    assert data[1].samples[0] == Sample([2, 4, 3, 5, 3], [1])
    assert [one.was_cut for one in data] == [False, True]


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=5), st.integers(1, 12))
def test_wrapped_texts_fill_blocks_and_stay_apart(texts, seq_length):
    records = [*documents(*texts), *completions(("ab", "cd"))]
    *none, last = encode_wrapped(records, LETTERS, seq_length)
    assert [one.samples for one in none] == [[]] * len(texts)
    blocks = last.samples
    whole = [sample for one in encode_records(records, LETTERS, 1000) for sample in one.samples]
    labels = [label for sample in whole for label in sample.labels if label != N]
    assert [label for block in blocks for label in block.labels if label != N] == labels
    for block in blocks:
        assert sum(block.segments) == len(block.ids) == len(block.labels) <= seq_length
        assert all(label in (N, token) for label, token in zip(block.labels, block.ids[1:], strict=False))
        ends = np.cumsum(block.segments)[:-1]
        # A text begins with the start token, and what comes before it does not predict that.
        assert all(block.ids[end] == START and block.labels[end - 1] == N for end in ends)
    assert list(Samples.of(blocks)) == blocks
    (_, positions), _ = PackedRows(blocks, seq_length).stack([(0,)])
    assert (positions == 0).sum() == len(blocks[0].segments) + (len(blocks[0].ids) < seq_length)
