"""Sample answers to held-out prompts, at every evaluation."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from abba_cli.disk import append_jsonl, disk_errors
from abba_cli.events import Listener, Sampled
from abba_cli.prepared import PreparedData
from abba_cli.recipe import Recipe
from abba_cli.rundir import RunDir
from abba_cli.sharding import is_sharded


class Sampler(TrainerCallback):
    """Answers `evaluation.samples` held-out prompts greedily after each evaluation and writes them to samples.jsonl."""

    def __init__(
        self, recipe: Recipe, run: RunDir, tokenizer: PreTrainedTokenizerBase, data: PreparedData, listen: Listener
    ) -> None:
        self.recipe, self.run, self.tokenizer, self.data, self.listen = recipe, run, tokenizer, data, listen

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero and not is_sharded(model):
            return  # a model that is shared out can only be asked by all together
        for prompt in self.data.held_out:
            tokens = torch.tensor([prompt.input_ids], device=model.device)
            answer = self.tokenizer.decode(self._generate(model, tokens), skip_special_tokens=True)
            if not state.is_world_process_zero:
                continue
            row = {
                "step": state.global_step,
                "source": prompt.source,
                "row": prompt.row,
                "prompt": prompt.text,
                "answer": answer,
                "reference": prompt.reference,
            }
            with disk_errors(self.run.path):
                append_jsonl(self.run.samples_file, row)
            self.listen(Sampled(state.global_step, prompt.text, str(answer), prompt.reference))

    def _generate(self, model: Any, tokens: torch.Tensor) -> list[int]:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            output = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=self.recipe.evaluation.sample_max_tokens,
                do_sample=False,
                eos_token_id=list(self.data.template.stop_token_ids),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        model.train(was_training)
        answer: list[int] = output[0, tokens.shape[1] :].tolist()
        return answer
