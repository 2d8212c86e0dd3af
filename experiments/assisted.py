"""Generates greedily with an early-exit draft as transformers' assistant, and without one.

    ds-interlock export out/checkpoints draft --stages 1
    python -m experiments.assisted out/hf draft --prompts valid.jsonl

The draft proposes some tokens, one forward pass each, and one pass of the whole model accepts those that it
would have written itself, up to the first other one, which it replaces. So the text is that of the whole
model alone, in fewer of its passes. Prompts are the first user turns of ``{"messages": [...]}``, or the
beginnings of ``{"text": ...}``.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_interlock.errors import DataError
from measuring.command import command_parser, exit_status
from measuring.results import write_results

_WORDS_OF_TEXT = 24  # of a text without turns, which the model goes on from


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what ``measure`` finds; the exit status."""
    parser = command_parser(__doc__)
    parser.add_argument("model", type=Path, help="folder of the whole model")
    parser.add_argument("draft", type=Path, help="folder of the draft")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--num_prompts", type=int, default=16, help="how many of them (%(default)s)")
    parser.add_argument("--new_tokens", type=int, default=64, help="of each answer (%(default)s)")
    parser.add_argument("--output", type=Path, help="write the results, machine and versions to this file")
    return exit_status(partial(_run, parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, draft = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (args.model, args.draft))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    results = measure(
        model, draft, read_prompts(args.prompts, tokenizer)[: args.num_prompts], args.new_tokens
    )
    for name, value in results.items():
        print(f"{name.replace('_', ' ')}: {value:.4g}")
    if args.output:
        write_results(args.output, results=results)


def read_prompts(file: Path, tokenizer: Any) -> list[Tensor]:
    """The prompts of a file of JSON lines, int64 ``[1, t]`` each; DataError if a line has none."""
    prompts = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
        if "messages" in record:
            turns = [turn for turn in record["messages"] if turn["role"] == "user"][:1]
            prompts.append(chat_prompt(tokenizer, turns))
        elif "text" in record:
            words = " ".join(record["text"].split()[:_WORDS_OF_TEXT])
            prompts.append(tokenizer(words, return_tensors="pt")["input_ids"])
        else:
            raise DataError(f'{file}, line {number}: no prompt; expected "messages" or "text"')
    return prompts


def chat_prompt(tokenizer: Any, turns: Sequence[dict[str, str]]) -> Tensor:
    """The ids that the assistant's answer to ``turns`` goes on from, ``[1, t]``."""
    how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    ids: Tensor = tokenizer.apply_chat_template(turns, **how)["input_ids"]
    return ids


def measure(model: Any, draft: Any, prompts: Sequence[Tensor], new_tokens: int) -> dict[str, float]:
    """How many of the proposed tokens are accepted, and how fast both ways are.

    The first prompt is answered both ways once more beforehand, to warm up.
    """
    seconds, passes, written = {}, {}, {}
    ways = {"alone": None, "assisted": draft}
    for assistant in ways.values():
        answer(model, prompts[0], new_tokens, assistant)
    with _passes_of(model) as of_model, _passes_of(draft) as of_draft:
        for name, assistant in ways.items():
            of_model.clear()
            started = time.perf_counter()
            written[name] = [answer(model, prompt, new_tokens, assistant) for prompt in prompts]
            seconds[name], passes[name] = time.perf_counter() - started, len(of_model)
    num_tokens = sum(len(ids) for ids in written["alone"])
    same = [torch.equal(one, other) for one, other in zip(written["alone"], written["assisted"], strict=True)]
    return {
        "prompts": len(prompts),
        "new_tokens": num_tokens,
        "same_answers": sum(same),
        "proposed_tokens": len(of_draft),
        "share_accepted": (num_tokens - passes["assisted"]) / len(of_draft),  # each pass adds one of its own
        "passes_of_the_model_alone": passes["alone"],
        "passes_of_the_model_assisted": passes["assisted"],
        "tokens_per_second_alone": num_tokens / seconds["alone"],
        "tokens_per_second_assisted": num_tokens / seconds["assisted"],
    }


def answer(model: Any, prompt: Tensor, new_tokens: int, assistant: Any = None) -> Tensor:
    """The ids that the model writes after ``prompt``, greedily."""
    how = {"max_new_tokens": new_tokens, "do_sample": False, "assistant_model": assistant}
    ids: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    return ids[0, prompt.shape[1] :]


@contextmanager
def _passes_of(model: Any) -> Iterator[list[None]]:
    """Collects an entry for every forward pass."""
    passes: list[None] = []
    with model.register_forward_hook(lambda *call: passes.append(None)):
        yield passes


if __name__ == "__main__":
    sys.exit(main())
