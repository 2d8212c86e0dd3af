"""Samples in Arrow files: what goes in comes out, and is tokenised once."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from encoded import samples_of
from tiny_tokenizers import bert, letters

from ds_interlock.errors import DataError
from ds_interlock.hf.data import resident
from ds_interlock.hf.data.samples import encode_records
from ds_interlock.hf.data.sources import Records, read_records
from ds_interlock.hf.data.tokenised import Samples, features, identity, tokenise

ENCODE = partial(encode_records, tokenizer=letters(), seq_length=4)


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return read_records([write(tmp_path / "train.jsonl", [{"text": "abcd" * n} for n in range(1, 9)])])


def write(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def not_called(*_args: Any) -> NoReturn:
    raise AssertionError("tokenised again")


def test_what_is_tokenised_once_is_found_again(records: Records, tmp_path: Path) -> None:
    samples = tokenise(records, ENCODE, [1])
    assert list(samples) == samples_of(ENCODE(records))
    assert list(tokenise(records, not_called, [1])) == list(samples)
    with pytest.raises(AssertionError, match="tokenised again"):
        tokenise(records, not_called, [2])
    write(tmp_path / "train.jsonl", [{"text": "d"}])
    assert len(tokenise(read_records([str(tmp_path / "train.jsonl")]), ENCODE, [1])) == 1
    assert identity(letters()) == identity(letters()) != identity(bert())


def test_samples_of_some_records(records: Records) -> None:
    numbers = torch.tensor([1, 4])
    some = tokenise(records.subset(numbers), ENCODE, [1])
    assert list(some) == samples_of(ENCODE([records[1], records[4]]))
    assert list(some.subset(np.array([2, 0]))) == [some[2], some[0]]
    assert some.num_labels.tolist() == [sample.num_labels for sample in some]
    assert some.largest_id() == max(max(sample.ids) for sample in some)


def test_two_processes_tokenise_as_one_does(records: Records, tmp_path: Path) -> None:
    assert list(tokenise(records, ENCODE, [1], 2)) == samples_of(ENCODE(records))
    faulty = read_records([write(tmp_path / "faulty.jsonl", [{"text": "a"}, {"text": 3}])])
    with pytest.raises(DataError, match=r"faulty.jsonl line 2: text: Input should be a valid string"):
        tokenise(faulty, ENCODE, [1], 2)


def test_pages_of_the_file_are_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_all = {name: [None] * 5000 for name in features()}
    of_all |= {"tokens": np.tile(np.arange(512), (5000, 1)), "learned": np.ones((5000, 511), bool)}
    of_all["num_labels"] = list(range(5000))
    Dataset.from_dict(of_all, features=features()).save_to_disk(tmp_path)
    monkeypatch.setattr(resident, "_MOST", 2**20)
    resident.release_pages()
    samples, before, most = Samples(load_from_disk(tmp_path)), resident._mapped_bytes(), 0
    for start in range(0, 5000, 50):
        assert samples[start].ids == list(range(511))
        most = max(most, resident._mapped_bytes() - before)
    assert most < 2**22 < 5000 * 512 * 4
    assert samples.num_labels.tolist() == list(range(5000))


@pytest.mark.bad_input
def test_nothing_to_learn(tmp_path: Path, records: Records) -> None:
    one = read_records([write(tmp_path / "one.jsonl", [{"prompt": "abcd", "completion": "a"}])])
    with pytest.raises(DataError, match="none of the 1 records has anything to learn within --seq_length"):
        tokenise(one, ENCODE, [1])
    turns = [[("user", "abcd"), ("assistant", answer)] for answer in ("", "d")]
    chats = [{"messages": [{"role": who, "content": what} for who, what in chat]} for chat in turns]
    tokenizer = letters(chat_template="{% for message in messages %}{{ message.content }}{% endfor %}")
    encode = partial(encode_records, tokenizer=tokenizer, seq_length=9)
    with pytest.raises(DataError, match="none of the 1 records has anything to learn"):
        tokenise(read_records([write(tmp_path / "empty.jsonl", chats[:1])]), encode, [1])
    samples = tokenise(read_records([write(tmp_path / "chats.jsonl", chats)]), encode, [1])
    assert samples.summary(2).endswith(
        "1 labels; 1 have nothing to learn within --seq_length and are left out"
    )
    assert list(Samples.of(list(tokenise(records, ENCODE, [1])))) == list(tokenise(records, ENCODE, [1]))
