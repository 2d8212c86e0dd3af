"""Records: what there is to learn, one by one, in the formats that people fine-tune with.

    Document     {"text"}
    Completion   {"prompt", "completion"}                      loss on the completion
    Chat         {"messages": [{"role", "content"}, ...]}      loss on the assistant's turns
    Classified   {"text", "label"}, {"text", "text_pair", "label"}

Keys that a format does not name are left alone. A record knows where it came from, so that whoever finds
fault with it later can say so.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ds_interlock.errors import DataError

Task: TypeAlias = Literal["causal", "classification"]


@dataclass(frozen=True)
class Document:
    """A text to be learned as a whole."""

    text: str
    where: str


@dataclass(frozen=True)
class Completion:
    """A text of which only the second part is to be learned."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class Chat:
    """Messages, each with a "role" and a "content"; the assistant's are to be learned."""

    messages: Sequence[Mapping[str, Any]]
    where: str


@dataclass(frozen=True)
class Classified:
    """A text, or a pair of them, and its class as the author named it."""

    text: str
    text_pair: str | None
    label: int | str
    where: str


Record: TypeAlias = Document | Completion | Chat | Classified


def records_of(objects: Iterable[tuple[str, Mapping[str, Any]]], task: Task) -> Iterator[Record]:
    """The records of one source; its first object decides on the format.

    Args:
        objects: Where each object is (for messages, as "train.jsonl line 3"), and the object.
        task: Which formats are expected.

    Raises:
        DataError: If an object has not the format, or not the types, that it should have.
    """
    formats = _CLASSIFICATION_FORMATS if task == "classification" else _CAUSAL_FORMATS
    keys: tuple[str, ...] | None = None
    for where, value in objects:
        if keys is None:
            keys = next((keys for keys in formats if all(key in value for key in keys)), None)
            if keys is None:
                raise DataError(f"{where}: {_keys(value)}; expected {' or '.join(map(_named, formats))}")
        missing = [key for key in keys if key not in value]
        if missing:
            other = next((other for other in formats if all(key in value for key in other)), None)
            raise DataError(
                f"{where}: mixed formats, {_named(other)} here and {_named(keys)} before; use a file for each"
                if other
                else f'{where}: "{missing[0]}" is missing, {_keys(value)}; expected {_named(keys)}'
            )
        yield formats[keys](value, where)


def _document(value: Mapping[str, Any], where: str) -> Document:
    return Document(_text(value, "text", where), where)


def _completion(value: Mapping[str, Any], where: str) -> Completion:
    return Completion(_text(value, "prompt", where), _text(value, "completion", where), where)


def _chat(value: Mapping[str, Any], where: str) -> Chat:
    messages = value["messages"]
    if not isinstance(messages, list):
        raise DataError(f'{where}: "messages" is {kind_of(messages)}, expected a list of messages')
    if not messages:
        raise DataError(f'{where}: "messages" is empty, expected at least one message')
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, dict):
            raise DataError(f'{where}: {name} is {kind_of(message)}, expected {{"role", "content"}}')
        for key in ("role", "content"):
            if key not in message:
                raise DataError(f'{where}: "{key}" is missing in {name}, {_keys(message)}')
        _text(message, "role", where, name)
        _text(message, "content", where, name, may_be_empty=True)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn")
    return Chat(messages, where)


def _classified(value: Mapping[str, Any], where: str) -> Classified:
    label = value["label"]
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise DataError(f'{where}: "label" is {kind_of(label)}, expected an integer or a string')
    if isinstance(label, int) and label < 0:
        raise DataError(f'{where}: "label" is {label}, expected 0 or more')
    text_pair = _text(value, "text_pair", where) if value.get("text_pair") is not None else None
    return Classified(_text(value, "text", where), text_pair, label, where)


# By the keys that a format needs. The first that fits counts: chats often carry a rendered "text" too.
_CAUSAL_FORMATS: Mapping[tuple[str, ...], Callable[[Mapping[str, Any], str], Record]] = {
    ("messages",): _chat,
    ("prompt", "completion"): _completion,
    ("text",): _document,
}
_CLASSIFICATION_FORMATS: Mapping[tuple[str, ...], Callable[[Mapping[str, Any], str], Record]] = {
    ("text", "label"): _classified,
}


def _text(
    value: Mapping[str, Any], key: str, where: str, owner: str = "", *, may_be_empty: bool = False
) -> str:
    name = f"{owner}.{key}" if owner else f'"{key}"'
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {name} is {kind_of(text)}, expected a string")
    if not may_be_empty and not text.strip():
        raise DataError(f"{where}: {name} is empty, expected text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may escape half of a surrogate pair, which is no character and which no tokenizer takes.
        raise DataError(f"{where}: {name} holds half a character (position {error.start})") from error
    return text


def kind_of(value: Any) -> str:
    """A value's type as JSON calls it."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _keys(value: Mapping[str, Any]) -> str:
    return f"the keys are {', '.join(map(json.dumps, value))}" if value else "there are no keys"


def _named(keys: Sequence[str]) -> str:
    return f"{{{', '.join(map(json.dumps, keys))}}}"
