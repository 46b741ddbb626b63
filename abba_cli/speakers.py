"""What text is generated with: a trained adapter, a base or a merged model, loaded from what a command names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from abba_cli.bases import Base, find_base
from abba_cli.errors import DataError, ModelError
from abba_cli.hub import explain, no_progress_bars
from abba_cli.loading import load_config, load_model, load_tokenizer
from abba_cli.outputs import read_record
from abba_cli.prompts import NAMED_LAYOUTS, Template, load_template
from abba_cli.recipe import ModelSection
from abba_cli.recorded_base import fit, recorded_base, resolve_base
from abba_cli.rundir import ADAPTER_FILES
from abba_cli.saved_adapter import SavedAdapter, find_adapter, open_adapter

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "int8"]
RUNS = Path("out")


@dataclass(frozen=True)
class Source:
    """What a command names; nothing at all is the newest finished run under out/.

    Args:
        adapter: A run directory, an adapter directory, a folder of runs, or a hub id.
        model: Hub id or directory of a base or merged model, in place of an adapter.
        base: In place of the adapter's recorded base; beside `model`, the base to compare it with.
        revision: Branch, tag or commit of the base, or of `model`.
        force: Take a base that is not the recorded one.
        dtype: Of the weights; None is that of the checkpoint, or of the adapter's training.
        quantization: Of the weights, while loading.
        template: none, alpaca, chat or a Jinja file; None is the run's, else the tokenizer's chat template, else none.
    """

    adapter: str | None = None
    model: str | None = None
    base: str | None = None
    revision: str | None = None
    force: bool = False
    dtype: Dtype | None = None
    quantization: Quantization = "none"
    template: str | None = None


@dataclass(frozen=True)
class Speaker:
    """A model that answers.

    Attributes:
        label: Its name for the user.
        model: The model, with the adapter on it if there is one.
        template: Lays a conversation out; holds the tokenizer.
        adapter_off: Answer with the adapter disabled: the base on the same weights.
        saved: The adapter on disk, where there is one.
        base: Hub id or path of its base.
    """

    label: str
    model: Any
    template: Template
    adapter_off: bool = False
    saved: SavedAdapter | None = None
    base: str | None = None

    @property
    def positions(self) -> int | None:
        """Tokens that the model has positions for; None where its configuration names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load_for_generation(source: Source, compare: bool = False) -> list[Speaker]:
    """Load what a command names.

    Args:
        source: What is named.
        compare: Add the base: with an adapter the same weights with the adapter disabled, with a model `source.base`.

    Returns:
        The speaker; with `compare` the base before it.

    Raises:
        ModelError: It is not there, does not fit its base, or there is no base to compare with.
        DataError: The template is unknown, or does not fit the tokenizer.
    """
    if source.model is not None:
        return _load_plain(source, compare)
    adapter = open_adapter(named_adapter(source.adapter))
    record = recorded_base(adapter)
    base = resolve_base([adapter], source.base, source.revision, source.force)
    section = _section(source, source.dtype or _known_dtype(record.dtype, otherwise="bfloat16"))
    folders = [adapter.path, *([adapter.run.path] if adapter.run else [])]
    tokenizer = load_tokenizer(_first_with_tokenizer(folders) or base, section)
    template = run_template(adapter, tokenizer, source.template)
    fit(adapter, load_config(base, section))
    model = load_model(base, section)
    with explain(f"adapter {adapter.path}"), no_progress_bars():
        tuned = PeftModel.from_pretrained(model, str(adapter.path)).eval()
    # A hub id stays as it was given; a folder of runs says which of them it is.
    local = source.adapter is None or Path(source.adapter).expanduser().is_dir()
    name = record.name or base.location
    speakers = [Speaker(str(adapter.path if local else source.adapter), tuned, template, saved=adapter, base=name)]
    if compare:
        speakers.insert(0, Speaker(f"{name}, without the adapter", tuned, template, adapter_off=True, base=name))
    return speakers


def run_template(adapter: SavedAdapter, tokenizer: PreTrainedTokenizerBase, asked: str | None = None) -> Template:
    """The prompt template that an adapter was trained with.

    Args:
        adapter: The adapter.
        tokenizer: Its tokenizer.
        asked: A template to take in place of the run's.

    Raises:
        DataError: The template is unknown, is gone, or does not fit the tokenizer.
    """
    return _template(asked or adapter.template, tokenizer, asked=asked is not None)


def _load_plain(source: Source, compare: bool) -> list[Speaker]:
    assert source.model is not None
    if compare and source.base is None:
        raise ModelError(f"to compare {source.model} with its base, name that with --base")
    speakers: list[Speaker] = []
    template: Template | None = None
    for name, revision in [(source.model, source.revision), *([(source.base, None)] if compare and source.base else [])]:
        folder = Path(name).expanduser()
        if (folder / ADAPTER_FILES[0]).is_file() and not (folder / "config.json").is_file():
            raise ModelError(f"{name} holds an adapter, not a model; give it with --adapter")
        base = find_base(ModelSection(name=str(folder) if folder.is_dir() else name, revision=revision))
        stored = getattr(load_config(base, _section(source, "float32")), "dtype", None)
        section = _section(source, source.dtype or _known_dtype(stored, otherwise="float32"))
        if template is None:  # both are given the same tokens
            tokenizer = load_tokenizer(base, section)
            named = source.template or read_record(folder).get("template")
            template = _template(named, tokenizer, asked=source.template is not None)
        model = load_model(base, section)
        model.eval()  # type: ignore[no-untyped-call]
        embeddings: Any = model.get_input_embeddings()
        rows = embeddings.weight.shape[0]
        if rows < len(template.tokenizer):
            raise ModelError(
                f"{name} has embeddings for {rows:,} tokens, the tokenizer of {source.model} has {len(template.tokenizer):,}; "
                "is it the base of another model?"
            )
        speakers.insert(0, Speaker(name, model, template))
    return speakers


def named_adapter(named: str | None) -> Path:
    """The folder of the adapter that a command names; nothing is the newest finished run under out/.

    Raises:
        ModelError: There is none.
    """
    if named is not None:
        return find_adapter(named)
    try:
        return find_adapter(str(RUNS))
    except ModelError as error:
        reason = str(error) if RUNS.is_dir() else f"there is no folder {RUNS}/ here"
        raise ModelError(
            f"no model is named, and {reason}; train with `abba train RECIPE`, or name one with --adapter or --model"
        ) from None


def _first_with_tokenizer(folders: Sequence[Path]) -> Base | None:
    return next((Base(str(folder)) for folder in folders if (folder / "tokenizer_config.json").is_file()), None)


def _known_dtype(stored: object, otherwise: Dtype) -> Dtype:
    known: tuple[Dtype, ...] = get_args(Dtype)
    return next((one for one in known if one == str(stored).removeprefix("torch.")), otherwise)


def _section(source: Source, dtype: Dtype) -> ModelSection:
    return ModelSection(name="base", dtype=dtype, quantization=source.quantization)


def _template(name: str | None, tokenizer: PreTrainedTokenizerBase, asked: bool) -> Template:
    """The template by its name, or the tokenizer's own where none is known."""
    if name is None:
        name = "chat" if tokenizer.chat_template else "none"
    if name == "chat" and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give --template alpaca, none or a Jinja file")
    if name not in ("chat", *NAMED_LAYOUTS) and not Path(name).expanduser().is_file():
        found = f"--template {name}" if asked else f"the run was trained with the template {name}, which is gone; --template"
        raise DataError(f"{found}: expected none, alpaca, chat or the path of a Jinja file")
    return load_template(name, tokenizer)
