"""Data sets by name, among them those that ``datasets`` loads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from image_files import random_images, write_idx

from ds_interlock.errors import DataError
from ds_interlock.images.data import Images
from ds_interlock.images.sources import load_images


def write_hub(
    folder: Path, splits: dict[str, Images], image: str = "img", label: str = "label", **columns: Any
) -> str:
    """A data set as a hub has it, in a folder."""
    folder.mkdir()
    for name, images in splits.items():
        pictures = [pixels.permute(1, 2, 0).squeeze(-1).numpy() for pixels in images.pixels_nchw]
        content = {image: pictures, label: images.labels_n.tolist()}
        features = Features({image: Image(), label: Value("int64")})
        Dataset.from_dict(content, features).to_parquet(folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize(("channels", "label"), [(1, "label"), (3, "fine_label")])
def test_a_hubs_images_are_read(tmp_path: Path, channels: int, label: str):
    train, test = (random_images(num, (channels, 8, 6), 3, seed=num) for num in (9, 4))
    name = write_hub(tmp_path / "hub", {"train": train, "test": test}, label=label)
    data = load_images(name)
    for found, expected in ((data.train, train), (data.test, test)):
        assert torch.equal(found.pixels_nchw, expected.pixels_nchw)
        assert torch.equal(found.labels_n, expected.labels_n)
    assert data.num_classes == 3


def test_validation_images_stand_in_for_test_images(tmp_path: Path):
    train, validation = (random_images(num, (1, 8, 8), 3) for num in (9, 4))
    name = write_hub(tmp_path / "hub", {"train": train, "validation": validation}, image="image")
    assert len(load_images(name).test) == 4


@pytest.mark.bad_input
def test_a_data_set_without_test_images_is_refused(tmp_path: Path):
    name = write_hub(tmp_path / "hub", {"train": random_images(9, (1, 8, 8), 3)})
    with pytest.raises(DataError, match=r"has the splits \['train'\]: expected one named \"test\""):
        load_images(name)


@pytest.mark.bad_input
def test_other_columns_are_refused(tmp_path: Path):
    images = random_images(3, (1, 8, 8), 3)
    name = write_hub(tmp_path / "hub", {"train": images, "test": images}, image="photo")
    with pytest.raises(DataError, match=r"columns \['photo', 'label'\]: expected one of image, img, and"):
        load_images(name)


def write_rows(folder: Path, **columns: Any) -> str:
    folder.mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(columns).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.bad_input
def test_labels_that_are_names_are_refused(tmp_path: Path):
    name = write_rows(tmp_path / "hub", image=[[1]], label=["cat"])
    with pytest.raises(DataError, match="labels that are not class numbers, as 'cat'"):
        load_images(name)


@pytest.mark.bad_input
def test_columns_without_pictures_are_refused(tmp_path: Path):
    name = write_rows(tmp_path / "hub", image=[[1]], label=[0])
    with pytest.raises(DataError, match="has a list for a picture"):
        load_images(name)


@pytest.mark.bad_input
def test_images_of_two_sizes_are_refused(tmp_path: Path):
    pictures = [np.zeros((8, 8), np.uint8), np.zeros((8, 6), np.uint8)]
    folder = tmp_path / "hub"
    folder.mkdir()
    features = Features({"image": Image(), "label": Value("int64")})
    for split in ("train", "test"):
        rows = Dataset.from_dict({"image": pictures, "label": [0, 1]}, features)
        rows.to_parquet(folder / f"{split}.parquet")
    with pytest.raises(DataError, match=r"images of 2 sizes, as \[\(1, 8, 6\), \(1, 8, 8\)\]"):
        load_images(str(folder))


def test_names_of_published_data_sets_mean_their_files(tmp_path: Path):
    train, test = (random_images(num, (3, 32, 32), 100, seed=num) for num in (110, 5))
    name = write_hub(tmp_path / "cifar", {"train": train, "test": test}, label="fine_label")
    assert load_images("cifar100", Path(name)).num_classes == 100
    grey = random_images(4, (1, 8, 8), 10)
    write_idx(tmp_path / "idx", grey, grey)
    assert len(load_images("fashion-mnist", tmp_path / "idx").train) == 4


def test_cifar_without_a_folder_is_the_hubs(monkeypatch: pytest.MonkeyPatch):
    def refuse(name: str, config: str | None, **_: object):
        raise OSError(f"no {name}")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match="uoft-cs/cifar10"):
        load_images("cifar10")
