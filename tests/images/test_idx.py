"""IDX files: what is read, and every way in which one can be broken."""

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import idx, random_images, write_idx

from ds_interlock.errors import DataError
from ds_interlock.images import sources
from ds_interlock.images.sources import load_fashion_mnist

TRAIN, TEST = (random_images(num, (1, 5, 6), 10, seed=num) for num in (12, 7))
PIXELS = TRAIN.pixels_nchw[:, 0]


@pytest.mark.parametrize("zipped", [False, True])
def test_what_was_written_is_read(tmp_path: Path, zipped: bool):
    write_idx(tmp_path, TRAIN, TEST, zipped=zipped)
    data = load_fashion_mnist(tmp_path)
    for found, expected in ((data.train, TRAIN), (data.test, TEST)):
        assert torch.equal(found.pixels_nchw, expected.pixels_nchw)
        assert torch.equal(found.labels_n, expected.labels_n)
    assert data.num_classes == 10
    assert data.in_channels == 1


def test_without_a_folder_the_debian_package_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", tmp_path)
    with pytest.raises(DataError, match=r"apt-get install dataset-fashion-mnist, .* --data_dir"):
        load_fashion_mnist()
    write_idx(tmp_path, TRAIN, TEST, zipped=True)
    assert len(load_fashion_mnist().train) == 12


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    write_idx(tmp_path, TRAIN, TEST)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"there is no {name} or {name}.gz in {re.escape(str(tmp_path))}"):
        load_fashion_mnist(tmp_path)


ZIPPED = gzip.compress(idx(PIXELS), mtime=0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"\0\0\x08\x01" + idx(PIXELS)[4:], "its magic number is 0x00000801"),
        (b"\0\0\x0d\x03" + idx(PIXELS)[4:], "its magic number is 0x00000d03"),
        (b"", "requires a buffer of at least 16 bytes"),
        (idx(PIXELS)[:10], "requires a buffer of at least 16 bytes"),
        (idx(PIXELS)[:-1], r"cannot reshape array of size 359 into shape \(12,5,6\)"),
        (idx(PIXELS) + b"\0", "cannot reshape array of size 361"),
        (ZIPPED[:-9], "ended before the end-of-stream marker"),
        (ZIPPED[:8], "ended before the end-of-stream marker"),
        (ZIPPED[:-8] + bytes(8), "CRC check failed"),
        (ZIPPED[:10] + b"\xff" * 30, "invalid block type"),
    ],
    ids=["labels", "floats", "empty", "no sizes", "short", "long", "cut", "no header", "checksum", "noise"],
)
def test_a_broken_file_is_named_with_its_fault(tmp_path: Path, content: bytes, error: str):
    write_idx(tmp_path, TRAIN, TEST)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"is no IDX file .* 3 dimensions \(.*{error}") as raised:
        load_fashion_mnist(tmp_path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def remove_a_label(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(TEST.labels_n[:-1]))


def write_a_large_label(folder: Path) -> None:
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(TRAIN.labels_n + 1))


def write_other_sizes(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(TEST.pixels_nchw[:, 0, :, :5]))


def empty_the_test_set(folder: Path) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(TEST.pixels_nchw[:0, 0]))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(TEST.labels_n[:0]))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (remove_a_label, r"uint8 \[7, 1, 5, 6\] with labels torch.int64 \[6\]"),
        (write_a_large_label, "labels of the training images go from 1 to 10: expected 0 to 9"),
        (write_other_sizes, r"training images are \[1, 5, 6\] and test images \[1, 5, 5\]"),
        (empty_the_test_set, "no test images"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], error: str
):
    write_idx(tmp_path, TRAIN, TEST)
    damage(tmp_path)
    with pytest.raises(DataError, match=error):
        load_fashion_mnist(tmp_path)
