"""`abba doctor`: true about this machine, and clear about what is missing."""

import importlib.metadata
from collections.abc import Callable

import pytest
import torch
from packaging.requirements import Requirement

from abba_cli import diagnosis
from abba_cli.diagnosis import Finding, examine


def finding(name: str, topic: str | None = None) -> Finding:
    return next(one for one in examine() if one.name == name and topic in (None, one.topic))


def bound(name: str) -> str:
    """What abba's own metadata asks of a package, such as >=1.2."""
    asked = [Requirement(text) for text in importlib.metadata.requires("abba-cli") or []]
    return str(next(one.specifier for one in asked if one.name == name))


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Other versions of packages than those installed."""
    real = diagnosis._installed
    monkeypatch.setattr(diagnosis, "_installed", lambda name: versions[name] if name in versions else real(name))


def test_this_machine_is_fit() -> None:
    findings = examine()
    assert not [one for one in findings if one.state == "broken"]
    assert finding("torch").found == torch.__version__
    assert finding("bitsandbytes", "kernels").found.startswith("quantises to nf4")
    required = [text for text in importlib.metadata.requires("abba-cli") or [] if "extra ==" not in text]
    assert len([one for one in findings if one.topic == "packages"]) == 1 + len(required)


def test_a_missing_and_an_old_package_are_told_with_the_command_that_mends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, transformers="4.40.0", peft=None, gguf=None)
    old, missing, extra = finding("transformers"), finding("peft"), finding("gguf")
    wanted = bound("transformers")
    assert (old.state, old.found, old.advice) == ("broken", f"4.40.0, expected {wanted}", f"pip install 'transformers{wanted}'")
    assert (missing.state, missing.found) == ("broken", "not installed")
    assert (extra.state, extra.advice) == ("absent", "for GGUF bases, GGUF exports: pip install 'abba-cli[gguf]'")


def test_a_token_is_seen_but_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    assert finding("login").found == "yes"
    assert "secretsecret" not in repr(examine())
    monkeypatch.delenv("HF_TOKEN")


def test_the_command_shows_it_and_fails_where_abba_cannot_work(
    abba: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = abba("doctor")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "abba can train here."
    pretend(monkeypatch, peft=None)
    code, out, _ = abba("doctor")
    assert code == 1
    assert f"pip install 'peft{bound('peft')}'" in out
    assert out.splitlines()[-1] == "abba cannot work as it is: peft"
