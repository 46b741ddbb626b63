"""A model in memory as the harness asks it: answers are kept as they come, shared among processes, never asked for twice."""

import copy
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from abba_cli.disk import disk_errors
from abba_cli.errors import ModelError
from abba_cli.events import Event, Stage
from abba_cli.rendering import within_limits
from abba_cli.speakers import Speaker

Answer = tuple[float, bool] | float | str

_AUTO = {"cpu": 16, "cuda": 64}
_LOGITS_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}
"""What the logits of a batch, and their logarithms beside them, may take where the batch size is automatic."""
_SECONDS_BETWEEN_EVENTS = 0.2


class AskedModel(HFLM):  # type: ignore[misc]  # untyped
    """The harness's transformers model around one in memory.

    Attributes:
        computed: Answers that this process computed; all others were kept.
        task: What is asked now, for the user.
    """

    def __init__(
        self,
        speaker: Speaker,
        fingerprint: str,
        cache: Path,
        seed: int,
        batch_size: int | str,
        notify: Callable[[Event], None],
    ) -> None:
        # A copy: the harness may give the tokenizer another padding token.
        tokenizer = copy.deepcopy(speaker.template.tokenizer)
        super().__init__(pretrained=_Untouched(speaker.model), tokenizer=tokenizer, backend="causal", batch_size=1)
        self.computed = 0
        self.task = ""
        self._asked_batch_size = batch_size
        self._seed = seed
        self._notify = notify
        self._process = PartialState()
        self._done = self._total = 0
        self._told = 0.0
        self._kept = _Kept(cache, self._cache_name(fingerprint), self._process)
        self.cache_hook = _Hook(self._keep)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Answer]:
        return self._answer("generate_until", requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        apply = super().apply_chat_template
        what = f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'}"
        return within_limits(what, lambda: str(apply(chat_history, add_generation_prompt)))

    def close(self) -> None:
        """Close the file of kept answers."""
        self._kept.close()

    def _answer(self, kind: str, requests: Sequence[Any]) -> list[Answer]:
        """Answers in the order of the requests; those that are not kept are computed, in equal parts by every process."""
        keys = [self._key(kind, request.args) for request in requests]
        # Repeated draws of one prompt need an answer each.
        needed = {key: count if key.endswith("sampled") else 1 for key, count in Counter(keys).items()}
        contexts: dict[Any, int] = {}
        mine = []
        for key, request in zip(keys, requests, strict=True):
            if needed[key] > self._kept.count(key):
                needed[key] -= 1
                # Choices of one question stay together: the harness may compute them in one pass.
                number = contexts.setdefault(request.args[0], len(contexts))
                if number % self._process.num_processes == self._process.process_index:
                    mine.append((key, request))
        self._done, self._total = 0, len(mine)
        if mine:
            self._compute(kind, mine)
        self._kept.share()
        taken: Counter[str] = Counter()
        answers = []
        for key in keys:
            answers.append(self._kept.answer(key, taken[key]))
            taken[key] += key.endswith("sampled")
        return answers

    def _compute(self, kind: str, mine: list[tuple[str, Any]]) -> None:
        self.batch_size_per_gpu = self._batch_size(kind, [request for _, request in mine])
        wanted = Counter(key for key, _ in mine)
        start = {key: self._kept.count(key) for key in wanted}
        devices = [self.device] if self.device.type == "cuda" else []
        ask = getattr(super(), kind)
        with torch.random.fork_rng(devices=devices):
            # Not the draws that an evaluation made before it was interrupted.
            torch.manual_seed(self._seed + 1_000_003 * self._process.process_index + sum(start.values()))
            while True:
                got = {key: self._kept.count(key) - start[key] for key in wanted}
                left = []
                for key, request in mine:
                    got[key] -= 1
                    if got[key] < 0:
                        left.append(request)
                try:
                    # Of whole documents it tells only when all that it was given are done.
                    for part in [[one] for one in left] if kind == "loglikelihood_rolling" else [left]:
                        if part:
                            ask(part, disable_tqdm=True)
                    break
                except (RuntimeError, MemoryError) as error:
                    if self.batch_size_per_gpu == 1 or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                        raise
                except AssertionError as error:
                    if "Invalid configuration" not in str(error):
                        raise
                    raise ModelError(f"task {self.task}: {str(error).removeprefix('Invalid configuration: ')}") from None
                self.batch_size_per_gpu //= 2
                clear_device_cache(garbage_collection=True)

    def _batch_size(self, kind: str, requests: Sequence[Any]) -> int:
        if isinstance(self._asked_batch_size, int):
            return self._asked_batch_size
        device = "cuda" if self.device.type == "cuda" else "cpu"
        if kind == "generate_until":
            return _AUTO[device]
        # Three letters a token at least, in most languages; where that is wrong the batch size backs off.
        longest: int = min(self.max_length, max(sum(len(part) for part in request.args) for request in requests) // 3 + 1)
        rows: int = _LOGITS_BYTES[device] // (longest * len(self.tokenizer) * 8)
        return max(1, min(_AUTO[device], rows))

    def _keep(self, kind: str, arguments: Iterable[Any], answer: Answer) -> None:
        self._kept.add(self._key(kind, arguments), answer)
        self.computed += 1
        self._done = min(self._done + 1, self._total)
        now = time.monotonic()
        if now - self._told > _SECONDS_BETWEEN_EVENTS or self._done == self._total:
            self._told = now
            self._notify(Stage(f"{self.task}: asking", self._done, self._total))

    def _key(self, kind: str, arguments: Iterable[Any]) -> str:
        arguments = list(arguments)
        sampled = kind == "generate_until" and arguments[1].get("do_sample", False)
        content = json.dumps([kind, arguments, self._seed if sampled else None], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:32] + ("-sampled" if sampled else "")

    def _cache_name(self, fingerprint: str) -> str:
        """A name of the cache that changes with everything outside a request that changes its answer."""
        settings = [
            lm_eval.__version__,
            _tokenizer_text(self.tokenizer),
            self.max_length,
            self.max_gen_toks,
            self.model.generation_config.to_json_string() if self.model.generation_config is not None else "",
        ]
        return f"harness-{fingerprint}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"


class _Untouched:
    """A model that can be asked, but is no torch module: the harness ties the weights of modules it is given."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        return self._model(*arguments, **settings)


class _Hook:
    """In place of the harness's own, which is told of every answer at once."""

    def __init__(self, keep: Callable[[str, Iterable[Any], Answer], None]) -> None:
        self.add_partial = keep


class _Kept:
    """Answers by key, on disk line by line as they come; every process writes a file of its own and has all in memory."""

    def __init__(self, cache: Path, name: str, process: PartialState) -> None:
        self._process = process
        self._cache = cache
        self._new: list[tuple[str, Answer]] = []
        with disk_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
            # One process reads for all: another might see lines that a quick one has already added.
            found = [_read(cache, name) if process.is_main_process else {}]
            if process.num_processes > 1:
                broadcast_object_list(found)
            self._all: dict[str, list[Answer]] = found[0]
            self._file = (cache / f"{name}.{process.process_index}.jsonl").open("a", encoding="utf-8")
            self._file.write("\n" if self._file.tell() else "")  # after a line that a killed process left half written

    def count(self, key: str) -> int:
        return len(self._all.get(key, ()))

    def answer(self, key: str, number: int) -> Answer:
        return self._all[key][number]

    def add(self, key: str, answer: Answer) -> None:
        self._all.setdefault(key, []).append(answer)
        self._new.append((key, answer))
        with disk_errors(self._cache):
            self._file.write(json.dumps([key, answer]) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def share(self) -> None:
        """Give every process the new answers of all, in the same order."""
        if self._process.num_processes > 1:
            for key, _ in self._new:
                self._all[key].pop()
            for key, answer in gather_object(self._new):
                self._all.setdefault(key, []).append(answer)
        self._new.clear()


def _read(cache: Path, name: str) -> dict[str, list[Answer]]:
    found: dict[str, list[Answer]] = {}
    for file in sorted(cache.glob(f"{name}.*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                key, answer = json.loads(line)
            except (ValueError, RecursionError):  # what a killed process left half written
                continue
            found.setdefault(key, []).append(tuple(answer) if isinstance(answer, list) else answer)
    return found


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that makes a text's tokens what they are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return f"{table} {tokenizer.special_tokens_map} {getattr(tokenizer, 'add_bos_token', None)}"
