"""The form in which two LaTeX answers are compared: spelling, spacing, units and delimiters that mean nothing are gone."""

import re

# Spelled otherwise, meaning the same. In order: later rules read what earlier ones wrote.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\! ?|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])|\\(?:displaystyle|textstyle|limits|boldsymbol)(?![A-Za-z])", ""),
        (r"\{,\}", ","),
        (r"\\\\\[[^\]]{0,10}\]", r"\\\\"),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s+", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|operatorname|hbox) ?\{", r"\\text{"),
        (r"\\([lg])eq(?![A-Za-z])", r"\\\1e"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\^ ?(?:\\circ(?![A-Za-z])|\{ ?\\circ ?\})|\\degrees?(?![A-Za-z])|°", ""),
        (r"\\?\$|[£€]", ""),
        (r"(?<!\\)%", r"\\%"),
        (r"\\text\{ ?,? ?(?:and|or),? ?\}|,? (?:and|or) (?=\S)", ", "),
        (r"\\text\{([^{}]*\d[^{}]*)\}", r"\1"),
    ]
]
_UNICODE = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013", "-"),  # minus sign, en dash
        **dict.fromkeys("\u00a0\u2009\u202f", " "),  # spaces that do not break, thin ones
        **{"\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": "/", "\u00b1": r"\pm ", "\u00b2": "^2", "\u00b3": "^3"},
        **{"\u222a": r"\cup ", "\u2229": r"\cap ", "\u2208": r"\in ", "\u2205": r"\emptyset ", "\u221e": r"\infty "},
        **{"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\neq ", "\u03c0": r"\pi ", "\u03b8": r"\theta "},
    }
)
_UNIT = re.compile(r"(?<=\S) ?\\text\{[^{}]*\}(?: ?\^ ?(?:\d|\{ ?\d ?\}))?\Z")
_PLAIN_UNIT = re.compile(
    r"(?<=[\dA-Za-z})])(?:(?: [A-Za-z]{3,20}\.?| ?(?:mm|cm|km|kg|ft|in|oz|lb|lbs|mi|yd|hr|mph))(?:\^\{?\d\}?)?){1,5}\Z"
)
_WORDS = re.compile(r"\\text\{([^{}]*)\}")
_BASED = re.compile(r"(?P<digits>[0-9A-Za-z]+)_(?:\{(?P<braced>\d+)\}|(?P<base>\d+))")


def normal_form(text: str) -> str:
    """Return a LaTeX answer in the form for comparing; "" if its braces do not match."""
    text = text.strip().translate(_UNICODE)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _without_delimiters(text)
    while (shorter := _UNIT.sub("", text)) != text:
        text = shorter
    text = re.sub(r"(?<![\d.])\d{1,3}(?:,\d{3})+(?!\d)", lambda match: match.group().replace(",", ""), text)
    text = re.sub(r"(?<![\d.])[1-9]\d{0,2}(?: \d{3})+(?![\d/])", lambda match: match.group().replace(" ", ""), text)
    text = re.sub(r"(?<![\d.])(\d{1,9}) (\d{1,9}) ?/ ?(\d{1,9})(?![\d.])", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)
    text = text.replace(",", ", ").strip()
    return text if _balanced(text) else ""


def as_words(form: str) -> str | None:
    r"""Return what a form that is a text says, \text{Evelyn}, in small letters; None for a formula."""
    match = _WORDS.fullmatch(form)
    return _letters(match[1]) if match else None


def same_words(words: str, form: str) -> bool:
    r"""Tell whether a form says these words, in \text{} or not; brackets around the letter of a choice, (C), do not matter."""
    return bool(words) and words == _letters(_WORDS.sub(r"\1", form))


def numeral_with_base(form: str) -> tuple[str, str] | None:
    """Return the digits and the base of a numeral such as 1101_2."""
    match = _BASED.fullmatch(form)
    return (match["digits"].casefold(), match["braced"] or match["base"]) if match else None


def without_plain_units(form: str) -> str:
    r"""Return a form without the words after it that are not in \text{}: 12 apples, 5 cm."""
    return _PLAIN_UNIT.sub("", form)


def has_variables(form: str) -> bool:
    """Tell whether a form holds letters that belong to no LaTeX command: x, but not \\pi."""
    return re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", form)) is not None


def for_algebra(form: str) -> str | None:
    """Return a form as the parser must be given it; None if it would read something else than is written.

    latex2sympy adds what stands side by side, as in a mixed number: 12 13 is 25 to it, and 3(4) is 7.
    """
    if re.search(r"\d \d|\d ?\\\\ ?\d", re.sub(r"\\begin\{[a-z]*matrix\}.*\\end\{[a-z]*matrix\}", "", form)):
        return None
    return re.sub(r"(?<![_^])([\d)])\(", r"\1\\cdot(", form)


def brackets(form: str) -> str:
    r"""Return the kind of bracket around all of a form with commas: "(" (of points and open intervals), "{", or ""."""
    if "," not in form:
        return ""
    if form.startswith(r"\{") and form.endswith(r"\}"):
        return "{"
    return "(" if form[0] in "([" and form[-1] in ")]" else ""


def _without_delimiters(text: str) -> str:
    text = text.strip()
    for opening, closing in ((r"\[", r"\]"), (r"\(", r"\)")):
        if text.startswith(opening) and text.endswith(closing):
            text = text[2:-2].strip()
    while text.startswith((r"\boxed{", r"\fbox{")) and text.endswith("}"):
        text = text[text.index("{") + 1 : -1].strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def _letters(text: str) -> str:
    text = " ".join(text.split()).casefold().strip(".")
    return re.sub(r"\A\(([a-z])\)\Z", r"\1", text)


def _balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text):
        depth += (brace == "{") - (brace == "}")
        if depth < 0:
            return False
    return depth == 0
