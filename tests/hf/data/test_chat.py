"""Which part of a chat is the assistant's, for templates that say so and for those that do not."""

import pytest
from datasets import Dataset
from encoded import samples_of
from tiny_tokenizers import CHATML, CHATML_WITH_TAGS, FORGETFUL, byte_level

from ds_interlock.errors import DataError
from ds_interlock.heads.labels import IGNORED_LABEL
from ds_interlock.hf.data.chat import is_learned, render_chat
from ds_interlock.hf.data.records import Chat
from ds_interlock.hf.data.samples import encode_records
from ds_interlock.hf.data.tokenised import Samples, columns, features

USER = {"role": "user", "content": "how are you"}


def chat(*contents):
    """A chat that begins with the user."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return Chat(messages, "train.jsonl line 7")


def learned_text(tokenizer, record, seq_length=500):
    """What is learned of a chat; a bar for each gap."""
    (sample,) = samples_of(encode_records([record], tokenizer, seq_length))
    runs, previous = [], IGNORED_LABEL
    for label in sample.labels:
        if label != IGNORED_LABEL:
            if previous == IGNORED_LABEL:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return "|".join(tokenizer.decode(run) for run in runs)


def test_a_template_without_tags_is_rendered_turn_by_turn():
    text, spans = render_chat(chat("hello", "fine", "and", "you"), byte_level(CHATML))
    assert [text[first:end] for first, end in spans] == ["fine<|im_end|>\n", "you<|im_end|>\n"]


def test_a_template_with_tags_is_believed():
    text, spans = render_chat(chat("hello", "fine", "and", "you"), byte_level(CHATML_WITH_TAGS))
    assert [text[first:end] for first, end in spans] == ["fine<|im_end|>", "you<|im_end|>"]


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize(
    "answer", ["fine", "  two spaces first", "spaces last  ", "héllo 漢字 🙂", "a\n\nb", ""]
)
def test_the_assistants_tokens_are_learned_and_no_others(answer, trim_offsets):
    record = chat("hello there", answer, "  user again ", answer)
    tagged = byte_level(CHATML_WITH_TAGS, trim_offsets)
    assert learned_text(tagged, record) == "|".join([f"{answer}<|im_end|>"] * 2)
    untagged = byte_level(CHATML, trim_offsets)
    assert learned_text(untagged, record) == "|".join([f"{answer}<|im_end|>\n"] * 2)


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_TAGS])
def test_templates_see_the_tools(template):
    tools = [{"type": "function", "function": {"name": "f"}}]
    record = Chat(chat("hello", "fine").messages, "train.jsonl line 7", tools)
    text, spans = render_chat(record, byte_level("{{ tools[0].function.name + ':' }}" + template))
    assert text.startswith("f:<|im_start|>user")
    assert [text[first:end].rstrip() for first, end in spans] == ["fine<|im_end|>"]


def test_the_whole_chat_is_tokenised_as_the_template_renders_it():
    tokenizer = byte_level(CHATML, bos_token="<|im_start|>")
    record = chat("hello", "fine")
    (sample,) = samples_of(encode_records([record], tokenizer, 500))
    expected = tokenizer.apply_chat_template(record.messages, tokenize=True, return_dict=False)
    assert [*sample.ids, sample.labels[-1]] == expected


def test_a_chat_that_ends_with_the_user_has_nothing_to_learn_there():
    assert learned_text(byte_level(CHATML_WITH_TAGS), chat("hello", "fine", "you")) == "fine<|im_end|>"


def test_chats_are_cut_at_the_end_and_counted():
    tokenizer = byte_level(CHATML)
    long_prompt = chat("hello " * 40, "lost")
    long_answer = chat("hello", "fine " * 40)
    data = list(encode_records([long_prompt, long_answer, chat("hello", "you")], tokenizer, 40))
    assert [len(one.samples) for one in data] == [0, 1, 1]
    assert [one.was_cut for one in data] == [True, True, False]
    assert len(data[1].samples[0].ids) == 40
    summary = Samples(Dataset.from_dict(columns(enumerate(data)), features=features())).summary(3)
    assert summary.endswith(
        "; 1 longer than --seq_length were cut; 1 have nothing to learn within --seq_length and are left out"
    )


@pytest.mark.bad_input
def test_no_template():
    with pytest.raises(DataError, match="has no chat template"):
        render_chat(chat("hello", "fine"), byte_level())


@pytest.mark.bad_input
def test_a_template_that_rewrites_earlier_turns():
    tokenizer = byte_level(FORGETFUL)
    render_chat(chat("hello", "fine"), tokenizer)
    with pytest.raises(DataError, match=r"line 7: .* renders messages\[1\] differently .*{% generation %}"):
        render_chat(chat("hello", "fine", "and", "you"), tokenizer)


@pytest.mark.bad_input
def test_a_template_that_refuses_a_chat():
    tokenizer = byte_level("{{ raise_exception('roles must alternate') }}" + CHATML)
    with pytest.raises(
        DataError, match=r"line 7: the chat template refuses this chat \(roles must alternate\)"
    ):
        render_chat(chat("hello", "fine"), tokenizer)
    with pytest.raises(DataError, match="line 7: the first message is the assistant's"):
        render_chat(Chat([{"role": "assistant", "content": "a"}, USER], "line 7"), byte_level(CHATML))


def test_tokens_are_inside_by_any_of_their_characters():
    offsets = [(0, 0), (0, 3), (3, 6), (6, 7), (8, 8), (8, 10), (0, 0)]
    special = [True, False, False, False, False, False, True]
    #          spans hold the characters       4, 5            7        (of which a trimmed space is left)
    assert is_learned(offsets, special, [(4, 6), (7, 8)]) == [False, False, True, False, True, False, False]
    assert is_learned(offsets, special, [(0, 10)]) == [False, True, True, True, True, True, False]
    assert is_learned(offsets, special, []) == [False] * 7
