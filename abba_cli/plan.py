"""What a run will train and about how much memory it will take, worked out from shapes alone.

T = tokens in one forward pass, b = bytes of the base's dtype, V = vocabulary, W0 of a linear layer is (m, n).
"""

from dataclasses import dataclass

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from abba_cli.adapting import AdaptedLayer, adapted_layers
from abba_cli.recipe import Recipe

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# nf4 with double quantisation: 4 bits, an 8-bit scale for 64 values and a 32-bit one for 256 of those (QLoRA, arXiv 2305.14314,
# section 3). int8: a byte, and a scale for each row that does not count.
_QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
# Resident memory of a process that has imported torch, transformers, peft and datasets (measured, CPU build); a CUDA context
# takes about as much on its device.
_RUNTIME_BYTES = 600_000_000


@dataclass(frozen=True)
class Plan:
    """The size of a run.

    Args:
        model: Name of the base in the recipe.
        layers: The adapted layers.
        trainable: Parameters that are trained.
        total: Parameters in all.
        steps: Optimizer steps.
        tokens_per_step: Upper bound of the tokens in one optimizer step of one process.
        memory: Bytes on each device, by use.
    """

    model: str
    layers: list[AdaptedLayer]
    trainable: int
    total: int
    steps: int
    tokens_per_step: int
    memory: dict[str, int]


def make_plan(recipe: Recipe, config: PreTrainedConfig, adapted: PeftModel, steps: int, longest: int) -> Plan:
    """Size up a run.

    Args:
        recipe: The recipe.
        config: The base's configuration.
        adapted: The base's skeleton with the adapter on it.
        steps: Optimizer steps.
        longest: Tokens of the longest training sequence.
    """
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in adapted.parameters())
    tokens = recipe.training.batch_size * longest
    layers = adapted_layers(adapted)
    factor_bytes = _DTYPE_BYTES[recipe.adapter.dtype]
    state_bytes = 2 if recipe.training.optimizer == "adamw_8bit" else 2 * factor_bytes
    memory = {
        "Python and libraries": _RUNTIME_BYTES,
        "base weights": _base_bytes(recipe, adapted, trainable),
        "factors and gradients": 2 * factor_bytes * trainable,
        "optimizer state": state_bytes * trainable,
        "activations": _activation_bytes(recipe, adapted, tokens),
        "logits": _logit_bytes(recipe, config, tokens),
        # The effective weight of one layer, in float32 and in the base's dtype, lives while that layer computes.
        "one effective weight": max(layer.m * layer.n for layer in layers) * (4 + _DTYPE_BYTES[recipe.model.dtype]),
    }
    return Plan(
        model=recipe.model.name,
        layers=layers,
        trainable=trainable,
        total=total,
        steps=steps,
        tokens_per_step=tokens * recipe.training.gradient_accumulation,
        memory=memory,
    )


def _base(adapted: PeftModel) -> PreTrainedModel:
    base = adapted.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def _linear_shapes(adapted: PeftModel) -> list[tuple[int, int]]:
    """(m, n) of every linear layer but the head."""
    head = _base(adapted).get_output_embeddings()  # type: ignore[no-untyped-call]
    shapes = []
    for module in adapted.modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            shapes.append((module.out_features, module.in_features))
        elif isinstance(module, Conv1D):
            shapes.append((module.weight.shape[1], module.weight.shape[0]))
    return shapes


def _base_bytes(recipe: Recipe, adapted: PeftModel, trainable: int) -> int:
    everything = sum(parameter.numel() for parameter in adapted.parameters()) - trainable
    quantized = sum(m * n for m, n in _linear_shapes(adapted)) if recipe.model.quantization != "none" else 0
    plain = everything - quantized
    return int(plain * _DTYPE_BYTES[recipe.model.dtype] + quantized * _QUANTIZED_BYTES.get(recipe.model.quantization, 0))


def _activation_bytes(recipe: Recipe, adapted: PeftModel, tokens: int) -> int:
    """Kept for backward: inputs and outputs of the linear layers, and what norms and residuals keep beside them."""
    width = _DTYPE_BYTES[recipe.model.dtype]
    config = _base(adapted).config.get_text_config()
    blocks, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    outputs = sum(m for m, _ in _linear_shapes(adapted))
    inputs = sum(n for _, n in _linear_shapes(adapted)) * 4 // 7  # q/k/v share one input, gate/up another
    norms = 2 * blocks * hidden * 2  # each keeps a float32 copy of its input, two of the dtype's values
    whole = tokens * width * (outputs + inputs + norms)
    if recipe.training.gradient_checkpointing:
        return tokens * width * hidden * blocks + whole // blocks
    return whole


def _logit_bytes(recipe: Recipe, config: PreTrainedConfig, tokens: int) -> int:
    """The logits, their float32 copy for the loss, and its gradient."""
    return int(tokens * config.get_text_config().vocab_size * (_DTYPE_BYTES[recipe.model.dtype] + 8))
