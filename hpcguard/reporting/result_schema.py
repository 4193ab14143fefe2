"""What a result says beside the accuracies of attacks, as `hpcguard.evaluate` writes it; all of it may be absent."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class _Mean(_Part):
    mean: float | None
    low: float | None
    high: float | None


class _Known(_Part):
    mean: float
    low: float
    high: float


class _Curve(_Part):
    attack: str
    norm: str
    of: int = Field(gt=0)
    radii: list[float] = Field(min_length=2)
    right: list[int]
    accuracy: list[Share]
    low: list[Share]
    high: list[Share]

    @model_validator(mode="after")
    def _a_row_a_radius(self) -> "_Curve":
        if any(len(each) != len(self.radii) for each in (self.right, self.accuracy, self.low, self.high)):
            raise ValueError("has not one row a radius")
        return self


class _Alarm(_Part):
    name: str
    measured: dict[str, float]
    limit: float
    red: bool | None
    meaning: str


class _Corruption(_Known):
    severities: list[Share] = Field(min_length=5, max_length=5)


class _Corruptions(_Part):
    name: str
    images: int = Field(gt=0)
    clean: Share
    mean_accuracy: _Known
    corruptions: dict[str, _Corruption] = Field(min_length=1)


class _Success(_Part):
    flagged: Share
    random: Share
    rest: Share
    difference: _Known
    p_value: Share


class _Growth(_Part):
    ratio: _Mean


class _Claim(_Part):
    eps: float
    images: int
    success: _Success
    growth: _Growth
    per_area: _Growth


class _Vulnerability(_Part):
    images: int
    rows: list[_Claim]


class _Group(_Part):
    __pydantic_extra__: dict[str, float | None]

    images: float
    right: float


class _Bound(_Part):
    norm: str
    images: int
    all: _Group | None = None
    flagged: _Group | None = None
    unflagged: _Group | None = None
    flagged_constant_share: Share | None = None


class _Hardware(_Part):
    threads: int = Field(1, gt=0)
    gpu: bool = False


class _Sections(_Part):
    trusted: bool = True
    curve: _Curve | None = None
    alarms: list[_Alarm] = []
    corruptions: _Corruptions | None = None
    explanations: dict[str, _Mean] | None = None
    vulnerability: _Vulnerability | None = None
    bound: _Bound | None = None
    explanation_jaccard5: Share | None = None
    hardware: _Hardware = _Hardware()
    outcomes_sha256: str | None = None
    tables_sha256: dict[str, str] = {}

    @model_validator(mode="after")
    def _trusted_if_nothing_is_red(self) -> "_Sections":
        red = [row.name for row in self.alarms if row.red]
        if self.alarms and self.trusted == bool(red):
            raise ValueError(f"trusted is {self.trusted}, with {len(red)} red alarms")
        return self


def check_sections(values: Any) -> None:
    """Raise ValueError, naming the key, unless what is there is whole."""
    try:
        _Sections.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "result"
        raise ValueError(f"{key[:200]}: {first['msg'][:200]}") from error
