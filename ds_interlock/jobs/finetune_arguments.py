"""The arguments of ``finetune``, with the names that Hugging Face's scripts use."""

import re
from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal

from ds_interlock.errors import ConfigError
from ds_interlock.jobs.arguments import CompilationArguments, RunArguments, argument
from ds_interlock.jobs.data import TextArguments

_STEPS = 200  # unless --max_steps says otherwise


@dataclass(kw_only=True)
class ModelArguments:
    """The model, and how it is cut."""

    _argument_group_name: ClassVar[str] = "model"

    model: str = argument(MISSING, "folder, or name on the hub", metavar="NAME_OR_PATH")
    gguf_file: str | None = argument(None, "GGUF file in it; converted once, then cached", metavar="FILE")
    task: Literal["causal", "classification"] = argument("causal")
    text_model_only: bool = argument(False, "the text part of a model that also sees or hears")
    trust_remote_code: bool = argument(False, "run code that comes with the model")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = argument(
        None, "attention kernel (default: transformers' choice)"
    )
    stage_bounds: str | None = argument(
        None, "first layer of each stage, and number of layers (default: equal work)", metavar="0,9,18,33"
    )
    skip_load_check: bool = argument(
        False, "do not compare the pipeline with the whole model, which reads all weights on one rank"
    )


@dataclass(kw_only=True)
class DataArguments(TextArguments):
    """What it learns from."""

    train_file: list[str] = argument(
        [],
        "text, folders of it; JSON lines, CSV, Parquet: text, prompt + completion, messages; or FILE:WEIGHT",
        metavar="FILE",
    )
    seq_length: int = argument(512, "tokens of a sample (%(default)s)")
    packing: bool = argument(False, "several samples in a row, which do not see each other")
    packing_strategy: Literal["bfd", "wrapped"] = argument(
        "bfd", "bfd: whole samples (best fit); wrapped: all text in a line, cut into full rows (%(default)s)"
    )


@dataclass(kw_only=True)
class AdaptationArguments:
    """What trains, and how fast."""

    _argument_group_name: ClassVar[str] = "what trains, and how fast"

    learning_rate: float | None = argument(None, "default: that of the DeepSpeed config")
    output_router_logits: bool = argument(
        False, "learn the experts' balance too, as transformers does; default: as config.json says"
    )
    optim: Literal["adamw_torch", "adafactor", "sgd", "adamw_8bit", "paged_adamw_8bit"] | None = argument(
        None, "instead of the DeepSpeed config's; 8 bits need bitsandbytes"
    )
    freeze: list[str] = argument([], "names of parameters that do not train", metavar="REGEX")
    learning_rate_scale: list[str] = argument(
        [], "learning rates of parameters by name, as multiples of the config's", metavar="REGEX=FACTOR"
    )
    lora_r: int = argument(0, "rank of LoRA adapters; 0: train all weights")
    lora_alpha: int | None = argument(None, "default: twice the rank")
    lora_dropout: float = argument(0.0)
    lora_target_modules: list[str] = argument(
        ["all-linear"], "names, or one regular expression (all-linear)", metavar="NAME"
    )
    load_in_4bit: bool = argument(False, "QLoRA: linear weights of the blocks in 4 bits, by bitsandbytes")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = argument("nf4", "what the 4 bits stand for (%(default)s)")
    use_bnb_nested_quant: bool = argument(False, "the scales of these weights in 8 bits")


@dataclass(kw_only=True)
class FinetuneRunArguments(RunArguments):
    """The run, with this job's defaults."""

    max_steps: int = argument(-1, f"optimizer steps ({_STEPS}; --streaming needs it)")
    eval_steps: int = argument(0, "0: at start and end only (%(default)s)")
    eval_on_start: bool = argument(True, "evaluate before the first step")
    early_stopping_patience: int | None = argument(
        None, "stop after so many evaluations in a row without a lower validation loss"
    )
    gradient_checkpointing: bool = argument(False, "recompute each block's activations in its backward pass")
    max_eval_samples: int | None = argument(None, "default: all of them")
    max_train_samples: int | None = argument(None, "default: all of them")
    output_dir: str = argument("runs/finetune", "(%(default)s)")


@dataclass(kw_only=True)
class ResultArguments:
    """What is reported and exported."""

    _argument_group_name: ClassVar[str] = "results"

    report_to: Literal["none", "tensorboard"] = argument("none", "besides the config's monitors")
    load_best_model_at_end: bool = argument(False, "export the checkpoint with the lowest validation loss")
    export_heads: bool = argument(False, "write heads.safetensors beside the exported model")
    merge_adapter: bool = argument(False, "export the model with its LoRA adapters merged in")
    push_to_hub: bool = argument(False, "upload what is exported")
    hub_model_id: str | None = argument(None, "where to, as user/name", metavar="NAME")
    hub_private_repo: bool = argument(False, "make it private, if it is new")
    max_shard_size: str = argument("5GB", "of exported files (%(default)s)")


@dataclass(kw_only=True)
class FinetuneArguments(
    ModelArguments,
    DataArguments,
    AdaptationArguments,
    FinetuneRunArguments,
    CompilationArguments,
    ResultArguments,
):
    """All arguments of the job; ConfigError if they make no sense, as far as that takes no file."""

    _least: ClassVar[dict[str, int]] = {
        **RunArguments._least, "seq_length": 1, "max_eval_samples": 1, "max_train_samples": 1, "lora_r": 0,
        "preprocessing_num_workers": 1,
        "early_stopping_patience": 1,
    }  # fmt: skip
    _example_config: ClassVar[str] = "configs/finetune/interlock.json"

    def __post_init__(self) -> None:
        self.max_steps = self.steps(self.max_steps, _STEPS)
        super().__post_init__()
        if not re.fullmatch(r"[1-9]\d*[KMGT]B", self.max_shard_size.upper()):
            raise ConfigError(f"--max_shard_size {self.max_shard_size}: expected a size such as 5GB or 200MB")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"--lora_dropout is {self.lora_dropout:g}: expected a share, from 0 to below 1")
        if (len(self.parts) > 1 or self.weights) and self.task == "classification":
            raise ConfigError(f"--dataset {' '.join(self.dataset)}: --task classification takes no mixture")
        if self.streaming and (self.task == "classification" or self.max_train_samples):
            why = "--max_train_samples" if self.max_train_samples else "--task classification"
            raise ConfigError(f"--streaming does not know all samples beforehand, as {why} must")
        if self.packing and self.task == "classification":
            raise ConfigError("--packing is for language models: leave it out with --task classification")
        if self.merge_adapter and not self.lora_r:
            raise ConfigError("--merge_adapter: there is no adapter without --lora_r")
        if self.load_in_4bit and not self.lora_r:
            raise ConfigError("--load_in_4bit needs --lora_r: weights in 4 bits do not train, adapters do")
        if self.early_stopping_patience and not self.eval_steps:
            raise ConfigError("--early_stopping_patience needs --eval_steps: it counts these evaluations")
        if self.load_best_model_at_end and not self.eval_steps:
            raise ConfigError("--load_best_model_at_end needs --eval_steps: the best of which evaluations?")
        if self.push_to_hub and not self.hub_model_id:
            raise ConfigError("--push_to_hub needs --hub_model_id: where to?")
        if self.export_heads and self.exports_adapter:
            raise ConfigError("--export_heads writes heads beside a whole model: it needs --merge_adapter")

    @property
    def exports_adapter(self) -> bool:
        """Whether the LoRA adapters are exported by themselves, not a whole model."""
        return bool(self.lora_r) and self.task == "causal" and not self.merge_adapter
