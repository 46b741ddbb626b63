"""The process that compares formulas: one JSON question a line in, `true` or `false` a line out; it ends when out of time."""

import builtins
import json
import math
import os
import re
import signal
import unicodedata
from typing import Any

MEMORY_BYTES = 4 << 30

# Sympy's parser runs its text as Python. Names that may be called there; all other known names are refused.
_HARMLESS = re.compile(
    "sqrt|cbrt|root|exp|log|ln|a?sin|a?cos|a?tan|cot|sec|csc|sinh|cosh|tanh|pi|oo|nan|zoo|Abs|Min|Max|floor|ceiling|sign|"
    "factorial|binomial|gcd|lcm|Rational|Integer|Float|re|im|arg|conjugate|gamma|beta|zeta|True|False|[A-Za-z]"
)
# Double underscores, quotes, attributes, loops.
_UNSAFE = re.compile(r"""__|["'`;\\]|:=|\.\s*[^\W\d]|[^\W\d]\s*\.(?!\d)|\b(?:lambda|for|import|while|yield|await)\b""")


def main() -> None:
    """Answer questions until the input ends."""
    questions, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)  # nothing that a parser runs reads questions or writes answers
    os.dup2(nowhere, 1)
    try:
        _limit()
        import math_verify  # noqa: F401
        import sympy  # noqa: F401
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=answers, flush=True)
        return
    print("ready", file=answers, flush=True)
    for line in questions:
        judge, gold, prediction, seconds = json.loads(line)
        _alarm(seconds)
        try:
            equal = {"math-verify": math_verify_equal, "released": released_equal}[judge](gold, prediction)
        except Exception:
            equal = False  # algebra that crashes has proved nothing
        _alarm(0)
        print("true" if equal else "false", file=answers, flush=True)


def math_verify_equal(gold: str, prediction: str) -> bool:
    """Compare two LaTeX formulas with math-verify, as exactly as it can."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    # Its removal of units takes the variables of 5c and 3h for units; abba removes them before.
    normalization = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all")
    config = LatexExtractionConfig(normalization_config=normalization, boxed_match_priority=0)
    parsed = [
        parse(f"\\boxed{{{formula}}}", [config], fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
        for formula in (gold, prediction)
    ]
    if not all(parsed):
        return False
    # The defaults, 6 and 15 places, take 0.333333 for 1/3 and 2^-60 for 2^-61.
    return bool(verify(parsed[0][:1], parsed[1][:1], float_rounding=12, numeric_precision=100, timeout_seconds=None))


def released_equal(gold: str, prediction: str) -> bool:
    """Compare as the released code does: sympy's Python parser, then a difference of zero, or values within 0.1%."""
    from sympy import N, simplify

    if not (_is_safe(gold) and _is_safe(prediction)):
        return False
    left, right = _python_formula(prediction), _python_formula(gold)
    try:
        if simplify(left - right) == 0:
            return True
    except Exception:  # two texts, a tuple, a function: the next comparison is tried
        pass
    return math.isclose(N(left), N(right), rel_tol=1e-3)


def _python_formula(text: str) -> Any:
    from sympy.parsing.sympy_parser import parse_expr

    try:
        return parse_expr(text)
    except Exception:  # LaTeX mostly: it stays text
        return text


def _is_safe(text: str) -> bool:
    """Tell whether sympy's parser, which runs its text, can be given a text that a model wrote."""
    import sympy

    text = unicodedata.normalize("NFKC", text)  # as Python itself reads names
    names = set(re.findall(r"[^\W\d]\w*", text))
    known = {name for name in names if hasattr(sympy, name) or hasattr(builtins, name)}
    return not _UNSAFE.search(text) and all(map(_HARMLESS.fullmatch, known))


def _alarm(seconds: float) -> None:
    """End this process after a processor time, or ten times that by the clock; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def _limit() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for alarm in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(alarm, signal.SIG_DFL)  # ends the process, even inside a C function
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF, signal.SIGALRM])
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard), hard))


if __name__ == "__main__":
    main()
