"""What the Hugging Face hub and its libraries say when something cannot be had, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from abba_cli.errors import AbbaError, ModelError


@contextmanager
def explain(what: str, page: str = "", doing: str = "load") -> Iterator[None]:
    """Turn a failure to load (or to do something else with) `what` into a ModelError that says what to do.

    Args:
        what: What was being loaded, for the message, such as `model meta-llama/Llama-3.2-3B`.
        page: Its hub id, for the address of its page.
        doing: The verb.

    Raises:
        ModelError: In place of what the libraries raise for files that are not there, or are not what they should be.
    """
    try:
        yield
    except AbbaError:
        raise
    except Exception as error:
        if (reason := reason_for(error, page)) is None:
            expected = isinstance(error, (*_EXPECTED, *_BROKEN)) or type(error) is Exception
            if not expected or (isinstance(error, RuntimeError) and "memory" in str(error)):
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            if isinstance(error, _BROKEN) or type(error) is Exception:  # the latter are those of tokenizers
                reason = f"its files are broken, or of a kind that is not known here ({type(error).__name__}: {reason})"
        if doing != "load" and reason == _UNREACHABLE:
            reason = "the hub cannot be reached; check the network"
        raise ModelError(f"cannot {doing} {what}: {reason}") from error


def reason_for(error: BaseException, page: str) -> str | None:
    """Why the hub, or a folder in its layout, did not give something; None if the error is of another kind."""
    address = f"https://huggingface.co/{page}" if page else "its page"
    login = "run `hf auth login` (or set HF_TOKEN)"
    text = " ".join(str(one) for one in _chain(error))
    for cause in _chain(error):
        if isinstance(cause, GatedRepoError):
            return f"it is gated; ask for access on {address}, then {login} with the account that was granted it"
        if isinstance(cause, (RevisionNotFoundError, EntryNotFoundError)) and not isinstance(cause, LocalEntryNotFoundError):
            if "safetensors" in text and ".bin" in text:
                return _PICKLE
            return f"the repository has no such file or revision; look at {address}"
        if isinstance(cause, RepositoryNotFoundError):
            return f"there is no such repository, or it is private: check the name on {address}, and {login} if it is private"
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status = cause.response.status_code
            if status in (401, 403):
                return f"the hub refused access ({status}); look at {address}, and {login}"
            return f"the hub answered with status {status}; try again later"
        if isinstance(cause, HFValidationError):
            return "it is neither a local directory nor a hub id (OWNER/NAME)"
    if "trust_remote_code" in text:
        return (
            "it needs Python code that its repository brings along, which is not run unasked; read that code, and set "
            "model.trust_remote_code: true if you trust it"
        )
    if "no file named model.safetensors" in text or ("safetensors" in text and "does not appear to have" in text):
        return _PICKLE if ".bin" in text or "model.safetensors" in text else None
    for cause in _chain(error):
        offline = isinstance(cause, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError))
        # Of the hub's HTTP client, whose package has another name in every generation.
        if offline or type(cause).__name__ in _TRANSPORT:
            return _UNREACHABLE
    if "couldn't connect to" in text or "We couldn't connect" in text:
        return _UNREACHABLE
    return None


_EXPECTED = (OSError, ValueError, KeyError, ImportError, EOFError, HfHubHTTPError, SafetensorError, RuntimeError)
_BROKEN = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, StrictDataclassError)
"""What values of a wrong kind in a model's files end in, wherever a library first uses them."""
_TRANSPORT = ("ConnectError", "ConnectTimeout", "ProxyError", "ReadError", "ReadTimeout", "WriteError", "WriteTimeout")
_UNREACHABLE = "the hub cannot be reached and it is not in the local cache; check the network, or name a local directory"
_PICKLE = (
    "it has no safetensors weights; pickled weights (.bin) can run code and are not read. Convert them once with "
    "`AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(DIR)` if you trust them, and name DIR"
)


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return chain


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence the libraries' own bars for small local steps; downloads keep theirs."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
