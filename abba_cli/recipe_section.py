"""What the sections of a recipe have in common: strict reading, and the types of several keys."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


def _check_regex(value: str) -> str:
    """Refuse a broken regular expression here, where its line is known."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is not a valid regular expression ({error})") from None
    return value


Rank = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]
Regex = Annotated[Text, AfterValidator(_check_regex)]
LayerNames = Annotated[list[Text], Field(min_length=1)] | Regex


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values cannot be changed after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1, so that `learning_rate: yes` would pass."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("true_or_false", "true or false is not a value of this key")
        return value
