"""The schema of a recipe: every key, its type, default, unit and meaning stand here and nowhere else.

The reference page (docs/recipe-reference.md) and `abba schema` are generated from these classes. A recipe is frozen:
whoever needs another one makes it with `recipe_file.load_recipe(path, overrides)`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from abba_cli.recipe_adapter import AdapterSection
from abba_cli.recipe_section import Section, Share, Text


def _list_of_one(value: Any) -> Any:
    """A single source may be written without the dash, and a bare string is its path."""
    sources = value if isinstance(value, list) else [value]
    return [{"path": source} if isinstance(source, str) else source for source in sources]


class ModelSection(Section):
    """The base model, which stays frozen."""

    name: str = Field(
        min_length=1,
        description="Hub id, local directory, or `package:IMPORT_NAME` for the folder of an installed Python package.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id; null is the default branch.")
    gguf_file: str | None = Field(
        None,
        description="A GGUF file inside `name` to read the model from. It is dequantised once into a cached "
        "checkpoint, which is then the recorded base.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="Data type of the base's weights.")
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="Quantise the base while loading (bitsandbytes): nf4 with double quantisation, or int8."
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "auto", description="Attention implementation of transformers; auto is the model's own default."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that the model's repository brings along.")


class SourceSection(Section):
    """One data source. Rows of known columns need no mapping."""

    path: str = Field(
        min_length=1,
        description="Hub id, local file or directory (json, jsonl, csv, parquet, txt), or `package:IMPORT_NAME/FILE`.",
    )
    subset: str | None = Field(None, description="Configuration name of a hub data set.")
    split: str = Field("train", description="Split, with an optional slice: `train[:20000]`. Local files are `train`.")
    prompt: str | None = Field(None, description="Jinja template over the row's columns: what the model is given.")
    completion: str | None = Field(None, description="Jinja template over the row's columns: what it must answer.")
    max_rows: int | None = Field(None, ge=1, description="Keep only the first N rows after the split.")
    weight: float = Field(
        1.0, gt=0, description="How often each row is seen: 2 repeats every row, 0.5 takes a seeded half of them."
    )

    @model_validator(mode="after")
    def _completion_needs_prompt(self) -> "SourceSection":
        if self.prompt is not None and self.completion is None:
            raise ValueError("prompt needs a completion beside it")
        return self


SourceAsWritten = SourceSection | Text
Sources = Annotated[
    list[SourceSection],
    BeforeValidator(_list_of_one, json_schema_input_type=SourceAsWritten | list[SourceAsWritten]),
]


class DataSection(Section):
    """What is learned."""

    train: Annotated[Sources, Field(min_length=1)] = Field(description="Training sources, mixed by `weight`.")
    eval: Sources = Field([], description="Held-out sources for the evaluation loss.")
    template: str = Field(
        "chat",
        min_length=1,
        description="How prompt and completion are laid out: none, alpaca, chat (the tokenizer's own), or the path of "
        "a Jinja file.",
    )
    max_length_tokens: int = Field(1024, ge=8, description="Longer rows are cut at the end, and counted in the audit.")
    packing: bool = Field(
        False, description="Put several rows into one sequence of max_length_tokens; rows never see each other."
    )
    supervise: Literal["completion", "all", "assistant"] = Field(
        "completion",
        description="Where the loss is taken: the completion (the last answer), every token, or all assistant turns.",
    )
    allow_unsupervised_rows: bool = Field(
        False, description="Drop rows without a supervised token instead of stopping with an error."
    )


class TrainingSection(Section):
    """How it is learned."""

    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides epochs.")
    batch_size: int = Field(1, ge=1, description="Rows in a forward pass of each process (packed sequences with packing).")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes in an optimizer step.")
    group_by_length: bool = Field(
        False, description="Put rows of about the same length into one batch: less padding, another order of the data."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    scheduler: Literal["linear", "cosine", "constant"] = Field("cosine", description="Course after the warm-up.")
    warmup_ratio: Share = Field(0.02, description="Share of the steps in which the learning rate rises from zero.")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="AdamW (fused), or AdamW with 8-bit state (bitsandbytes)."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 turns it off.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward: less memory, more time.")
    compile: bool = Field(False, description="torch.compile the model.")
    seed: int = Field(42, ge=0, description="Seed of the factors' start, the order of the data and the dropout.")


class EvaluationSection(Section):
    """Evaluation during training, on `data.eval`."""

    every_steps: int | None = Field(
        None, ge=1, description="Steps between evaluations; null evaluates at the start and the end only."
    )
    at_start: bool = Field(True, description="Evaluate before the first step too, to know where the run began.")
    batch_size: int | None = Field(None, ge=1, description="Rows in a forward pass; null takes training.batch_size.")
    keep_best: bool = Field(
        True, description="With every_steps: end with the adapter of the lowest evaluation loss, not with the last one."
    )
    patience: int | None = Field(
        None, ge=1, description="With every_steps: stop after this many evaluations without a lower loss."
    )
    samples: int = Field(0, ge=0, description="Held-out prompts to answer at each evaluation, written to samples.jsonl.")
    sample_max_tokens: int = Field(128, ge=1, description="Longest sample answer, in tokens.")


class CheckpointsSection(Section):
    """Checkpoints that a stopped run goes on from."""

    every_steps: int = Field(200, ge=1, description="Steps between checkpoints; one is always written at the end.")
    keep: int = Field(2, ge=1, description="Newest checkpoints to keep; the best one is kept besides.")


class DistributedSection(Section):
    """How several processes share the work; nothing of it matters to one."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = Field(
        "auto",
        description="ddp: each device holds the whole base. fsdp: each holds a share of it and gathers one block at a time "
        "(FSDP2). deepspeed: see zero_stage. auto: ddp where the forecast fits into the devices' memory, else fsdp.",
    )
    zero_stage: Literal[2, 3] = Field(
        2,
        description="With deepspeed. 2: the factors' gradients and the optimizer's state are shared out. 3: the base as well.",
    )
    offload: bool = Field(
        False,
        description="With fsdp and deepspeed: keep the shares in the memory of the CPU; what is needed comes to the device.",
    )

    @property
    def shares_base(self) -> bool:
        """Whether several processes have a share of the base each."""
        return self.strategy == "fsdp" or (self.strategy == "deepspeed" and self.zero_stage == 3)

    @model_validator(mode="after")
    def _keys_need_strategy(self) -> "DistributedSection":
        if self.offload and self.strategy not in ("fsdp", "deepspeed"):
            raise ValueError("offload needs shares to keep: set distributed.strategy to fsdp")
        if self.zero_stage == 3 and self.strategy != "deepspeed":
            raise ValueError("zero_stage is DeepSpeed's: set distributed.strategy to deepspeed")
        return self


class LoggingSection(Section):
    """Metrics, which always go to metrics.jsonl as well."""

    every_steps: int = Field(1, ge=1, description="Steps between metrics.")
    logger: Literal["none", "tensorboard", "wandb", "trackio"] = Field("none", description="A service that gets them too.")


class Recipe(Section):
    """One training run. `Recipe.model_validate(dict)` builds it in Python, `recipe_file.load_recipe` from YAML."""

    model_config = ConfigDict(title="abba recipe", json_schema_extra={"$schema": "https://json-schema.org/draft/2020-12/schema"})

    model: ModelSection = Field(description="The base model, which stays frozen.")
    adapter: AdapterSection = Field(AdapterSection(), description="What is trained.")
    data: DataSection = Field(description="What is learned.")
    training: TrainingSection = Field(TrainingSection(), description="How it is learned.")
    evaluation: EvaluationSection = Field(EvaluationSection(), description="Evaluation during training.")
    checkpoints: CheckpointsSection = Field(CheckpointsSection(), description="Checkpoints to go on from.")
    distributed: DistributedSection = Field(DistributedSection(), description="How several processes share the work.")
    logging: LoggingSection = Field(LoggingSection(), description="Metrics.")
    output: str = Field(min_length=1, description="The run directory; relative to the current directory.")

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "Recipe":
        if not self.data.eval:
            asked = [key for key in ("every_steps", "patience") if getattr(self.evaluation, key) is not None]
            asked += ["samples"] if self.evaluation.samples else []
            if asked:
                raise ValueError(f"evaluation.{asked[0]} needs held-out rows: add data.eval")
        if self.data.packing and self.training.group_by_length:
            raise ValueError("data.packing leaves no padding that training.group_by_length could save: set one of them to false")
        strategy = self.distributed.strategy
        kind, method = self.model.quantization, self.adapter.method
        if (kind != "none" and method in ("pissa", "hira", "loha", "full")) or (kind == "int8" and method == "dora"):
            raise ValueError(f"model.quantization: {method} takes no {kind} base: set it to none, or choose another method")
        if kind != "none" and self.adapter.pairs > 2:
            raise ValueError(f"model.quantization: a chain of pairs takes no {kind} base: set it to none, or adapter.pairs to 2")
        if strategy in ("fsdp", "deepspeed"):
            if not self.adapter.is_abba:
                raise ValueError(f"distributed.strategy: {strategy} trains abba alone; set it to ddp for the methods of PEFT")
            if self.model.quantization == "int8":
                raise ValueError(f"distributed.strategy: {strategy} takes no int8 base: set model.quantization to nf4 or none")
            if self.training.compile:
                raise ValueError(f"training.compile does not go with distributed.strategy: {strategy}; set one of them otherwise")
        if self.evaluation.patience is not None and self.evaluation.every_steps is None:
            raise ValueError("evaluation.patience counts evaluations: set evaluation.every_steps")
        return self
