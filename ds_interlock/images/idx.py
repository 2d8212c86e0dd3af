"""IDX files, as MNIST and Fashion-MNIST come in: a header, then bytes.

    0  0  type  dimensions     type 8: unsigned bytes; dimensions: 3 for images, 1 for labels
    size of each dimension     4 bytes each, the highest first
    the bytes                  the last dimension varies fastest

Source: LeCun, Cortes, Burges: The MNIST database of handwritten digits, "File formats".
"""

import gzip
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.images.data import ImageData, Images

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist installs its files."""

_UNSIGNED_BYTES = 8
_GZIP_MAGIC = b"\x1f\x8b"
_NUM_CLASSES = 10


def load_fashion_mnist(folder: Path | None = None) -> ImageData:
    """Fashion-MNIST, or any data set of ten classes in files of the same names (MNIST).

    Args:
        folder: Where ``train-images-idx3-ubyte`` and the others are, with or without ``.gz``; None for
            where the Debian package installs them.

    Raises:
        DataError: If a file is missing, or is not what it should be.
    """
    folder = DEBIAN_FOLDER if folder is None else folder
    train, test = (_load_split(folder, split) for split in ("train", "t10k"))
    return ImageData(train, test, _NUM_CLASSES)


def read_idx(path: Path, num_dims: int) -> Tensor:
    """The array in an IDX file of unsigned bytes, gzipped or not.

    Args:
        path: The file; whether it is gzipped is told by its content.
        num_dims: Dimensions it must have.

    Returns:
        uint8, of the sizes in the header.

    Raises:
        DataError: If the file is damaged, or is no such array.
    """
    content = _read(path)
    header_bytes = 4 * (1 + num_dims)
    magic = (_UNSIGNED_BYTES << 8) + num_dims
    found = int.from_bytes(content[:4], "big")
    if len(content) < 4 or found != magic:
        raise DataError(
            f"{path} begins with the magic number {found:#010x}: expected {magic:#010x}, that of an IDX file "
            f"(unsigned bytes, dimensions: {num_dims}); get the file anew"
        )
    if len(content) < header_bytes:
        raise DataError(f"{path} ends within its header of {header_bytes} bytes: get the file anew")
    sizes = struct.unpack(f">{num_dims}I", content[4:header_bytes])
    num_values = len(content) - header_bytes
    expected = torch.Size(sizes).numel()
    if num_values != expected:
        raise DataError(
            f"{path} holds {num_values} values, but its header says {' x '.join(map(str, sizes))} = "
            f"{expected}: get the file anew"
        )
    if not expected:
        return torch.empty(sizes, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content[header_bytes:]), dtype=torch.uint8).reshape(sizes)


def _load_split(folder: Path, split: str) -> Images:
    pixels_nhw = read_idx(_find(folder, f"{split}-images-idx3-ubyte"), num_dims=3)
    labels_n = read_idx(_find(folder, f"{split}-labels-idx1-ubyte"), num_dims=1)
    if len(pixels_nhw) != len(labels_n):
        raise DataError(
            f"{folder} has {len(pixels_nhw)} images and {len(labels_n)} labels in its {split} files: "
            "expected one label for each image; get the files anew"
        )
    return Images(pixels_nhw.unsqueeze(1), labels_n.long())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"there is no {name} or {name}.gz in {folder}: install Fashion-MNIST with apt-get install "
        "dataset-fashion-mnist, or say where its IDX files are with --data_dir"
    )


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content
    except EOFError as error:
        raise DataError(f"{path} is cut short: its gzip stream has no end; get the file anew") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): get the file anew") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
