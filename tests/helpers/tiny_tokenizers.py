"""Tiny Hugging Face tokenizers, made in the test."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# A turn is "<|im_start|>role\ncontent<|im_end|>\n".
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_WITH_TAGS = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Shows what the assistant thought in its last turn only, as Qwen3 does.
FORGETFUL = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>' }}{% endif %}"
    "{{ message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def letters(**options):
    """A token for each character a..z, space and newline, and <s>, </s>; adds <s> in front.

    Ids: <s> 0, </s> 1, <unk> 2, a 3, b 4, ...
    """
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<unk>"])}
    for character in "abcdefghijklmnopqrstuvwxyz \n":
        vocabulary[character] = len(vocabulary)
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=fast, **options)


def byte_level(chat_template=None, trim_offsets=True, **options):
    """A byte-level BPE, as GPT-2's; by default spaces are trimmed off its offsets, as there."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(["user assistant system hello there how are you today, fine"] * 3, trainer)
    options = {"eos_token": "<|endoftext|>", "chat_template": chat_template, **options}
    return PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **options)


def bert(pair=True):
    """A word for each token, [CLS] a [SEP] b [SEP]; with ``pair`` it says which text a token is of.

    Ids: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, w0 4, w1 5, ...
    """
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(60))]
    fast = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if pair else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=inputs,
    )
