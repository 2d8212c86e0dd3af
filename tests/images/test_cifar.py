"""CIFAR from a folder: both forms of both data sets, and files that are something else."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import random_images, write_cifar

from ds_interlock.errors import DataError
from ds_interlock.images.cifar import CIFAR10, CIFAR100, CifarForm, load_cifar

PIXELS = np.zeros((2, 3072), dtype=np.uint8)


@pytest.mark.parametrize("form", [CIFAR10, CIFAR100], ids=["10", "100"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("in_subfolder", [False, True])
def test_what_was_written_is_read(tmp_path: Path, form: CifarForm, binary: bool, in_subfolder: bool):
    train, test = (random_images(num, (3, 32, 32), form.num_classes, seed=num) for num in (110, 5))
    folder = tmp_path / form.subfolders[binary] if in_subfolder else tmp_path
    write_cifar(folder, form, train, test, binary=binary)
    data = load_cifar(form, tmp_path)
    for found, expected in ((data.train, train), (data.test, test)):
        assert torch.equal(found.pixels_nchw, expected.pixels_nchw)
        assert torch.equal(found.labels_n, expected.labels_n)
    assert data.num_classes == form.num_classes


def test_a_missing_file_is_named_with_both_its_names(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"no data_batch_1 \(python version\) or data_batch_1.bin .*--data_dir"
    ):
        load_cifar(CIFAR10, tmp_path)


class Harm:
    """A pickle of it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path):
    harm = tmp_path / "harm"
    (tmp_path / "train").write_bytes(pickle.dumps(Harm(harm)))
    with pytest.raises(DataError, match=r"it names posix.mkdir, which is no part of an array"):
        load_cifar(CIFAR100, tmp_path)
    assert not harm.exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"not a pickle", "is no file of the python version of CIFAR-100"),
        (pickle.dumps({b"data": PIXELS})[:40], "is no file of the python version of CIFAR-100"),
        (pickle.dumps([1, 2]), '"fine_labels" in .* is no list of class numbers'),
        (pickle.dumps({b"data": PIXELS, b"labels": [1, 2]}), '"fine_labels" in .* is no list'),
        (pickle.dumps({b"data": PIXELS, b"fine_labels": ["a", "b"]}), "is no list of class numbers"),
        (pickle.dumps({b"fine_labels": [1, 2]}), r'"data" in .* has shape \[\]'),
        (
            pickle.dumps({b"data": PIXELS[:, :9], b"fine_labels": [1, 2]}),
            r"shape \[2, 9\]: .*\[images, 3072\]",
        ),
        (pickle.dumps({b"data": PIXELS, b"fine_labels": [1]}), "the labels of 2 images are"),
    ],
)
def test_a_wrong_pickle_is_named_with_its_fault(tmp_path: Path, content: bytes, error: str):
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(DataError, match=error):
        load_cifar(CIFAR100, tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 3073])
def test_a_binary_file_of_another_size_is_refused(tmp_path: Path, num_bytes: int):
    (tmp_path / "train.bin").write_bytes(bytes(num_bytes))
    with pytest.raises(DataError, match=f"train.bin has {num_bytes} bytes: expected a multiple of 3074"):
        load_cifar(CIFAR100, tmp_path)
