"""Rows and micro-batches: shapes, borders, and that the loss does not depend on how a batch is dealt out."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from encoded import samples_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import bert, letters
from transformers import LlamaConfig, LlamaForCausalLM

from ds_interlock.errors import DataError
from ds_interlock.heads.cross_entropy import cross_entropy_sum
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.hf.data.batches import BatchShape, EvaluationBatches, TrainingBatches
from ds_interlock.hf.data.rows import ClassifiedRows, PackedRows, PaddedRows, padding_id
from ds_interlock.hf.data.samples import Sample, encode_records
from ds_interlock.hf.data.sources import read_records
from ds_interlock.sampling import epoch_order

N = IGNORED_LABEL
VOCABULARY = 64


def sample_of(number, length, num_ignored=0):
    """A sample of its own token, with the first labels ignored."""
    labels = [N] * num_ignored + [number] * (length - num_ignored)
    return Sample([number] * length, labels)


def random_samples(num_samples, longest, seed=0):
    """Samples of random tokens; like prompts with completions, most ignore their first labels."""
    rng = random.Random(seed)
    samples = []
    for _ in range(num_samples):
        length = rng.randint(1, longest)
        tokens = [rng.randrange(VOCABULARY) for _ in range(length + 1)]
        num_ignored = rng.randrange(length)
        samples.append(Sample(tokens[:-1], [N] * num_ignored + tokens[1 + num_ignored :]))
    return samples


def of_one_label(micro_batches):
    """How often each label that counts is there."""
    counts = Counter()
    for _, (labels, _) in micro_batches:
        counts.update(labels[labels != N].tolist())
    return counts


# Rows


def test_padded_rows():
    rows = PaddedRows([sample_of(1, 3, 1), sample_of(2, 9), sample_of(3, 19)], seq_length=20, pad_id=7)
    (ids, mask), labels = rows.stack([(0,), ()])
    assert rows.names == ("input_ids", "attention_mask")
    assert ids.tolist() == [[1, 1, 1, 7, 7, 7, 7, 7], [7] * 8]
    # A row without tokens keeps one that may be looked at.
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert labels.tolist() == [[N, 1, 1, N, N, N, N, N], [N] * 8]
    assert {tensor.dtype for tensor in (ids, mask, labels)} == {torch.int64}
    # Rounded up to a multiple of 8, but not beyond seq_length.
    assert [rows.stack([(number,)])[1].shape[1] for number in range(3)] == [8, 16, 20]


def test_packed_rows():
    rows = PackedRows([sample_of(1, 3), sample_of(2, 2), sample_of(3, 6)], seq_length=8, pad_id=7)
    (ids, positions), labels = rows.stack([(0, 1), (2,), ()])
    assert rows.names == ("input_ids", "position_ids")
    assert ids.tolist() == [[1, 1, 1, 2, 2, 7, 7, 7], [3] * 6 + [7, 7], [7] * 8]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 1], list(range(8))]
    assert labels.tolist() == [[1, 1, 1, 2, 2, N, N, N], [3] * 6 + [N, N], [N] * 8]
    assert {tensor.dtype for tensor in (ids, positions, labels)} == {torch.int64}
    # The fullest row that has room is taken.
    assert list(rows.arrange(np.array([0, 2, 1]))) == [(0,), (2, 1)]


@pytest.mark.bad_input
def test_samples_longer_than_a_row_are_refused():
    with pytest.raises(DataError, match="has 5 positions: expected at most 4"):
        PaddedRows([sample_of(1, 5)], seq_length=4)


def test_classified_rows():
    samples = [Sample([5, 6, 7], [2], [0, 0, 1]), Sample([5], [0], [0])]
    rows = ClassifiedRows(samples, seq_length=10, pad_id=9)
    (ids, mask, types), labels = rows.stack([(0,), (1,), ()])
    assert rows.names == ("input_ids", "attention_mask", "token_type_ids")
    assert ids.tolist() == [[5, 6, 7, 9, 9, 9, 9, 9], [5] + [9] * 7, [9] * 8]
    assert (mask.sum(1).tolist(), types.sum(1).tolist()) == ([3, 1, 1], [1, 0, 0])
    assert labels.tolist() == [2, 0, N]
    without = ClassifiedRows([Sample([5], [0])], seq_length=8)
    assert without.names == ("input_ids", "attention_mask")
    assert len(without.stack([(0,)])[0]) == 2


def test_padding_ids():
    assert padding_id(bert(), VOCABULARY) == 0
    assert padding_id(letters(), VOCABULARY) == 1  # the end
    assert padding_id(letters(eos_token=None), VOCABULARY) == 0
    added = letters(pad_token="[pad]")
    assert padding_id(added, len(added)) == added.pad_token_id > 1
    assert padding_id(added, added.pad_token_id) == 1  # added after the model was trained
    assert padding_id(added, 1) == 0


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    extra=st.integers(0, 8),
    seed=st.integers(0, 3),
)
def test_packing(lengths, extra, seed):
    seq_length = max(lengths) + extra
    samples = [sample_of(number, length) for number, length in enumerate(lengths)]
    rows = PackedRows(samples, seq_length, pad_id=99)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).numpy()
    arranged = rows.arrange(order)
    assert sorted(itertools.chain.from_iterable(arranged)) == list(range(len(samples)))
    assert rows.fewest <= len(arranged) <= len(samples)
    assert all(sum(lengths[number] for number in row) <= seq_length for row in arranged)
    (ids, positions), labels = rows.stack(arranged)
    # A sample is made of its own number: where that changes, positions begin anew, and only there.
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    assert torch.equal(positions == 0, starts)
    steps = positions[:, 1:] - positions[:, :-1]
    assert bool(((steps == 1) | starts[:, 1:]).all())
    # No label is another sample's, and none belongs to padding.
    assert torch.equal(labels, torch.where(ids == 99, N, ids))


def test_packing_wastes_little():
    samples = random_samples(2000, longest=60)
    num_rows = len(PackedRows(samples, 64).arrange(np.arange(2000)))
    assert num_rows < 1.05 * sum(len(sample.ids) for sample in samples) / 64


# Batches

SHAPES = [BatchShape(1, 8), BatchShape(2, 4), BatchShape(4, 2), BatchShape(8, 1), BatchShape(2, 2, 2)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double().eval()


def rows_of_epoch(rows, epoch=0, seed=0):
    """All rows of an epoch, in order; the last ones may fill no batch."""
    return rows.arrange(epoch_order(len(rows.samples), seed, epoch).numpy())


def replicas_of(kind, rows, shape):
    return [kind(rows, shape, replica=replica) for replica in range(shape.num_replicas)]


def loss_of(model, names, micro_batch):
    inputs, (labels, normaliser) = micro_batch
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    logits = model(**dict(zip(names, inputs, strict=True)), use_cache=False).logits
    return cross_entropy_sum(logits.flatten(0, 1), labels.flatten()) / normaliser.double()


def gradient_of(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def batch_loss(model, rows, shape):
    """What DeepSpeed makes of one training batch: the mean over micro-batches and replicas."""
    losses = [
        loss_of(model, rows.names, micro_batch)
        for replica in replicas_of(TrainingBatches, rows, shape)
        for micro_batch in itertools.islice(replica, shape.num_micro_batches)
    ]
    assert len(losses) == shape.num_micro_batches * shape.num_replicas
    return torch.stack(losses).mean()


def token_mean(model, samples):
    """The mean over all labels of all samples, each by itself."""
    total = sum(
        cross_entropy_sum(model(torch.tensor([s.ids]), use_cache=False).logits[0], torch.tensor(s.labels))
        for s in samples
    )
    return total / sum(sample.num_labels for sample in samples)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_do_not_depend_on_how_a_batch_is_distributed(shape, model):
    samples = random_samples(8, longest=20)
    expected = token_mean(model, samples)
    loss = batch_loss(model, PaddedRows(samples, 20), shape)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient_of(model, loss), gradient_of(model, expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_samples_do_not_see_each_other(shape, model):
    samples = random_samples(8 * 4, longest=20, seed=1)
    rows = PackedRows(samples, 48)
    chosen = rows_of_epoch(rows)[: shape.num_rows]
    assert max(map(len, chosen)) > 1
    expected = token_mean(model, [samples[number] for row in chosen for number in row])
    loss = batch_loss(model, rows, shape)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient_of(model, loss), gradient_of(model, expected), rtol=1e-6, atol=1e-9)


def test_every_label_of_a_batch_weighs_the_same():
    samples = random_samples(8, longest=20)
    num_labels = sum(sample.num_labels for sample in samples)
    for shape in SHAPES:
        for replica in replicas_of(TrainingBatches, PaddedRows(samples, 20), shape):
            for _, (_, normaliser) in itertools.islice(replica, shape.num_micro_batches):
                assert (normaliser.dtype, normaliser.shape) == (torch.float32, (1,))
                weight = 1 / (normaliser.item() * shape.num_micro_batches * shape.num_replicas)
                assert weight == pytest.approx(1 / num_labels)


@pytest.mark.parametrize("shape", [*SHAPES, BatchShape(3, 2, 3)], ids=str)
@pytest.mark.parametrize(("kind", "num_samples"), [(PaddedRows, 11), (PaddedRows, 16), (PackedRows, 11)])
def test_evaluation_is_the_mean_over_all_labels(kind, num_samples, shape, model):
    samples = random_samples(num_samples, longest=20, seed=2)
    rows = kind(samples, 20)
    replicas = replicas_of(EvaluationBatches, rows, shape)
    with torch.no_grad():
        losses = [loss_of(model, rows.names, m) for replica in replicas for m in replica]
        expected = token_mean(model, samples).item()
    num_batches = -(-len(rows.arrange(np.arange(num_samples))) // shape.num_rows)
    assert {replica.num_batches for replica in replicas} == {num_batches}
    assert len(losses) == num_batches * shape.num_micro_batches * shape.num_replicas
    assert torch.stack(losses).mean().item() == pytest.approx(expected, rel=1e-6)


def test_evaluation_can_be_done_again():
    data = EvaluationBatches(PaddedRows([sample_of(n, 2) for n in range(5)], 8), BatchShape(2, 1))
    assert of_one_label(data) == of_one_label(data) == dict.fromkeys(range(5), 2)
    with pytest.raises(DataError, match="no validation sample"):
        EvaluationBatches(PaddedRows([], 8), BatchShape(2, 1))


def test_classified_batches_average_over_samples():
    samples = [Sample([5], [number]) for number in range(5)]
    rows = ClassifiedRows(samples, 8)
    (_, (labels, normaliser)) = next(TrainingBatches(rows, BatchShape(2, 2)))
    assert (labels.shape, normaliser.tolist()) == ((2,), [2.0])
    data = list(EvaluationBatches(rows, BatchShape(2, 2)))
    assert sorted(itertools.chain.from_iterable(m[1][0].tolist() for m in data)) == [N, N, N, 0, 1, 2, 3, 4]
    assert {normaliser.item() for _, (_, normaliser) in data} == {5 / 4}


def test_a_batch_without_labels_can_be_divided_by():
    rows = PaddedRows([Sample([1], [N])] * 2, 8)
    assert next(TrainingBatches(rows, BatchShape(1, 2)))[1][1].item() > 0


def test_replicas_share_an_epoch_and_epochs_leave_out_others():
    rows = PaddedRows([sample_of(n, 1) for n in range(11)], 8)
    replicas = replicas_of(TrainingBatches, rows, BatchShape(1, 2, 2))
    epochs = [of_one_label(m for replica in replicas for m in itertools.islice(replica, 4)) for _ in range(9)]
    assert all(set(epoch.values()) == {1} and len(epoch) == 8 for epoch in epochs)
    assert len({frozenset(epoch) for epoch in epochs}) > 5
    assert set().union(*epochs) == set(range(11))


def test_packing_is_done_anew_in_each_epoch():
    rows = PackedRows(random_samples(36, longest=20), 24)
    epochs = [rows_of_epoch(rows, epoch, seed=5) for epoch in range(12)]
    assert len({frozenset(epoch) for epoch in epochs}) == 12
    assert len({len(epoch) // 6 for epoch in epochs}) > 1, "choose samples whose epochs differ in batches"
    data = TrainingBatches(rows, BatchShape(2, 3), seed=5)
    for epoch in epochs:
        for start in range(0, len(epoch) // 6 * 6, 2):
            (ids, _), (labels, _) = next(data)
            (expected_ids, _), expected_labels = rows.stack(epoch[start : start + 2])
            assert torch.equal(ids, expected_ids)
            assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("position", [0, 1, 7, 40, 111])
@pytest.mark.parametrize("kind", [PaddedRows, PackedRows])
def test_a_resumed_iterator_goes_on_as_an_undisturbed_one(kind, position):
    def fresh():
        rows = kind(random_samples(37, longest=20), 24)
        return TrainingBatches(rows, BatchShape(2, 2, 2), replica=1, seed=6)

    undisturbed, resumed = fresh(), fresh()
    for _ in range(position):
        next(undisturbed)
    for _ in range(25):
        next(resumed)  # a checkpoint may also be of an earlier position
    resumed.load_state_dict(undisturbed.state_dict())
    for _ in range(9):
        (inputs_a, labels_a), (inputs_b, labels_b) = next(undisturbed), next(resumed)
        assert all(map(torch.equal, (*inputs_a, *labels_a), (*inputs_b, *labels_b)))


@pytest.mark.bad_input
def test_a_position_in_other_data_is_refused():
    samples = random_samples(20, longest=10)
    state = TrainingBatches(PaddedRows(samples, 16), BatchShape(2, 2)).state_dict()
    other = TrainingBatches(PackedRows(samples, 16), BatchShape(1, 2), seed=1)
    with pytest.raises(
        DataError,
        match=r"inputs was input_ids, attention_mask and is .*, seed was 0 and is 1",
    ):
        other.load_state_dict(state)


def test_other_sizes_continue_after_as_many_rows():
    """In other micro-batches of as many rows a batch, they are the same rows."""
    samples = random_samples(37, longest=20)
    one = TrainingBatches(PaddedRows(samples, 24), BatchShape(2, 4, 1), seed=6)
    others = [
        TrainingBatches(PaddedRows(samples, 24), BatchShape(1, 4, 2), replica=r, seed=6) for r in (0, 1)
    ]
    for _ in range(12 + 4 * 6):  # in a later epoch
        next(one)
    for other in others:
        other.load_state_dict(one.state_dict())
    for _ in range(4):
        ids = next(one)[0][0]
        for row, other in enumerate(others):
            part = next(other)[0][0]  # padded to its own length
            assert torch.equal(ids[row : row + 1, : part.shape[1]], part)


@pytest.mark.parametrize("shape", [(2, 3), (2, 8), (3, 4), (1, 5)])
def test_a_batch_of_another_size_is_the_mean_over_its_labels_too(shape):
    rows = PaddedRows(random_samples(37, longest=20), 24)
    before, after = (TrainingBatches(rows, BatchShape(*sizes), seed=6) for sizes in ((2, 4), shape))
    for _ in range(4 * 7):
        next(before)
    after.load_state_dict(before.state_dict())
    for _ in range(6):
        micro_batches = [next(after)[1] for _ in range(shape[1])]
        weights = [(labels != -100).sum() / normaliser for labels, normaliser in micro_batches]
        assert sum(weights).item() == pytest.approx(shape[1])


@pytest.mark.bad_input
def test_too_few_samples_for_a_batch():
    message = (
        r"11 training samples may fill as few as 11 rows of 8 positions, and one batch takes 12 "
        r"\(train_micro_batch_size_per_gpu 2 x gradient_accumulation_steps 3 x 2 replicas\)"
    )
    with pytest.raises(DataError, match=message):
        TrainingBatches(PaddedRows([sample_of(1, 2)] * 11, 8), BatchShape(2, 3, 2))
    with pytest.raises(DataError, match="as few as 3 rows"):
        TrainingBatches(PackedRows([sample_of(1, 2)] * 11, 8), BatchShape(4, 1))
    # Two that are longer than half a row cannot share it.
    next(TrainingBatches(PackedRows([sample_of(1, 5)] * 4, 8), BatchShape(4, 1)))


# A large file


@pytest.fixture(scope="module")
def ten_thousand_samples(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    with path.open("w") as file:
        for _ in range(10_000):
            text = "".join(rng.choices("abcdefghij \n", k=rng.randint(1, 90)))
            file.write(json.dumps({"text": "a" + text}) + "\n")
    return samples_of(encode_records(read_records([str(path)]), letters(), 64))


@pytest.mark.parametrize("kind", [PaddedRows, PackedRows])
def test_ten_thousand_lines_of_mixed_length(kind, ten_thousand_samples):
    rows = kind(ten_thousand_samples, 64, pad_id=1)
    shape = BatchShape(8, 4)
    epoch = rows_of_epoch(rows)
    num_batches = len(epoch) // shape.num_rows
    seen = Counter()
    for inputs, (labels, _) in itertools.islice(TrainingBatches(rows, shape), 4 * num_batches):
        assert {tensor.shape for tensor in inputs} == {labels.shape}
        assert labels.shape[0] == 8
        assert labels.shape[1] <= 64
        assert labels.shape[1] % 8 == 0
        seen.update(labels[labels != N].tolist())
    expected = Counter(label for sample in ten_thousand_samples for label in sample.labels)
    for number in itertools.chain.from_iterable(epoch[num_batches * shape.num_rows :]):
        expected.subtract(ten_thousand_samples[number].labels)
    assert seen == expected
