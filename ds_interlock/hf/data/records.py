"""Records: what there is to learn, one by one, in the formats that people fine-tune with.

    Document     {"text"}
    Completion   {"prompt", "completion"}                      loss on the completion
    Chat         {"messages": [{"role", "content"}, ...]}      loss on the assistant's turns; perhaps "tools"
    Classified   {"text", "label"}, {"text", "text_pair", "label"}

Where a column of a table is null, the row is of another format. Other keys are ignored. A record knows where
it came from, for error messages.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, TypeAlias

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from ds_interlock.errors import DataError

Task: TypeAlias = Literal["causal", "classification", "text"]

_STRICT = ConfigDict(strict=True)


def _whole(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may escape half of a surrogate pair, which is no character and which no tokenizer takes.
        raise ValueError(f"half a character (position {error.start})") from error
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("empty, expected text")
    return text


def _with_an_answer(messages: list[Any]) -> list[Any]:
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message is the assistant's, so there is nothing to learn")
    return messages


def _with_content(message: Any) -> Any:
    if message.get("content") is None and not message.get("tool_calls"):
        raise ValueError('"content" is null or missing, which it may be beside "tool_calls" only')
    return message


def _without_nulls(value: Any, kept: Sequence[str] = ("content", "arguments")) -> Any:
    """Templates ask whether a key exists. What is ``kept`` may be null, or hold null, by itself."""
    if isinstance(value, dict):
        own = {key: inner for key, inner in value.items() if inner is not None or key in kept}
        return {key: inner if key in kept else _without_nulls(inner, kept) for key, inner in own.items()}
    return [_without_nulls(inner, kept) for inner in value] if isinstance(value, list) else value


def _tools(value: Any) -> Any:
    """As JSON text, too: a table has tools of different kinds as text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON ({error.msg})") from error


def _class(label: Any) -> int | str:
    if isinstance(label, str) or (isinstance(label, int) and not isinstance(label, bool) and label >= 0):
        return label
    raise ValueError("expected a string, or an integer from 0")


_Whole: TypeAlias = Annotated[str, AfterValidator(_whole)]
Text: TypeAlias = Annotated[_Whole, AfterValidator(_not_blank)]


class Message(TypedDict):
    """A turn of a chat; templates may use further keys."""

    __pydantic_config__ = ConfigDict(strict=True, extra="allow")  # type: ignore[misc]

    role: Text
    content: NotRequired[_Whole | None]


@dataclass(frozen=True, config=_STRICT)
class Document:
    """A text to be learned as a whole."""

    text: Text
    where: str


@dataclass(frozen=True, config=_STRICT)
class Completion:
    """A text of which only the second part is to be learned."""

    prompt: Text
    completion: Text
    where: str


@dataclass(frozen=True, config=_STRICT)
class Chat:
    """Messages; those of the assistant are to be learned."""

    messages: Annotated[
        list[Annotated[Message, AfterValidator(_with_content)]],
        Field(min_length=1),
        AfterValidator(_with_an_answer),
        AfterValidator(_without_nulls),
    ]
    where: str
    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(_tools)] = None


@dataclass(frozen=True, config=_STRICT)
class Classified:
    """A text, or a pair of them, and its class as the author named it."""

    text: Text
    text_pair: Text | None
    label: Annotated[int | str, PlainValidator(_class)]
    where: str


Record: TypeAlias = Document | Completion | Chat | Classified

# By the keys that a format needs. The first that fits counts: chats often carry a rendered "text" too.
_FORMATS: Mapping[Task, Mapping[tuple[str, ...], type[Record]]] = {
    "causal": {("messages",): Chat, ("prompt", "completion"): Completion, ("text",): Document},
    "classification": {("text", "label"): Classified},
    "text": {("text",): Document},
}

Keys: TypeAlias = tuple[str, ...]

KEYS = ("messages", "tools", "prompt", "completion", "text", "text_pair", "label")
"""All that a record may need of a row."""


def format_of(value: Mapping[str, Any], where: str, task: Task) -> Keys:
    """The keys of the format that an object has; DataError if it has none.

    ``where`` the object is, for messages, is such as "train.jsonl line 3".
    """
    keys = _fitting(value, task)
    if keys is None:
        raise DataError(f"{where}: {_keys(value)}; expected {' or '.join(map(_named, _FORMATS[task]))}")
    return keys


def record_of(value: Mapping[str, Any], where: str, task: Task, keys: Keys) -> Record:
    """The record in an object of a source whose first object has the format ``keys``; DataError if not."""
    missing = next((key for key in keys if value.get(key) is None), None)
    if missing is not None:
        fitting = _fitting(value, task)
        if fitting not in (keys, None):
            fault = f"mixed formats, {_named(fitting)} here, {_named(keys)} before; use a file for each"
            raise DataError(f"{where}: {fault}")
        if missing not in value:
            raise DataError(f'{where}: "{missing}" is missing, {_keys(value)}; expected {_named(keys)}')
    return _record(_FORMATS[task][keys], value, where)


def of_table(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A table's row without the nulls that stand for keys of other rows; DataError if they may be meant."""
    if _has_null_arguments(row.get("messages")):
        raise DataError(
            f"{where}: messages: arguments of a tool call are null, which in a table may mean that they are "
            "those of another row: give arguments as JSON text, or the chats as JSON lines"
        )
    return {**row, "tools": _without_nulls(row["tools"], ())} if "tools" in row else row


def _has_null_arguments(value: Any, is_within: bool = False) -> bool:
    if isinstance(value, dict):
        own = [(key, inner) for key, inner in value.items() if is_within or inner is not None]
        return any(_has_null_arguments(inner, is_within or key == "arguments") for key, inner in own)
    if isinstance(value, list):
        return any(_has_null_arguments(inner, is_within) for inner in value)
    return is_within and value is None


def _fitting(value: Mapping[str, Any], task: Task) -> Keys | None:
    for has in (lambda key: value.get(key) is not None, value.__contains__):
        for keys in _FORMATS[task]:
            if all(map(has, keys)):
                return keys
    return None


def _record(kind: type[Record], value: Mapping[str, Any], where: str) -> Record:
    fields: dict[str, Any] = {name: value.get(name) for name in kind.__dataclass_fields__}
    try:
        return kind(**{**fields, "where": where})
    except ValidationError as error:
        fault = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] != "value_error":
            message += f", got {kind_of(fault['input'])}"
        raise DataError(f"{where}: {place[1:]}: {message}") from error


def kind_of(value: Any) -> str:
    """A value's type as JSON calls it."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _keys(value: Mapping[str, Any]) -> str:
    return f"the keys are {', '.join(map(json.dumps, value))}" if value else "there are no keys"


def _named(keys: Sequence[str]) -> str:
    return f"{{{', '.join(map(json.dumps, keys))}}}"
