"""Chats as text, and which of it the assistant wrote.

    messages ──chat template──► <|user|>hello<|end|><|assistant|>hi<|end|><|user|>...
                                                                ╰───┬───╯ span: characters to be learned
                       ids         ...  ...  ...      ...       ...  ...      ...
                       is_learned                               yes  yes

The spans come from the template's own ``{% generation %}`` tags. A template without them is rendered up to
the start and up to the end of each turn of the assistant: the span is the difference.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ds_interlock.errors import DataError
from ds_interlock.hf.data.records import Chat

Span: TypeAlias = tuple[int, int]  # first character, and the one after the last

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span]]:
    """The text of a chat, special tokens included, and the spans in it that the assistant wrote.

    A span holds all that the template adds after its prompt for the assistant, the end of the turn included.
    DataError if there is no template, it refuses the chat, or it does not show what the assistant wrote.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which chats need: use an "
            "instruction-tuned model, or set chat_template in its tokenizer_config.json"
        ) from error
    try:
        if _GENERATION_TAG.search(template):
            return _render_with_tags(chat, template, tokenizer)
        return _render_turn_by_turn(chat, tokenizer)
    except (TemplateError, TypeError) as error:
        raise DataError(f"{chat.where}: the chat template refuses this chat ({error})") from error


def is_learned(offsets: Sequence[Span], is_special: Sequence[bool], spans: Sequence[Span]) -> list[bool]:
    """Which tokens, special ones aside, have a character inside one of ``spans``, which are sorted."""
    ends = [end for _, end in spans]
    learned = []
    for (first, end), special in zip(offsets, is_special, strict=True):
        # A byte-level tokenizer may trim spaces off its offsets: of a token of spaces nothing is left,
        # and both its ends come after the last space.
        first = min(first, end - 1)
        nearest = bisect_right(ends, first)
        learned.append(not special and nearest < len(spans) and spans[nearest][0] < end)
    return learned


def _render_with_tags(chat: Chat, template: str, tokenizer: Any) -> tuple[str, list[Span]]:
    # Not through apply_chat_template(return_assistant_tokens_mask=True): where a span begins or ends with
    # a space that the tokenizer trims off its offsets, that marks the rest of the chat, or nothing more.
    render: Any = render_jinja_template  # its types say less than it takes and returns
    rendered, spans = render(
        conversations=[chat.messages],
        tools=chat.tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return rendered[0], [span for span in spans[0] if span[0] < span[1]]


def _render_turn_by_turn(chat: Chat, tokenizer: Any) -> tuple[str, list[Span]]:
    def render(num_messages: int, **prompt: bool) -> str:
        messages = chat.messages[:num_messages]
        return str(tokenizer.apply_chat_template(messages, chat.tools, tokenize=False, **prompt))

    whole = render(len(chat.messages))
    spans = []
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise DataError(f"{chat.where}: the first message is the assistant's; expected the user's")
        before = render(number, add_generation_prompt=True)
        after = render(number + 1)
        if not (after.startswith(before) and whole.startswith(after)):
            raise DataError(
                f"{chat.where}: the chat template renders messages[{number}] differently once it knows what "
                "follows: mark the assistant's part in it with {% generation %} and {% endgeneration %}, or "
                "give each of the assistant's turns a chat that ends with it"
            )
        if len(before) < len(after):
            spans.append((len(before), len(after)))
    return whole, spans
