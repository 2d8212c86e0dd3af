"""Micro-batches of images: order, crops and flips, normalisation, and that nothing is counted twice."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from image_files import evaluate, random_images
from torch import Tensor, nn

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.images.batches import (
    PADDING,
    CropsAndFlips,
    ImageIterator,
    evaluation_batches,
    num_evaluation_batches,
)
from ds_interlock.images.data import Images, Normalisation, Score

IMAGES = random_images(23, (3, 10, 12), 23)  # every label is another one
AS_THEY_ARE = Normalisation(torch.zeros(3), torch.ones(3))


def iterator(**options: object) -> ImageIterator:
    return ImageIterator(IMAGES, AS_THEY_ARE, 4, **{"seed": 3, **options})  # type: ignore[arg-type]


def take(source: ImageIterator, num: int) -> list[tuple[Tensor, Tensor]]:
    return list(itertools.islice(source, num))


def assert_equal(found: list[tuple[Tensor, Tensor]], expected: list[tuple[Tensor, Tensor]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_channels_are_normalised_to_mean_0_and_deviation_1():
    normalisation = Normalisation.of(IMAGES)
    images = normalisation(IMAGES.pixels_nchw)
    assert images.dtype is torch.float32
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3))


def test_channels_of_one_value_stay_finite():
    black = Images(torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert not Normalisation.of(black)(black.pixels_nchw).any()


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    source = iterator(augment=False)
    assert source.num_micro_batches == 5
    epochs = [torch.cat([labels for _, labels in take(source, 5)]) for _ in range(3)]
    assert all(len(set(epoch.tolist())) == 20 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert len(set(torch.cat(epochs).tolist())) == 23  # others are left out in each epoch


def test_images_keep_their_labels_and_are_normalised():
    normalisation = Normalisation.of(IMAGES)
    for images, labels in take(ImageIterator(IMAGES, normalisation, 4, augment=False), 7):
        assert torch.equal(images, normalisation(IMAGES.pixels_nchw[labels]))


def test_two_runs_are_the_same_and_two_seeds_are_not():
    assert_equal(take(iterator(), 12), take(iterator(), 12))
    (images, labels), (other_images, other_labels) = next(iterator()), next(iterator(seed=4))
    assert not torch.equal(labels, other_labels)
    assert not torch.equal(images, other_images)


def test_replicas_share_an_epoch_and_see_images_as_one_replica_would():
    replicas = [take(iterator(replica=number, num_replicas=2), 2) for number in range(2)]
    assert_equal([replicas[0][0], replicas[1][0], replicas[0][1], replicas[1][1]], take(iterator(), 4))


def test_a_resumed_iterator_goes_on_with_the_same_images():
    undisturbed = iterator()
    take(undisturbed, 8)
    state = undisturbed.state_dict()
    resumed = iterator()
    resumed.load_state_dict(state)
    assert_equal(take(resumed, 6), take(undisturbed, 6))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (iterator(seed=4), "seed was 3 and is 4"),
        (iterator(augment=False), "augment was 1 and is 0"),
        (ImageIterator(random_images(23, (3, 10, 12), 23, seed=9), AS_THEY_ARE, 4, seed=3), "pixel_sum was"),
    ],
)
def test_a_position_in_other_data_is_refused(other: ImageIterator, named: str):
    with pytest.raises(DataError, match=named):
        other.load_state_dict(iterator().state_dict())


@pytest.mark.bad_input
def test_too_few_images_are_refused():
    with pytest.raises(DataError, match=r"there are 23 training images, .*micro-batch of 8 for each of 3"):
        ImageIterator(IMAGES, AS_THEY_ARE, 8, num_replicas=3)


def test_crops_and_flips_are_what_a_loop_would_make_of_them():
    draws = CropsAndFlips.draw(len(IMAGES), seed=3, epoch=2)
    numbers = torch.tensor([5, 0, 22, 5])
    found = draws.apply(IMAGES.pixels_nchw[numbers], numbers)
    for image, number in zip(found, numbers.tolist(), strict=True):
        top, left = int(draws.top_n[number]), int(draws.left_n[number])
        padded = F.pad(IMAGES.pixels_nchw[number], (PADDING,) * 4)
        expected = padded[:, top : top + 10, left : left + 12]
        assert torch.equal(image, expected.flip(-1) if draws.flip_n[number] else expected)


def test_draws_use_all_places_evenly():
    draws = CropsAndFlips.draw(20_000, seed=0, epoch=0)
    for places in (draws.top_n, draws.left_n):
        counts = torch.bincount(places)
        assert len(counts) == 9
        assert counts.min() > 0.9 * 20_000 / 9
    assert draws.flip_n.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([draws.top_n, draws.left_n]).double())[0, 1]) < 0.03
    other = CropsAndFlips.draw(20_000, seed=0, epoch=1)
    assert (draws.top_n == other.top_n).float().mean() < 0.15


@pytest.mark.parametrize(("size", "num_replicas"), [(4, 1), (4, 2), (23, 1), (5, 3), (40, 1)])
def test_an_evaluation_has_every_image_once(size: int, num_replicas: int):
    replicas = [
        list(evaluation_batches(IMAGES, AS_THEY_ARE, size, replica=replica, num_replicas=num_replicas))
        for replica in range(num_replicas)
    ]
    lengths = {len(batches) for batches in replicas}
    assert lengths == {num_evaluation_batches(23, size, num_replicas)}
    assert all(len(images) == size for batches in replicas for images, _ in batches)
    images, labels = (torch.cat(parts) for parts in zip(*itertools.chain(*replicas), strict=True))
    counted = labels != IGNORED_LABEL
    assert sorted(labels[counted].tolist()) == list(range(23))
    assert torch.equal(images[counted], IMAGES.pixels_nchw[labels[counted]].float())


class ByFirstPixel(nn.Module):
    """Says that the class is the first pixel's value modulo 23; in training, that it is class 0."""

    def forward(self, images_bchw: Tensor) -> Tensor:
        classes = images_bchw[:, 0, 0, 0].long() % 23
        return 3.0 * F.one_hot(classes * (not self.training), 23)


def test_errors_are_counted_one_by_one():
    model = ByFirstPixel()
    said = IMAGES.pixels_nchw[:, 0, 0, 0].long() % 23
    wrong = int((said != IMAGES.labels_n).sum())
    assert 0 < wrong <= 23
    score = evaluate(model, evaluation_batches(IMAGES, AS_THEY_ARE, 5))
    assert (score.num_images, score.num_errors) == (23, wrong)
    assert score.error == wrong / 23
    loss = F.cross_entropy(3.0 * F.one_hot(said, 23), IMAGES.labels_n)
    assert score.loss == pytest.approx(loss.item(), rel=1e-6)


def test_ignored_labels_do_not_count():
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    score = Score.of(logits, torch.tensor([0, 1, IGNORED_LABEL]))
    assert (score.num_images, score.num_errors) == (2, 1)
    assert Score.of(logits, torch.full((3,), IGNORED_LABEL)) == Score()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("pixels", "labels", "error"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), r"torch.float32 \[2, 1, 3, 3\]"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"uint8 \[2, 3, 3\]"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), "with labels torch.float32"),
    ],
)
def test_other_types_and_shapes_are_refused(pixels: Tensor, labels: Tensor, error: str):
    with pytest.raises(DataError, match=error):
        Images(pixels, labels)


def test_the_first_images_are_a_smaller_data_set():
    assert torch.equal(IMAGES.first(5).labels_n, torch.arange(5))
    assert len(IMAGES.first(100)) == len(IMAGES.first(0)) == 23
    assert torch.equal(IMAGES.to("cpu").pixels_nchw, IMAGES.pixels_nchw)
