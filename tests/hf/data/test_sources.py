"""Files and data sets become records, and what is wrong with them is said with the line."""

import gzip
import json
import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from ds_interlock.errors import DataError
from ds_interlock.hf.data.records import Chat, Classified, Completion, Document
from ds_interlock.hf.data.sources import load_records, read_records

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, *objects):
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(value) + "\n" for value in objects))
    return str(path)


def test_every_format_is_recognised_by_its_first_object(tmp_path):
    (tmp_path / "texts.txt").write_text("one\n\ntwo")
    paths = [
        write(tmp_path / "chat.jsonl", {"messages": [USER, ASSISTANT], "text": "rendered"}),
        write(tmp_path / "pairs.json", {"prompt": "p", "completion": "c", "id": 7}),
        str(tmp_path / "texts.txt"),
        write(tmp_path / "more.jsonlines", {"text": "three"}, {"text": "four", "prompt": "p"}),
    ]
    records = list(read_records(paths))
    assert [type(record) for record in records] == [*[Document] * 2, Chat, Completion, *[Document] * 2]
    assert records[2] == Chat([USER, ASSISTANT], f"{paths[0]} line 1")
    assert records[3] == Completion("p", "c", f"{paths[1]} line 1")
    assert [records[n].text for n in (0, 1, 4, 5)] == ["one", "two", "three", "four"]


def test_files_and_folders_are_documents(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / "folder" / name).write_text(f"text of {name}")
    (tmp_path / "single").write_text("one\n\ntwo")
    records = read_records([str(tmp_path / "folder"), str(tmp_path / "single")], "text")
    assert [record.text for record in records] == ["text of a.txt", "text of b.txt", "one\n\ntwo"]
    assert records[2].where.startswith("document 3 of ")


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        ("one\n\ntwo\n\n\n\nthree", ["one", "two", "three"]),
        ("a\n\nb\fc\n\nd", ["a\n\nb", "c\n\nd"]),
        ("a\r\n\r\nb\r\nc\r\n", ["a", "b\nc\n"]),
        ("a\r\rb", ["a", "b"]),
        ("a\n\n\nb\n \nc", ["a", "\nb\n \nc"]),
    ],
)
def test_a_single_file_is_split_where_its_author_did(text, documents, tmp_path):
    (tmp_path / "text").write_bytes(text.encode())
    assert [record.text for record in read_records([str(tmp_path / "text")])] == documents


def test_lines_without_a_blank_one_are_more_than_one_document(tmp_path):
    (tmp_path / "text").write_text("".join(f"{n:09}\n" for n in range(20_000)))
    documents = [record.text for record in read_records([str(tmp_path / "text")])]
    assert (len(documents), "".join(documents)) == (4, (tmp_path / "text").read_text())
    assert all(text.endswith("\n") for text in documents)


def test_rows_of_csv_and_parquet(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,text\r\n1,"one, ""two""\r\nthree"\r\n\r\n2,4\r\n')
    (tmp_path / "b.tsv").write_text("prompt\tcompletion\np\tc\n")
    chats = [[USER, ASSISTANT | {"name": "bo"}], [USER, ASSISTANT]]
    parquet.write_table(pa.table({"messages": chats, "text": ["rendered", None]}), tmp_path / "c.parquet")
    paths = [str(tmp_path / name) for name in ("a.csv", "b.tsv", "c.parquet")]
    assert list(read_records(paths)) == [
        Document('one, "two"\nthree', f"{paths[0]} line 3"),
        Document("4", f"{paths[0]} line 5"),
        Completion("p", "c", f"{paths[1]} line 2"),
        Chat(chats[0], f"{paths[2]} row 0"),
        Chat(chats[1], f"{paths[2]} row 1"),  # without the name that the table has, as null, in each message
    ]
    (tmp_path / "d.csv").write_text("text,text_pair,label\na,,1\nb,c,0\n")
    labelled = load_records([str(tmp_path / "d.csv")], paths_of(tmp_path, "d.csv"), task="classification")
    assert (labelled.label_ids, labelled.train[0].text_pair) == ({0: 0, 1: 1}, None)


def paths_of(folder, *names):
    """As on a command line."""
    return [str(folder / name) for name in names]


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl", "data.csv"])
def test_compressed_files_are_read_as_others(name, tmp_path):
    contents = {
        "data.txt": "a\n\nb",
        "data.jsonl": '{"text": "a"}\n{"text": "b"}\n',
        "data.csv": "text\na\nb\n",
    }
    data = gzip.compress(contents[name].encode())
    (tmp_path / f"{name}.gz").write_bytes(data)
    assert [record.text for record in read_records(paths_of(tmp_path, f"{name}.gz"))] == ["a", "b"]
    (tmp_path / f"{name}.gz").write_bytes(data[:-9])
    with pytest.raises(DataError, match=rf"{name}.gz cannot be read: Compressed file ended before"):
        list(read_records(paths_of(tmp_path, f"{name}.gz")))


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"text": "a\xc3\xa9"}\r\n\r\n{"text": "b"}')
    assert list(read_records([str(path)])) == [
        Document("aé", f"{path} line 2"),
        Document("b", f"{path} line 4"),
    ]


def test_byte_order_marks_are_no_text(tmp_path):
    mark = "\N{BYTE ORDER MARK}".encode()
    lines, text = tmp_path / "data.jsonl", tmp_path / "data.txt"
    lines.write_bytes(mark + b'{"text": "a"}\n' + mark + b'{"text": "b"}\n')  # one file behind another
    text.write_bytes(mark + b"c\n\nd")
    assert [record.text for record in read_records([str(lines), str(text)])] == ["c", "d", "a", "b"]
    lines.write_bytes(mark)
    with pytest.raises(DataError, match="is empty"):
        list(read_records([str(lines)]))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 2: malformed JSON (Expecting ',' delimiter at column 13)"),
        (b'{"text": "\xff"}', "line 2: not UTF-8"),
        (b'["a"]', "line 2: expected a JSON object, got a list"),
        (b'"a"', "line 2: expected a JSON object, got a string"),
        (b"{}", 'line 2: "text" is missing, there are no keys; expected {"text"}'),
        (b'{"body": "a"}', 'line 2: "text" is missing, the keys are "body"; expected {"text"}'),
        (b'{"text": 3}', "line 2: text: Input should be a valid string, got a number"),
        (b'{"text": null}', "line 2: text: Input should be a valid string, got null"),
        (b'{"text": " \\n"}', "line 2: text: empty, expected text"),
        (b'{"text": "\\ud800"}', "line 2: text: half a character (position 0)"),
        (
            b'{"prompt": "a", "completion": "b"}',
            'line 2: mixed formats, {"prompt", "completion"} here, {"text"} before; use a file for each',
        ),
    ],
)
def test_a_faulty_line_is_named(line, message, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(DataError, match="^" + re.escape(f"{path} {message}")):
        list(read_records([str(path)]))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"prompt": "a"},
            'the keys are "prompt"; expected {"messages"} or {"prompt", "completion"} or {"text"}',
        ),
        ({"prompt": "a", "completion": ""}, "completion: empty"),
        ({"prompt": ["a"], "completion": "b"}, "prompt: Input should be a valid string, got a list"),
        ({"messages": "hello"}, "messages: Input should be a valid list, got a string"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": ["hello"]}, "messages[0]: Input should be a valid dictionary, got a string"),
        (
            {"messages": [USER, {"role": "assistant"}]},
            'messages[1]: "content" is null or missing, which it may be beside "tool_calls" only',
        ),
        ({"messages": [{"content": "a"}]}, "messages[0].role: Field required"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            'messages[1]: "content" is null or missing',
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": 3}]},
            "messages[1].content: Input should be a valid string, got a number",
        ),
        ({"messages": [USER, ASSISTANT], "tools": "["}, "tools: malformed JSON (Expecting value)"),
        ({"messages": [{"role": "", "content": "a"}]}, "messages[0].role: empty"),
        ({"messages": [USER]}, "messages: no message is the assistant's"),
    ],
)
def test_a_faulty_first_object_is_named(value, message, tmp_path):
    path = write(tmp_path / "data.jsonl", value)
    with pytest.raises(DataError, match=re.escape(f"{path} line 1: {message}")):
        list(read_records([path]))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "absent.jsonl cannot be read: No such file"),
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("blank.json", "\n \n", "blank.json is empty"),
        ("empty.csv", "text\n", "empty.csv is empty: expected names of columns, then rows"),
        ("empty.txt", " \n\n ", "no text"),
        ("absent.txt", None, "absent.txt does not exist"),
        ("lines.json.txt", '\n{"text": "a"}\n', "first line is a JSON object: name the file .*jsonl"),
        ("utf16.txt", "a\n\nb".encode("utf-16"), "utf16.txt line 1: not UTF-8"),
        ("utf16.csv", "text\na".encode("utf-16-le"), "utf16.csv line 1: not UTF-8 .it has NUL characters"),
        ("latin.txt", "a\n\né".encode("latin-1"), "latin.txt line 3: not UTF-8"),
        ("utf16.jsonl", '{"text": "a"}'.encode("utf-16"), "utf16.jsonl line 1: not UTF-8"),
        ("array.json", '[\n {"text": "a"}\n]', "array.json line 1: malformed JSON"),
        ("names.csv", "body\na\n", 'names.csv line 2: the keys are "body"; expected {"messages"}'),
        ("null.csv", 'text,y\n"a",1\n,2\n', "null.csv line 3: text: .* a valid string, got null"),
        ("fields.csv", "text\na\nb,c\n", "fields.csv line 3: 2 fields for the 1 columns in the first line"),
        ("quote.csv", 'text\na\n"b\nc\n', "quote.csv line 4: malformed CSV .unexpected end of data"),
        ("no.parquet", "PAR1", "no.parquet cannot be read: Parquet file size is 4 bytes"),
    ],
)
def test_unusable_files(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        list(read_records([str(tmp_path / name)]))


@pytest.mark.bad_input
def test_a_table_with_other_columns_or_nulls(tmp_path):
    table = pa.table({"text": ["a", None], "prompt": [None, "b"], "completion": [None, "c"]})
    parquet.write_table(table, tmp_path / "mixed.parquet")
    with pytest.raises(DataError, match=r'mixed.parquet row 1: mixed formats, {"prompt", "completion"} here'):
        list(read_records(paths_of(tmp_path, "mixed.parquet")))
    parquet.write_table(table.select(["prompt"]), tmp_path / "prompt.parquet")
    with pytest.raises(DataError, match=r'prompt.parquet row 0: the keys are "prompt"; expected {"m'):
        read_records(paths_of(tmp_path, "prompt.parquet"))
    parquet.write_table(table[:0], tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"empty.parquet is empty: expected rows"):
        read_records(paths_of(tmp_path, "empty.parquet"))
    with pytest.raises(DataError, match=r"holds no \*\.txt"):
        read_records([str(tmp_path)])


def test_tools_and_what_they_are_called_with(tmp_path):
    arguments = {"city": "Rome", "unit": None}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": None, "function": {"arguments": arguments}}],
    }
    chat = {"messages": [USER, call], "tools": tools}
    bare = {"messages": [USER, {**call, "content": ""}], "tools": json.dumps(tools)}
    of_lines = list(read_records([write(tmp_path / "chats.jsonl", chat, bare)]))
    assert [record.tools for record in of_lines] == [tools, tools]
    expected = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": arguments}}]}
    assert of_lines[0].messages == [USER, expected]
    parquet.write_table(pa.Table.from_pylist([chat]), tmp_path / "chats.parquet")
    with pytest.raises(DataError, match=r"chats.parquet row 0: messages: arguments of a tool call are null"):
        list(read_records(paths_of(tmp_path, "chats.parquet")))
    arguments["unit"] = "C"
    parquet.write_table(pa.Table.from_pylist([chat]), tmp_path / "chats.parquet")
    (of_table,) = read_records(paths_of(tmp_path, "chats.parquet"))
    assert of_table.messages == [USER, expected]
    assert of_table.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_validation_is_given_or_a_seeded_share(tmp_path):
    train = write(tmp_path / "train.jsonl", *({"text": f"text {n}"} for n in range(60)))
    validation = write(tmp_path / "validation.jsonl", {"text": "other"})
    given = load_records([train], [validation])
    assert (len(given.train), [record.text for record in given.validation]) == (60, ["other"])
    split = load_records([train], seed=3)
    assert (len(split.train), len(split.validation)) == (57, 3)
    assert {record.text for record in (*split.train, *split.validation)} == {f"text {n}" for n in range(60)}
    assert list(load_records([train], seed=3).validation) == list(split.validation)
    assert list(load_records([train], seed=4).validation) != list(split.validation)


@pytest.mark.bad_input
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"cache of datasets cannot be written .*Not a directory"):
        read_records([write(tmp_path / "train.jsonl", {"text": "a"})])


@pytest.mark.bad_input
def test_too_little_to_split(tmp_path):
    with pytest.raises(DataError, match="only 1 document"):
        load_records([write(tmp_path / "train.jsonl", {"text": "a"})])
    with pytest.raises(DataError, match="exactly one"):
        load_records()


def test_data_sets(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    write(folder / "train.jsonl", {"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER]})
    write(folder / "validation.jsonl", {"messages": [USER, ASSISTANT]})
    data = load_records(dataset=str(folder))
    assert [len(record.messages) for record in data.train] == [2, 3]
    assert list(data.validation) == [Chat([USER, ASSISTANT], f"data set {folder}, validation row 0")]
    assert data.classes == ()


def test_rows_of_a_data_set_without_text_are_passed_over(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.csv").write_text("text,year\nfirst,1\n,2\nsecond,3\n")
    assert all_texts(str(tmp_path / "corpus")) == ["first", "second"]


DATA_SETS = {
    "missing column": (
        {"train.csv": "body,year\nfirst,1\n"},
        'train row 0: the keys are "body", "year"; expected {"text"}',
    ),
    "mixed schemas": (
        {"train-1.jsonl": '{"text": "a"}\n', "train-2.jsonl": '{"prompt": "a", "completion": "b"}\n'},
        "cannot be loaded: Couldn't cast .*; give its files to --train_file, which names the line",
    ),
    "mixed rows": (
        {"train.jsonl": '{"text": "a"}\n{"text": "b"}\n{"prompt": "a", "completion": "b"}\n'},
        "train row 2: ",
    ),
    "UTF-16": ({"train.csv": "text\na\n".encode("utf-16")}, "cannot be loaded: 'utf-8' codec can't decode"),
    "cut off": ({"train.jsonl": '{"text": "a'}, "cannot be loaded: JSON parse error: Missing a closing"),
    "cut off, compressed": ({"train.jsonl.gz": gzip.compress(b"{}\n" * 9)[:-9]}, "Compressed file ended"),
    "empty": ({"train.jsonl": ""}, "cannot be loaded: it holds nothing"),
    "empty shard": ({"train-1.csv": "", "train-2.csv": "text\na\n"}, "cannot be loaded: No columns to parse"),
}


def all_texts(folder):
    """Of a data set, in order."""
    data = load_records(dataset=folder, task="text")
    return sorted(record.text for record in (*data.train, *data.validation))


@pytest.mark.bad_input
@pytest.mark.parametrize("fault", DATA_SETS)
def test_an_unusable_data_set(fault, tmp_path):
    files, message = DATA_SETS[fault]
    (tmp_path / "corpus").mkdir()
    for name, content in files.items():
        (tmp_path / "corpus" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    folder = str(tmp_path / "corpus")
    with pytest.raises(DataError, match=message) as raised:
        all_texts(folder)
    assert "\n" not in str(raised.value)


def test_an_empty_shard_of_json_lines_is_passed_over(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train-1.jsonl").write_text("")
    write(tmp_path / "corpus" / "train-2.jsonl", {"text": "a"}, {"text": "b"})
    assert all_texts(str(tmp_path / "corpus")) == ["a", "b"]


def test_sotu_is_a_data_set():
    data = load_records(dataset="sotu", seed=1)
    assert (len(data.train), len(data.validation)) == (237, 12)


def test_classes_with_names_are_numbered_in_sorted_order(tmp_path):
    train = write(
        tmp_path / "train.jsonl",
        {"text": "a", "label": "spam"},
        {"text": "b", "text_pair": "c", "label": "ham"},
        {"text": "d", "text_pair": None, "label": "spam"},
    )
    data = load_records([train], [train], task="classification")
    assert data.train[1] == Classified("b", "c", "ham", f"{train} line 2")
    assert data.train[2].text_pair is None
    assert (data.label_ids, data.classes) == ({"ham": 0, "spam": 1}, ("ham", "spam"))


def test_classes_with_numbers_keep_them(tmp_path):
    train = write(tmp_path / "train.jsonl", {"text": "a", "label": 3}, {"text": "b", "label": 0})
    data = load_records([train], [train], task="classification")
    assert (data.label_ids, data.classes) == ({0: 0, 3: 3}, ("0", "LABEL_1", "LABEL_2", "3"))


def test_a_class_that_only_the_split_off_share_has_is_known(tmp_path):
    train = write(tmp_path / "train.jsonl", *({"text": "a", "label": f"{n}"} for n in range(5)))
    data = load_records([train], task="classification")
    assert (len(data.train), len(data.classes)) == (4, 5)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "a"}, 'the keys are "text"; expected {"text", "label"}'),
        ({"text": "a", "label": 1.5}, "label: expected a string, or an integer from 0"),
        ({"text": "a", "label": True}, "label: expected a string"),
        ({"text": "a", "label": -1}, "label: expected a string, or an integer from 0"),
        ({"text": "a", "text_pair": "", "label": 1}, "text_pair: empty"),
    ],
)
def test_faulty_classified_texts(value, message, tmp_path):
    path = write(tmp_path / "data.jsonl", value)
    with pytest.raises(DataError, match=re.escape(f"{path} line 1: {message}")):
        list(read_records([path], "classification"))


@pytest.mark.bad_input
def test_classes_must_be_of_one_kind_and_known_from_training(tmp_path):
    train = write(tmp_path / "train.jsonl", {"text": "a", "label": "x"}, {"text": "a", "label": "y"})
    other = write(tmp_path / "other.jsonl", {"text": "a", "label": "y"}, {"text": "a", "label": "z"})
    with pytest.raises(
        DataError, match=r"other.jsonl line 2: no training record has the label 'z', only x, y"
    ):
        load_records([train], [other], task="classification")
    mixed = write(tmp_path / "mixed.jsonl", {"text": "a", "label": "x"}, {"text": "a", "label": 1})
    with pytest.raises(
        DataError, match=r'mixed.jsonl line 2: "label" is a number, and a string in .* line 1'
    ):
        load_records([mixed], task="classification")
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(DataError, match="is plain text: --task classification needs JSON lines"):
        load_records([str(tmp_path / "plain.txt")], task="classification")
