"""The Hugging Face checkpoint gives what the model gives."""

import pytest
import torch
from tiny_tokenizers import letters
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_interlock.errors import ConfigError
from ds_interlock.hf.data.tokenizer import read_sentencepiece, train_sentencepiece
from ds_interlock.hf.export import lm as export_lm
from ds_interlock.hf.export.lm import export_gpt2, read_layer_states
from ds_interlock.models.lm import LMConfig, build_lm

CONFIG = LMConfig(vocab_size=300, seq_length=16, width=24, num_blocks=3, num_heads=4, dropout=0.1, seed=9)
TOKENIZER = letters()
TIED = LMConfig(**{**vars(CONFIG), "tie_embeddings": True})


def trained_model(config):
    """A model none of whose parameters is at its initial value: biases and norms count, too."""
    model = build_lm(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def write_checkpoint(model, folder, *, tied_unembedding=None, shared=False):
    """The files that DeepSpeed's engine and ours write for ``model``."""
    folder.mkdir(parents=True)
    layers = list(model)[:-1] if shared or tied_unembedding is not None else list(model)
    for number, layer in enumerate(layers):
        torch.save(layer.state_dict(), folder / f"layer_{number:02d}-model_states.pt")
    for stage in range(4):
        tied = {"token_embedding.weight": tied_unembedding if stage == 3 else layers[0].weight.detach()}
        state = {"heads": {}, "tied_modules": {} if tied_unembedding is None else tied}
        torch.save(state, folder / f"interlock_stage_{stage:02d}.pt")


def assert_same_logits(model, folder):
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(CONFIG.vocab_size, (2, 16), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, model(ids), rtol=0, atol=1e-5)
    return exported


def test_untied(tmp_path):
    model = trained_model(CONFIG)
    write_checkpoint(model, tmp_path / "step")
    export_gpt2(read_layer_states(tmp_path / "step"), CONFIG, tmp_path / "hf", TOKENIZER)
    exported = assert_same_logits(model, tmp_path / "hf")
    assert not exported.config.tie_word_embeddings
    assert exported.config.eos_token_id == TOKENIZER.eos_token_id


def test_tied_and_shared(tmp_path):
    model = trained_model(TIED)
    write_checkpoint(model, tmp_path / "step", shared=True)
    export_gpt2(read_layer_states(tmp_path / "step"), TIED, tmp_path / "hf", TOKENIZER)
    exported = assert_same_logits(model, tmp_path / "hf")
    assert exported.config.tie_word_embeddings
    assert exported.lm_head.weight is exported.transformer.wte.weight


def test_tied_but_trained_apart(tmp_path):
    model = trained_model(CONFIG)
    write_checkpoint(model, tmp_path / "step", tied_unembedding=model[-1].weight.detach())
    export_gpt2(read_layer_states(tmp_path / "step"), TIED, tmp_path / "hf", TOKENIZER)
    assert not assert_same_logits(model, tmp_path / "hf").config.tie_word_embeddings


def test_latest_checkpoint_is_found(tmp_path):
    write_checkpoint(trained_model(CONFIG), tmp_path / "global_step7")
    (tmp_path / "latest").write_text("global_step7\n")
    assert sorted(read_layer_states(tmp_path)) == list(range(CONFIG.num_layers))


def test_tokenizer_travels_with_the_model(tmp_path):
    text = "a stage waits for no stage; the windows of two stages overlap.\n" * 20
    tokenizer = read_sentencepiece(
        train_sentencepiece([text, text.upper()], CONFIG.vocab_size, tmp_path / "cache")
    )
    model = trained_model(CONFIG)
    export_gpt2(dict(enumerate(layer.state_dict() for layer in model)), CONFIG, tmp_path / "hf", tokenizer)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    unseen = "  Windows of 3 stages\n\n\toverlap: naïve, 語!  "
    assert loaded(unseen).input_ids == tokenizer.encode(unseen)
    exported = assert_same_logits(model, tmp_path / "hf")
    assert exported.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_folder_that_is_there_is_replaced_when_the_new_one_is_complete(tmp_path, monkeypatch):
    old, new = trained_model(TIED), trained_model(CONFIG)
    export_gpt2(dict(enumerate(layer.state_dict() for layer in old)), TIED, tmp_path / "hf", TOKENIZER)
    states = dict(enumerate(layer.state_dict() for layer in new))

    def fail(self, folder):
        (folder / "config.json").write_text("{")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(export_lm.GPT2LMHeadModel, "save_pretrained", fail)
        with pytest.raises(ConfigError, match="cannot be written"):
            export_gpt2(states, CONFIG, tmp_path / "hf", TOKENIZER)
    assert_same_logits(old, tmp_path / "hf")
    export_gpt2(states, CONFIG, tmp_path / "hf", TOKENIZER)
    assert_same_logits(new, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.bad_input
def test_layers_that_are_missing_or_too_many_are_named(tmp_path):
    states = dict(enumerate(layer.state_dict() for layer in trained_model(CONFIG)))
    without_one = {number: state for number, state in states.items() if number != 6}
    with pytest.raises(ConfigError, match=r"\[0, 1, 2, 3, 4, 5\]: expected 0 to 6"):
        export_gpt2(without_one, CONFIG, tmp_path / "hf", TOKENIZER)
    with pytest.raises(ConfigError, match="num_blocks 3"):
        export_gpt2({**states, 7: states[6]}, CONFIG, tmp_path / "hf", TOKENIZER)
    assert not (tmp_path / "hf").exists()


@pytest.mark.bad_input
def test_a_model_of_another_width_is_refused(tmp_path):
    wider = LMConfig(**{**vars(CONFIG), "width": 32})
    states = dict(enumerate(layer.state_dict() for layer in trained_model(CONFIG)))
    with pytest.raises(ConfigError, match="do not fit"):
        export_gpt2(states, wider, tmp_path / "hf", TOKENIZER)


@pytest.mark.bad_input
def test_folders_without_a_pipeline_checkpoint_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no layer_\*"):
        read_layer_states(tmp_path)
    (tmp_path / "layer_00-model_01-model_states.pt").touch()
    with pytest.raises(ConfigError, match="tensor-parallel"):
        read_layer_states(tmp_path)
