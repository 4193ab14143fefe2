"""What every section of a configuration is made of."""

from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def parse_fraction(value: object) -> object:
    """Accept '8/255' beside 0.0314."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError("write a number or a fraction such as 8/255") from error
    return value


Share = Annotated[float, Field(ge=0, le=1)]
Epsilon = Annotated[float, BeforeValidator(parse_fraction), Field(ge=0, le=1)]
Radius = Annotated[float, BeforeValidator(parse_fraction), Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    PLACE: ClassVar[frozenset[str]] = frozenset()
    """Keys that say where something lies or how fast it runs; results do not depend on them."""

    def identity(self) -> dict[str, Any]:
        """What results depend on: every key but PLACE, as JSON values."""
        return self.model_dump(mode="json", exclude=set(self.PLACE))
