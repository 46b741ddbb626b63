"""Answers through vLLM, where that is installed: from a merged copy of the model on disk."""

import gc
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from abba_cli.errors import ModelError
from abba_cli.evaluation.decoding import Decoding
from abba_cli.evaluation.engine import Completion, Request
from abba_cli.speakers import Speaker

_MEMORY_SHARE = 0.9  # vLLM's own default for the share of the GPU's memory that it takes


def check_vllm(quantization: str, baseline: bool) -> None:
    """Make sure that vLLM can serve a model.

    Args:
        quantization: Of the weights while loading.
        baseline: Whether the base is asked for beside it.

    Raises:
        ModelError: It is not installed, the weights are quantised, which leaves nothing to be merged, or it is two models.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModelError("vllm is not installed; `pip install 'abba-cli[vllm]'`, or leave --backend vllm out")
    if quantization != "none":
        raise ModelError(f"--backend vllm takes a merged copy of the model, which --quantization {quantization} has none of")
    if baseline:
        raise ModelError("--backend vllm serves one model at a time; score the base with --model BASE, and use `abba compare`")


class VllmBackend:
    """Answers batches from a merged copy; use `serving` to make one.

    Args:
        engine: vLLM's `LLM` on the copy.
        speaker: Whose template ends answers.
    """

    def __init__(self, engine: Any, speaker: Speaker) -> None:
        self.engine, self.speaker = engine, speaker

    def __call__(self, batches: Sequence[Sequence[Request]], decoding: Decoding) -> Iterator[list[Completion]]:
        """Answer batches one after the other; vLLM itself decides what runs together inside of them."""
        from vllm import SamplingParams, TokensPrompt

        for batch in batches:
            settings = [
                SamplingParams(
                    temperature=decoding.temperature,
                    top_p=decoding.top_p,
                    top_k=decoding.top_k or -1,
                    max_tokens=request.max_tokens,
                    stop=list(request.stop) or None,
                    stop_token_ids=list(self.speaker.template.stop_token_ids),
                    seed=decoding.seed * 1_000_003 + request.number if decoding.temperature else None,
                )
                for request in batch
            ]
            prompts = [TokensPrompt(prompt_token_ids=list(request.ids)) for request in batch]
            outputs = self.engine.generate(prompts, settings, use_tqdm=False)
            yield [
                Completion(
                    request.number, one.outputs[0].text, len(one.outputs[0].token_ids), one.outputs[0].finish_reason == "stop"
                )
                for request, one in zip(batch, outputs, strict=True)
            ]


@contextmanager
def serving(speaker: Speaker) -> Iterator[VllmBackend]:
    """Write a merged copy of a model to a temporary folder, move the model out of the GPU's memory, and serve the copy.

    Args:
        speaker: With its adapter merged into its weights.

    Yields:
        What answers.
    """
    from vllm import LLM

    with tempfile.TemporaryDirectory(prefix="abba-vllm-") as folder:
        speaker.model.save_pretrained(folder)
        speaker.template.tokenizer.save_pretrained(folder)
        dtype = str(next(speaker.model.parameters()).dtype).removeprefix("torch.")
        speaker.model.to("cpu")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield VllmBackend(LLM(model=folder, dtype=dtype, gpu_memory_utilization=_MEMORY_SHARE), speaker)
