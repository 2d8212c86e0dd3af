"""Tokenizers: a sentencepiece model (given, or trained and cached), or any of Hugging Face's.

Training encodes with sentencepiece itself. The exported checkpoint needs the same tokenizer in
Hugging Face's form, which is built here piece by piece from the sentencepiece model:

    sentencepiece                        tokenizers
    -----------------------------------  ---------------------------------------------------
    normalizer_spec                      Precompiled, Strip, Replace, Prepend
    pieces and scores (BPE)              BPE; a merge for every way a piece falls into two
    pieces and scores (unigram)          Unigram
    byte pieces <0x0A>                   byte_fallback, and ByteFallback in the decoder
    control and user-defined pieces      AddedToken

The ids are the same, with one exception: the parts of a text between user-defined pieces are
normalised one by one. ``same_ids`` tells whether that, or anything else, matters for a text.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE, Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ds_interlock.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_UNKNOWN = "<unk>"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
_TRAINING_CHARACTERS = 4_000_000  # enough for the vocabularies of small models; more only takes longer


class Tokenizer(Protocol):
    """What training needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""

    @property
    def end_of_text_id(self) -> int:
        """The id that ends a document."""

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without any special ones around them."""

    def to_hf(self) -> PreTrainedTokenizerBase:
        """The same tokenizer in the form that ``AutoTokenizer`` loads."""


class SentencePieceTokenizer:
    """A sentencepiece ``.model`` file.

    Raises:
        DataError: If the file cannot be read, or has no token that could end a document.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"tokenizer {path} is not a readable sentencepiece model: {error}") from error
        ends = [self._processor.eos_id(), self._processor.piece_to_id(END_OF_TEXT)]
        self._ends = [end for end in ends if end >= 0 and end != self._processor.unk_id()]
        if not self._ends:
            raise DataError(
                f"tokenizer {path} has neither an end-of-sentence token nor {END_OF_TEXT!r}: one is needed "
                "to mark where a document ends; train the model with either"
            )

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def end_of_text_id(self) -> int:
        return int(self._ends[0])

    def encode(self, text: str) -> list[int]:
        return cast(list[int], self._processor.encode(text))

    def to_hf(self) -> PreTrainedTokenizerBase:
        proto = _read_proto(self.path)
        fast_tokenizer: Any = PreTrainedTokenizerFast  # its constructor is not typed
        tokenizer: PreTrainedTokenizerBase = fast_tokenizer(
            tokenizer_object=_to_fast(proto),
            unk_token=proto.trainer_spec.unk_piece,
            eos_token=self._processor.id_to_piece(self.end_of_text_id),
            bos_token=self._processor.id_to_piece(self.end_of_text_id),
            clean_up_tokenization_spaces=False,
        )
        return tokenizer


class HuggingFaceTokenizer:
    """A tokenizer by its Hugging Face name or folder.

    Raises:
        DataError: If it cannot be loaded, or has no token that could end a document.
    """

    def __init__(self, name_or_path: str) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"tokenizer {name_or_path!r} is neither a sentencepiece .model file nor a Hugging Face "
                f"tokenizer: {error}"
            ) from error
        ids = (self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        self._ends = [end for end in ids if end is not None]
        if not self._ends:
            raise DataError(
                f"tokenizer {name_or_path!r} has neither an eos_token nor a sep_token: one is needed to mark "
                "where a document ends; set eos_token in its tokenizer_config.json"
            )

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @property
    def end_of_text_id(self) -> int:
        return int(self._ends[0])

    def encode(self, text: str) -> list[int]:
        return cast(list[int], self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def to_hf(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, self._tokenizer)


def load_tokenizer(
    name_or_path: str | None,
    training_documents: Sequence[str],
    vocab_size: int,
    cache_dir: Path | None = None,
) -> Tokenizer:
    """The tokenizer named, or one trained on ``training_documents``.

    Args:
        name_or_path: Path of a sentencepiece ``.model``, or a Hugging Face name or folder; None
            trains a sentencepiece BPE, or takes it from the cache.
        training_documents: Texts to train on; never validation texts.
        vocab_size: Ids of a trained tokenizer.
        cache_dir: Where trained tokenizers are kept; default ``default_cache_dir()``.

    Raises:
        DataError: If it cannot be read, or cannot be trained on so little text.
    """
    if name_or_path is None:
        return train_sentencepiece(training_documents, vocab_size, cache_dir or default_cache_dir())
    if name_or_path.endswith(".model"):
        return SentencePieceTokenizer(Path(name_or_path))
    return HuggingFaceTokenizer(name_or_path)


def same_ids(tokenizer: Tokenizer, exported: PreTrainedTokenizerBase, text: str) -> bool:
    """True if the exported form of ``tokenizer`` gives the ids for ``text`` that training saw."""
    ids: list[int] = exported.encode(text, add_special_tokens=False, verbose=False)
    return ids == tokenizer.encode(text)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/ds_interlock``, or ``~/.cache/ds_interlock``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_interlock"


def train_sentencepiece(documents: Sequence[str], vocab_size: int, cache_dir: Path) -> SentencePieceTokenizer:
    """A BPE of ``documents``. It gives back any text exactly: rare characters become bytes.

    The file's name holds a hash of the text and the settings, and it appears whole or not at all:
    processes may train at the same time, they write the same file.

    Raises:
        DataError: If the documents hold too little text for ``vocab_size`` ids.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "model_type": "bpe",
        "character_coverage": 0.9999,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "split_digits": True,
        "unk_piece": _UNKNOWN,
        "unk_id": 0,
        "eos_piece": END_OF_TEXT,
        "eos_id": 1,
        "bos_id": -1,
        "pad_id": -1,
    }
    lines = _training_lines(documents)
    key = _hash_of([sentencepiece.__version__, repr(sorted(settings.items())), *lines])
    path = cache_dir / f"bpe-{vocab_size}-{key}.model"
    if path.is_file():
        return SentencePieceTokenizer(path)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".training-") as folder:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_prefix=f"{folder}/bpe", minloglevel=2, **settings
            )
        except RuntimeError as error:
            num_characters = sum(map(len, lines))
            raise DataError(
                f"no tokenizer of {vocab_size} ids can be trained on the training text ({num_characters} "
                "characters): give a --vocab_size that fits, more text, or an existing --tokenizer "
                f"(sentencepiece says: {error})"
            ) from error
        os.replace(f"{folder}/bpe.model", path)
    return SentencePieceTokenizer(path)


def _training_lines(documents: Sequence[str]) -> list[str]:
    """Lines from all documents alike, about ``_TRAINING_CHARACTERS`` in all: every n-th one.

    Long ones are cut, because sentencepiece leaves out lines of more than 4,192 bytes.
    """
    lines = [line for document in documents for line in document.splitlines() if line.strip()]
    step = max(1, sum(map(len, lines)) // _TRAINING_CHARACTERS)
    return [line[start : start + 1000] for line in lines[::step] for start in range(0, len(line), 1000)]


def _hash_of(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _read_proto(path: Path) -> Any:
    messages: Any = sentencepiece_model_pb2  # generated code: its classes are made when it is loaded
    proto = messages.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _to_fast(proto: Any) -> FastTokenizer:
    """The sentencepiece model ``proto`` as a tokenizer of the ``tokenizers`` library."""
    fast = FastTokenizer(_fast_model(proto))
    fast.normalizer = _fast_normalizer(proto.normalizer_spec)
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(undo)
    kinds = proto.SentencePiece
    fast.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == kinds.CONTROL)
            for piece in proto.pieces
            if piece.type in (kinds.CONTROL, kinds.USER_DEFINED)
        ]
    )
    return fast


def _fast_model(proto: Any) -> BPE | Unigram:
    spec = proto.trainer_spec
    if spec.model_type == spec.UNIGRAM:
        vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
        unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN)
        return Unigram(vocabulary, unk_id=unknown, byte_fallback=spec.byte_fallback)
    if spec.model_type != spec.BPE:
        raise DataError("only BPE and unigram sentencepiece models have a Hugging Face form")
    return BPE(
        vocab={piece.piece: number for number, piece in enumerate(proto.pieces)},
        merges=_merges(proto),
        unk_token=spec.unk_piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best piece first, as sentencepiece joins them."""
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    best_first = sorted(normal, key=lambda piece: -normal[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in best_first
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _fast_normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)
