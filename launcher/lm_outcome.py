"""What comes of a finished run of ``train_lm.py``: done by rank 0 alone, from the files on disk."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from job import write_json
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_interlock.hf.data.text import TokenBlocks, unigram_perplexity
from ds_interlock.hf.data.tokenizer import Tokenizer, same_ids
from ds_interlock.hf.export.lm import export_gpt2, read_layer_states
from ds_interlock.models.lm import LMConfig, lm_loss

_EVALUATED_AT_ONCE = 16
_PROMPT_TOKENS = 8


@dataclass(frozen=True)
class Outcome:
    """What a run knows at its end.

    Attributes:
        checkpoint: Folder of the last checkpoint.
        train_loss: Final loss of the last batch.
        validation_loss: The pipeline's own, over the first ``num_validated`` validation blocks.
        train_blocks: The training data; None where there is none, beyond stage 0.
        validation_blocks: The validation data; likewise.
        num_validated: How many blocks an evaluation took.
        tokens_per_second: Of training, evaluations and checkpoints left out.
        mode: ``interlock.mode_name``.
        window: ``interlock.window``.
        num_stages: Pipeline stages.
        seed: ``--seed``.
        steps: Optimizer steps from the beginning, those before a resumption included.
        seconds: Time in training, since the resumption if there was one.
    """

    checkpoint: Path
    train_loss: float
    validation_loss: float
    train_blocks: TokenBlocks | None
    validation_blocks: TokenBlocks | None
    num_validated: int
    tokens_per_second: float
    mode: str
    window: float | None
    num_stages: int
    seed: int
    steps: int
    seconds: float


def finish(
    outcome: Outcome, lm: LMConfig, tokenizer: Tokenizer, output_dir: Path, *, num_generated: int
) -> None:
    """Exports the model, checks the export, writes ``metrics.json``, shows what the model writes."""
    assert outcome.train_blocks is not None, "rank 0 belongs to stage 0, which has the data"
    assert outcome.validation_blocks is not None, "rank 0 belongs to stage 0, which has the data"
    folder = output_dir / "hf"
    export_gpt2(read_layer_states(outcome.checkpoint), lm, folder, tokenizer.to_hf())
    # From here on only what a user of the checkpoint has: names of folders.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exported_tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    blocks = outcome.validation_blocks
    validated = blocks.tokens[1 : outcome.num_validated * blocks.seq_length + 1]
    unigram = unigram_perplexity(outcome.train_blocks.tokens, validated, lm.vocab_size)
    metrics = {
        "train_loss": outcome.train_loss,
        "validation_loss": outcome.validation_loss,
        "validation_perplexity": math.exp(outcome.validation_loss),
        "exported_validation_loss": exported_loss(model, blocks, outcome.num_validated),
        "unigram_perplexity": unigram,
        "tokens_per_second": outcome.tokens_per_second,
        "mode": outcome.mode,
        "window": outcome.window,
        "num_stages": outcome.num_stages,
        "seed": outcome.seed,
        "steps": outcome.steps,
        "seconds": outcome.seconds,
    }
    write_json(output_dir / "metrics.json", metrics)
    print(summary(metrics, output_dir))
    beginning: str = exported_tokenizer.decode(blocks.tokens[:2000], skip_special_tokens=True)
    if not same_ids(tokenizer, exported_tokenizer, beginning):
        print(
            "warning: the exported tokenizer gives other ids than training saw, see "
            "ds_interlock.hf.data.tokenizer"
        )
    if num_generated:
        sample = sample_text(model, exported_tokenizer, blocks.tokens, num_generated, outcome.seed)
        print(f"\na sample:\n{sample}")


def exported_loss(model: Any, blocks: TokenBlocks, num_blocks: int) -> float:
    """Mean loss of the exported model over the first ``num_blocks`` blocks."""
    loss_fn = lm_loss().eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, num_blocks, _EVALUATED_AT_ONCE):
            numbers = range(start, min(start + _EVALUATED_AT_ONCE, num_blocks))
            inputs_bt, labels_bt = blocks.stack(numbers)
            total += loss_fn(model(inputs_bt).logits, labels_bt).item() * len(numbers)
    return total / num_blocks


def sample_text(model: Any, tokenizer: Any, tokens: Tensor, num_generated: int, seed: int) -> str:
    """What the model makes of the beginning of the validation text."""
    torch.manual_seed(seed)
    prompt = tokens[None, :_PROMPT_TOKENS]
    room = model.config.n_positions - prompt.shape[1]
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max(1, min(num_generated, room)),
        do_sample=True,
        top_p=0.9,
        pad_token_id=model.config.eos_token_id,
    )
    text: str = tokenizer.decode(written[0], skip_special_tokens=True)
    return text


def summary(metrics: dict[str, Any], output_dir: Path) -> str:
    """The metrics in a few lines."""
    window = f", window {metrics['window']:g}" if metrics["window"] else ""
    return "\n".join(
        [
            f"mode {metrics['mode']}{window}: {metrics['num_stages']} stages, {metrics['steps']} steps, "
            f"{metrics['seconds']:.0f} s, {metrics['tokens_per_second']:.0f} tokens/s",
            f"validation perplexity  {metrics['validation_perplexity']:10.2f}",
            f"unigram perplexity     {metrics['unigram_perplexity']:10.2f}",
            f"validation loss        {metrics['validation_loss']:10.4f}  in the pipeline",
            f"                       {metrics['exported_validation_loss']:10.4f}  from {output_dir / 'hf'}",
        ]
    )
