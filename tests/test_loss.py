"""The loss of a batch: what the collator says of it, and that it is transformers' own, head left out or not, wrapped or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_batches import packed
from test_head import model_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abba_cli.adapter import AbbaConfig
from abba_cli.batches import IGNORED, PackedBatches, PaddedBatches
from abba_cli.head import separable_head
from abba_cli.loss import SupervisedBatches, keeps_logits, row_losses, token_losses, training_loss

TARGETS = {"gpt2": ["c_attn", "c_proj"], "bloom": ["query_key_value"], "opt": ["q_proj", "fc2"], "lfm2": ["q_proj", "in_proj"]}


def rows() -> list[dict[str, list[int]]]:
    """Rows with prompts of other lengths, one without anything supervised, one supervised from its first token."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, prompt in ((9, 4), (5, 5), (12, 2), (7, 0)):
        ids = torch.randint(3, 97, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return made


SUPERVISED = 5 + 0 + 10 + 6


def adapted(name: str, **settings: Any) -> PeftModel:
    model = model_of(name)
    torch.manual_seed(1)
    config = AbbaConfig(r1=3, r2=2, alpha=2, target_modules=TARGETS.get(name, ["q_proj", "v_proj"]), **settings)
    made = get_peft_model(model, config)
    assert isinstance(made, PeftModel)
    for key, parameter in made.named_parameters():
        if ".abba_B2." in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.train()


def gradients(model: torch.nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert found
    assert all(gradient.abs().sum() > 0 for gradient in found)
    return found


@pytest.mark.parametrize("keep", [True, False])
def test_a_batch_says_what_is_supervised(keep: bool) -> None:
    batch = SupervisedBatches(PaddedBatches(0), keep)(rows())
    assert batch["tokens"] == 9 + 5 + 12 + 7
    length = len(batch["logits_to_keep"]) if keep else batch["labels"].shape[1]
    found = []
    for index, target in zip(batch["supervised"].tolist(), batch["targets"].tolist(), strict=True):
        row, column = divmod(index, length)
        found.append((row, int(batch["logits_to_keep"][column]) if keep else column, target))
    expected = [
        (number, position - 1, label)
        for number, row in enumerate(rows())
        for position, label in enumerate(row["labels"])
        if position > 0 and label != IGNORED
    ]
    assert found == expected
    assert len(found) == SUPERVISED
    if keep:
        assert batch["logits_to_keep"].tolist() == sorted({position for _, position, _ in expected})
    else:
        assert "logits_to_keep" not in batch


@pytest.mark.parametrize("left_out", [True, False])
@pytest.mark.parametrize("name", ["llama tied", "gemma2", "granite", "cohere", "gpt2", "phi", "bloom", "opt", "lfm2"])
def test_loss_and_gradients_are_those_of_transformers(name: str, left_out: bool) -> None:
    model = adapted(name).eval()  # GPT-2 has a dropout of its own
    head = separable_head(model.get_base_model())
    assert head is not None
    padded = PaddedBatches(0)(rows())
    expected = model(**padded, num_items_in_batch=None).loss
    reference = gradients(model, expected)
    keep = keeps_logits(model.get_base_model())
    batch = SupervisedBatches(PaddedBatches(0), keep)(rows())
    loss = training_loss(model, batch, None, head if left_out else None)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for found, gradient in zip(gradients(model, loss), reference, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-7)
    scaled = training_loss(model, batch, torch.tensor(2 * SUPERVISED), head if left_out else None)
    torch.testing.assert_close(scaled, expected / 2, rtol=1e-6, atol=1e-6)


def test_double_precision_agrees_to_its_own_rounding() -> None:
    model = adapted("llama").double()
    head = separable_head(model.get_base_model())
    batch = SupervisedBatches(PaddedBatches(0))(rows())
    losses = [training_loss(model, batch, 7, way) for way in (head, None)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-13, atol=1e-13)
    ours, plain = (gradients(model, loss) for loss in losses)
    for found, gradient in zip(ours, plain, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_packed_rows_have_the_loss_of_padded_ones() -> None:
    model = adapted("llama")
    head = separable_head(model.get_base_model())
    padded = SupervisedBatches(PaddedBatches(0))(rows())
    # The first token of a packed row has a token before it, which does not foretell it.
    documents = [{**row, "labels": [IGNORED, *row["labels"][1:]]} for row in rows()]
    sequences = SupervisedBatches(PackedBatches())([packed(documents[:3]), packed(documents[3:])])
    assert sequences["tokens"] == padded["tokens"]
    losses = [token_losses(model, batch, head) for batch in (padded, sequences)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left_out", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_losses_of_rows(keep: bool, left_out: bool) -> None:
    model = adapted("llama").eval()
    head = separable_head(model.get_base_model()) if left_out else None
    with torch.no_grad():
        sums, counts = row_losses(model, SupervisedBatches(PaddedBatches(0), keep)(rows()), head)
        alone = [training_loss(model, SupervisedBatches(PaddedBatches(0), keep)([row]), 1, None) for row in rows()]
    assert counts.tolist() == [5, 0, 10, 6]
    torch.testing.assert_close(sums, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_a_batch_without_anything_supervised_teaches_nothing() -> None:
    model = adapted("llama")
    head = separable_head(model.get_base_model())
    loss = training_loss(model, SupervisedBatches(PaddedBatches(0))(rows()[1:2]), 4, head)
    assert loss.item() == 0.0
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


class Waiting(TorchDispatchMode):
    """Counts the operations that would make a processor wait for its GPU."""

    names = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.item", "aten.equal")
    found: tuple[str, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        boolean = "index" in str(func) and any(
            tensor.dtype in (torch.bool, torch.uint8)
            for tensor in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
            if isinstance(tensor, Tensor)
        )
        if boolean or str(func).startswith(self.names):
            self.found += (str(func),)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("left_out", [True, False])
def test_a_step_never_waits_for_its_device(left_out: bool) -> None:
    model = adapted("llama")
    head = separable_head(model.get_base_model()) if left_out else None
    batch = SupervisedBatches(PaddedBatches(0))(rows())
    with Waiting() as upstream:  # transformers looks at the positions
        model(input_ids=batch["input_ids"], use_cache=False)
    with Waiting() as watched:
        training_loss(model, batch, torch.tensor(9), head).backward()
    assert watched.found == upstream.found
    with Waiting() as watched:
        (batch["labels"][batch["labels"] != IGNORED]).sum().item()
    assert len(watched.found) >= 2  # it does see them


def test_a_trained_head_keeps_its_gradient(tmp_path: Path) -> None:
    model = adapted("llama", modules_to_save=["lm_head"])
    assert separable_head(model.get_base_model()) is None
    training_loss(model, SupervisedBatches(PaddedBatches(0))(rows()), None, None).backward()
    assert any("lm_head" in name and parameter.grad is not None for name, parameter in model.named_parameters())
