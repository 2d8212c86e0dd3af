"""What a user of the job ``finetune`` gets wrong: one rank says so in one sentence."""

import json
import re
import resource
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from finetuning import (
    arguments,
    finetune,
    refusal,
    refused,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)
from overwriting_kernels import ScalesWhatItSaved
from ranks import RankPool
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    XLNetConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from ds_interlock.hf.export.model import export_model
from ds_interlock.jobs import finetune_task

SMALL_FILES = 2**15


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    save_tiny("llama", folder, shards="60KB")
    return folder


def save_other(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def t5(folder: Path) -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=131)
    save_other(T5ForConditionalGeneration(config), folder)


def vit(folder: Path) -> None:
    """As on the hub, without a tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=8, patch_size=4)
    ViTForImageClassification(config).save_pretrained(folder)


def gemma3_with_eyes(folder: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**sizes, "vocab_size": 300, "head_dim": 8, "num_key_value_heads": 2}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    save_other(AutoModelForImageTextToText.from_config(config), folder)


def xlnet(folder: Path) -> None:
    config = XLNetConfig(d_model=16, d_inner=16, n_layer=2, n_head=2, vocab_size=131)
    save_other(AutoModelForCausalLM.from_config(config), folder)


def without_tokenizer(folder: Path) -> None:
    tiny_model("gpt2").save_pretrained(folder)


def with_another_tokenizer(folder: Path) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(50)
    save_other(model, folder)


def without_weights(folder: Path) -> None:
    save_tiny("llama", folder)
    (folder / "model.safetensors").unlink()


def of_no_known_type(folder: Path) -> None:
    save_tiny("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "quokka"}))


def without_a_shard(folder: Path) -> None:
    save_tiny("llama", folder, shards="60KB")
    next(folder.glob("model-00002*")).unlink()


def with_a_shard_cut_short(folder: Path) -> None:
    save_tiny("llama", folder, shards="60KB")
    cut_short(next(folder.glob("model-00002*")))


def cut_short_file(folder: Path) -> None:
    save_tiny("llama", folder)
    cut_short(folder / "model.safetensors")


def cut_short_bin(folder: Path) -> None:
    save_tiny("llama", folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("llama").state_dict(), folder / "pytorch_model.bin")
    cut_short(folder / "pytorch_model.bin")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def with_a_tensor_too_few(folder: Path) -> None:
    model = tiny_model("llama")
    state = {k: v for k, v in model.state_dict().items() if "layers.2.mlp.up_proj" not in k}
    model.save_pretrained(folder, state_dict=state)
    tiny_tokenizer().save_pretrained(folder)


def with_other_sizes(folder: Path) -> None:
    save_tiny("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))


MODELS = {
    lambda folder: None: "no such folder",
    t5: "T5Config cannot be cut into pipeline layers: it is an encoder-decoder",
    vit: "transformers has no causal language model of a ViTConfig",
    gemma3_with_eyes: r"no text model \(its configuration has a vision_config\); --text_model_only takes",
    xlnet: "transformer has weights of its own: mask_emb",
    without_tokenizer: "it has no tokenizer; expected its files beside config.json",
    with_another_tokenizer: r"its tokenizer gives the token id \d+, and the model knows 50 tokens",
    without_weights: "transformers cannot load it .*no file named model.safetensors",
    of_no_known_type: "no Hugging Face configuration .*quokka",
    without_a_shard: "model.safetensors.index.json names model-00002-of-.*, which do not exist",
    with_a_shard_cut_short: "model-00002-of-.* cannot be read .*: is its download complete",
    cut_short_file: "model.safetensors cannot be read .*: is its download complete",
    cut_short_bin: "transformers cannot load it",
    with_a_tensor_too_few: "its weights lack model.layers.2.mlp.up_proj.weight",
    with_other_sizes: r"gate_proj.weight is \[48, 32\] in the files, expected \[40, 32\] by its config.json",
}


@pytest.mark.bad_input
@pytest.mark.parametrize("write", MODELS, ids=lambda write: write.__name__.strip("<>"))
def test_a_model_that_cannot_be_used(write: Any, ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    write(tmp_path / "model")
    assert_refused(ranks2, MODELS[write], tmp_path, data)


def assert_refused(pool: RankPool, why: str, folder: Path, data: Path, *more: object, **how: Any) -> None:
    """One sentence with ``why`` in it; no results."""
    message = refusal(pool, arguments(folder, data, *more, **how))
    assert re.search(why, message), message
    assert "\n" not in message
    assert not any((folder / "out" / name).exists() for name in ("hf", "adapter", "metrics.json"))


WORDS: list[tuple[str, str]] = [
    ("--attn_implementation flash_attention_2", "--attn_implementation flash_attention_2: FlashAttention2"),
    ("--attn_implementation fast", "argument --attn_implementation.* invalid choice: 'fast'"),
    ("--torch_compile_backend fast", "--torch_compile_backend fast: torch has .*inductor"),
    ("--stage_bounds 0,x,7", "--stage_bounds 0,x,7: expected layer numbers"),
    ("--stage_bounds 0,3,9", "stage_bounds"),
    ("--stage_bounds 0,5,3,7", "stage_bounds"),
    ("--num_stages 3", "--num_stages is 3: expected a divisor of 2"),
    ("--seq_length 65", "--seq_length is 65, but .* knows 64 positions"),
    ("--gguf_file model.gguf", "--gguf_file model.gguf: not in .*; GGUF files there: none"),
    ("--train_file nowhere.jsonl", "nowhere.jsonl cannot be read: No such file"),
    ("--freeze nothing_like_this", "--freeze nothing_like_this: no parameter has a name like this"),
    ("--freeze (", r"--freeze \(: not a regular expression"),
    ("--learning_rate_scale emb=0", "--learning_rate_scale emb=0: expected a factor above 0"),
    ("--learning_rate_scale emb", "--learning_rate_scale emb: expected REGEX=FACTOR"),
    ("--learning_rate_scale emp=2", "--learning_rate_scale emp: no parameter has a name like this"),
    ("--learning_rate -1", "the learning rate is -1"),
    ("--lora_r 2 --lora_target_modules w_proj", "--lora_target_modules w_proj: no linear layer of a block"),
    ("--maximum_steps 5", "unrecognized arguments: --maximum_steps 5"),
    ("--resume_from_checkpoint gone", "--resume_from_checkpoint gone: there is no checkpoint"),
    (
        "--streaming --max_train_samples 3",
        "--streaming does not know all samples .* --max_train_samples",
    ),
    ("--train_file a.jsonl:0.7 b.jsonl", "a.jsonl:0.7 b.jsonl: expected a weight above 0 for each"),
    ("--push_to_hub", "--push_to_hub needs --hub_model_id"),
    ("--early_stopping_patience 2", "--early_stopping_patience needs --eval_steps"),
    ("--max_train_samples 3", "3 training samples may fill as few as 3 rows .* one batch takes 4"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("words", "why"), WORDS, ids=[words for words, _ in WORDS])
def test_a_wrong_word_on_the_command_line(
    words: str, why: str, llama: Path, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(llama)
    assert_refused(ranks2, why, tmp_path, data, *words.split())


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": {"type": "AdamW", "params": {}}}, "the learning rate is missing: give --learning_rate"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "the learning rate is 'auto'"),
    ({"fp16": {"enabled": True}}, "fp16"),
    ({"interlock": {"mode": "lokal"}}, "interlock.mode"),
    ({"scheduler": {"type": "WarmupLR", "params": {"what": "auto"}}}, 'scheduler.params.what is "auto"'),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("config", "why"), CONFIGS, ids=[next(iter(c)) for c, _ in CONFIGS])
def test_a_config_that_cannot_be_used(
    config: dict[str, Any], why: str, llama: Path, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(llama)
    assert_refused(ranks2, why, tmp_path, data, config=config)


LINES = {
    '{"text": "a"}\n{"text": "b"': r"lines.jsonl line 2: malformed JSON",
    '{"text": "a"}\n\n{"messages": 3}\n': "lines.jsonl line 3",
    "": "lines.jsonl is empty",
    "[1]\n": "lines.jsonl line 1: expected a JSON object",
}


@pytest.mark.bad_input
@pytest.mark.parametrize("text", LINES, ids=["cut off", "another format", "empty", "no object"])
def test_a_data_file_names_its_line(
    text: str, llama: Path, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(llama)
    (tmp_path / "lines.jsonl").write_text(text)
    assert_refused(ranks2, LINES[text], tmp_path, data, "--train_file", tmp_path / "lines.jsonl")


@pytest.mark.bad_input
def test_more_stages_than_blocks(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    assert_refused(ranks2, "2 stages for the 1 blocks? of --model", tmp_path, data)


def test_robertas_positions_begin_behind_the_padding(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("roberta", tmp_path / "model", num_labels=2)
    more = "--seq_length", 64
    assert_refused(ranks2, "knows 63 positions", tmp_path, data, *more, task="classification")


@pytest.mark.bad_input
def test_a_classifier_of_other_classes(ranks2: RankPool, data: Path, tmp_path: Path) -> None:
    save_tiny("bert", tmp_path / "model", num_labels=3)
    why = r"classifier.weight is \[3, 32\] in the files, expected \[2, 32\], for 2 classes in the data"
    assert_refused(ranks2, why, tmp_path, data, task="classification")


def refused_with_a_fused_kernel(argv: list[str]) -> str | None:
    """The job with an MLP whose backward pass changes what it saved, as in Liger's kernels. On a rank."""
    forward = LlamaMLP.forward

    def fused(mlp: LlamaMLP, x: torch.Tensor) -> Any:
        return ScalesWhatItSaved.apply(forward(mlp, x))

    with mock.patch.object(LlamaMLP, "forward", fused):
        return refused(argv)


@pytest.mark.bad_input
def test_a_kernel_that_cannot_be_walked_back_twice(
    llama: Path, ranks4: RankPool, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(llama)
    window = {"mode": "interlock", "window": 2}
    argv = arguments(tmp_path, data, section=window, out="window")
    answers = [answer for answer in ranks4.run(refused_with_a_fused_kernel, argv=argv) if answer]
    (message,) = answers
    assert re.search(r"layer \d \(Block\) gives other gradients .* ScalesWhatItSaved changes", message)


def refused_when_the_disk_is_full(argv: list[str]) -> str | None:
    """The job; once it exports, the system lets no file grow beyond ``SMALL_FILES``."""
    export = finetune_task.export_model

    def export_model(*args: Any, **options: Any) -> Any:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILES, before[1]))
        try:
            return export(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with mock.patch.object(finetune_task, "export_model", export_model):
        return refused(argv)


def test_a_disk_that_is_full_at_export_leaves_the_old_model_and_the_checkpoint(
    llama: Path, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(llama)
    argv = arguments(tmp_path, data)
    ranks2.run(finetune, argv=argv)
    before = (tmp_path / "out" / "hf" / "model.safetensors").read_bytes()
    messages = ranks2.run(refused_when_the_disk_is_full, argv=argv)
    assert re.fullmatch(
        r"\S+/out/hf cannot be written \(.*File too large.*\): .* make room.*", str(messages[0])
    )
    assert messages[1] is None
    assert (tmp_path / "out" / "hf" / "model.safetensors").read_bytes() == before
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"checkpoints", "hf", "metrics.json", "timeline.svg", "train_log.jsonl"}
    export_model(tmp_path / "out" / "checkpoints", tmp_path / "later")
    assert (tmp_path / "later" / "model.safetensors").read_bytes() == before


@pytest.mark.bad_input
def test_an_output_folder_that_cannot_be_made(
    llama: Path, ranks2: RankPool, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(llama)
    (tmp_path / "file").write_text("")
    message = refusal(ranks2, arguments(tmp_path, data, out="file/out"))
    assert re.search("--output_dir: .*file/out cannot be written .*Not a directory", message)


@pytest.mark.parametrize(
    ("rate", "more", "warns"),
    [(6e-4, (), True), (5e-4, (), False), (2e-3, ("--lora_r", 2), False)],
    ids=["high", "not too high", "of adapters"],
)
def test_a_high_learning_rate_is_remarked_once(
    rate: float,
    more: tuple[object, ...],
    warns: bool,
    llama: Path,
    ranks2: RankPool,
    data: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "model").symlink_to(llama)
    outputs = ranks2.run(finetune, argv=arguments(tmp_path, data, "--learning_rate", rate, *more))
    warnings = [
        line for text in outputs for line in text.splitlines() if "warning: the learning rate" in line
    ]
    assert len(warnings) == warns
    assert all("0.0006" in line and "--learning_rate 5e-5 is usual" in line for line in warnings)
