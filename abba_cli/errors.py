"""The errors a user can cause and mend, as one family.

    AbbaError                 the command line prints it as one clear message and exits with code 1
    ├── RecipeError           a recipe that cannot be read or does not fit the schema
    ├── DataError             rows that are missing, empty, or do not fit the template
    ├── ModelError            a base model, tokenizer or adapter that cannot be had or does not fit
    ├── RunError              an output directory that cannot be used, a disk that is full
    ├── TrainingDiverged      a loss or gradient that is no longer a number
    ├── TrainingInterrupted   SIGINT or SIGTERM; the command line exits with 128 + the signal's number
    ├── LostContact           another process of the same run has ended
    └── ToldByMain            the main process of the same run has met an error, and tells of it

Anything else that escapes is a bug and keeps its traceback. Messages say what was found, what was expected and what to do.
"""


class AbbaError(Exception):
    """Root of the family; `str(error)` is the whole message for the user.

    Attributes:
        shared: Whether all processes of a run meet it together, so that the main one speaks for them.
    """

    shared = False


class RecipeError(AbbaError):
    """A recipe that cannot be read or does not fit the schema; one message holds every problem found."""


class DataError(AbbaError):
    """Training or evaluation rows that are missing, empty, or do not fit the template."""


class ModelError(AbbaError):
    """A base model, tokenizer or adapter that cannot be had or does not fit the recipe."""


class RunError(AbbaError):
    """An output directory that cannot be used, or a disk that cannot hold the run."""


class TrainingDiverged(AbbaError):
    """A loss or gradient norm that is no longer finite."""

    shared = True


class TrainingInterrupted(AbbaError):
    """Training stopped by a signal after saving a checkpoint.

    Args:
        message: What was saved and how to go on.
        signal_number: The signal received, so that a shell sees the exit code it expects.
    """

    shared = True

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class LostContact(AbbaError):
    """Another process of the run has ended, so that this one cannot go on."""

    shared = True


class ToldByMain(AbbaError):
    """What the main process of a run met, in the others."""

    shared = True
