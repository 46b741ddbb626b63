"""New names in PEFT's closed list of methods."""

from __future__ import annotations

from peft.utils import PeftType


def add_peft_type(name: str) -> None:
    """Adds a method to PEFT's enum, without which `register_peft_method` refuses the name; nothing the second time.

    Ends when PEFT accepts names from outside: https://github.com/huggingface/peft (as of 0.21.2 it does not).
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # Before the map knows it: an enum refuses to reassign its members.
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._member_names_.append(name)
    PeftType._value2member_map_[name] = member
