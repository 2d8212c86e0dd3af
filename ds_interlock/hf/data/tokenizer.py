"""Tokenizers in Hugging Face's form: a sentencepiece model (given, or trained and cached), or any other.

Of a sentencepiece model transformers converts vocabulary, merges and added tokens; normaliser and decoder
are built here from the model's own settings, because transformers' converters assume those of known
families. The ids are sentencepiece's, with one exception: the parts of a text between user-defined pieces
are normalised one by one.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import sentencepiece
from tokenizers import Regex, decoders, normalizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter

from ds_interlock.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
_TRAINING_CHARACTERS = 4_000_000  # enough for the vocabularies of small models; more only takes longer


def load_tokenizer(
    name_or_path: str | None, documents: Iterable[str], vocab_size: int, key: str | None = None
) -> PreTrainedTokenizerBase:
    """A sentencepiece ``.model`` or a Hugging Face tokenizer, by name or folder.

    None trains a BPE of ``vocab_size`` ids on the documents, and keeps it in ``default_cache_dir()``; see
    ``train_sentencepiece`` for ``key``.
    DataError if it is unreadable, or has no token to end a document.
    """
    if name_or_path is None:
        return read_sentencepiece(train_sentencepiece(documents, vocab_size, default_cache_dir(), key))
    if name_or_path.endswith(".model"):
        return read_sentencepiece(Path(name_or_path))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"tokenizer {name_or_path!r} is neither a sentencepiece .model file nor a Hugging Face "
            f"tokenizer: {error}"
        ) from error
    end_token_id(tokenizer)
    return tokenizer


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that marks where a text ends; DataError if the tokenizer has none."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} has neither an eos_token nor a sep_token: one is needed "
            "to mark where a text ends; set eos_token in its tokenizer_config.json"
        )
    return int(end)


def read_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """A ``.model`` file; DataError if it cannot be read, or has no token to end a document."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"tokenizer {path} is not a readable sentencepiece model: {error}") from error
    unknown = processor.unk_id()
    ends = [processor.eos_id(), processor.piece_to_id(END_OF_TEXT)]
    end = next((processor.id_to_piece(end) for end in ends if end >= 0 and end != unknown), None)
    if end is None:
        raise DataError(
            f"tokenizer {path} has neither an end-of-sentence token nor {END_OF_TEXT!r}: one is needed "
            "to mark where a document ends; train the model with either"
        )
    fast_tokenizer: Any = PreTrainedTokenizerFast  # its constructor is not typed
    special = {"unk_token": processor.id_to_piece(unknown), "eos_token": end, "bos_token": end}
    fast = fast_tokenizer(tokenizer_object=_to_fast(path), clean_up_tokenization_spaces=False, **special)
    return cast(PreTrainedTokenizerBase, fast)


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/ds_interlock``, or ``~/.cache/ds_interlock``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_interlock"


def train_sentencepiece(
    documents: Iterable[str], vocab_size: int, cache_dir: Path, key: str | None = None
) -> Path:
    """The file of a BPE trained on ``documents``. Decoding restores any text: rare characters become bytes.

    It is named by a hash of text and settings, and appears whole: several processes may train at once. With a
    ``key`` of the documents, which are not read again where it is known.
    DataError if the documents hold too little text for ``vocab_size`` ids.
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
        "unk_piece": "<unk>",
        "unk_id": 0,
        "eos_piece": END_OF_TEXT,
        "eos_id": 1,
        "bos_id": -1,
        "pad_id": -1,
    }
    known = cache_dir / f"{_name_of(settings, [key or ''])}.known"  # the name of the file
    if key and known.is_file() and (path := cache_dir / known.read_text()).is_file():
        return path
    lines = _training_lines(documents)
    path = cache_dir / f"{_name_of(settings, lines)}.model"
    cache_dir.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        _train(lines, settings, path)
    if key:
        known.write_text(path.name)
    return path


def _name_of(settings: Mapping[str, Any], parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in (sentencepiece.__version__, repr(sorted(settings.items())), *parts):
        digest.update(part.encode() + b"\0")
    return f"bpe-{settings['vocab_size']}-{digest.hexdigest()[:16]}"


def _train(lines: Sequence[str], settings: Mapping[str, Any], path: Path) -> None:
    cache_dir, vocab_size = path.parent, settings["vocab_size"]
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".training-") as folder:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_prefix=f"{folder}/bpe", minloglevel=2, **settings
            )
        except RuntimeError as error:
            raise DataError(
                f"no tokenizer of {vocab_size} ids can be trained on {sum(map(len, lines))} characters: give "
                f"a --vocab_size that fits, more text, or an existing --tokenizer (sentencepiece: {error})"
            ) from error
        os.replace(f"{folder}/bpe.model", path)


def _training_lines(documents: Iterable[str]) -> list[str]:
    """Lines from all documents alike, about ``_TRAINING_CHARACTERS`` in all: every n-th one."""

    def lines() -> Iterator[str]:
        return (line for document in documents for line in document.splitlines() if line.strip())

    step = max(1, sum(map(len, lines())) // _TRAINING_CHARACTERS)
    # Sentencepiece leaves out lines of more than 4,192 bytes.
    some = islice(lines(), 0, None, step)
    return [line[start : start + 1000] for line in some for start in range(0, len(line), 1000)]


def _to_fast(path: Path) -> FastTokenizer:
    extractor: Any = SentencePieceExtractor(str(path))
    proto = extractor.proto
    if proto.trainer_spec.model_type not in (proto.trainer_spec.BPE, proto.trainer_spec.UNIGRAM):
        raise DataError(f"tokenizer {path} is neither a BPE nor a unigram, so it has no Hugging Face form")
    parts = extractor.extract(None)
    converter: Any = SpmConverter
    fast: FastTokenizer = converter.build_tokenizer_from_spm_proto(proto, parts["vocab"], parts.get("merges"))
    steps: list[Any] = []
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
        undo.append(decoders.Strip(" ", 1, 0))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    fast.normalizer = normalizers.Sequence(steps)
    fast.decoder = decoders.Sequence(undo)
    fast.add_tokens(parts["additional_special_tokens"])
    return fast
