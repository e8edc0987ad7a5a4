"""The neutral knobs, written once for all frameworks: every adapter renders them into its native configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Autoscale(BaseModel):
    """Scaling by queue depth: keep about ``target_ongoing`` requests per replica, within ``min`` and ``max`` replicas.

    How quickly: requests are averaged over ``averaged_over_s``, and one replica more or fewer must have been wanted for
    ``up_after_s`` or ``down_after_s``; ``None`` leaves the framework's own default alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    min: int = Field(ge=0)
    max: int = Field(ge=1)
    target_ongoing: float = Field(gt=0)
    up_after_s: float | None = Field(default=None, ge=0)
    down_after_s: float | None = Field(default=None, ge=0)
    averaged_over_s: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Autoscale:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max})")
        return self


class Tuning(BaseModel):
    """The neutral knobs. ``None`` leaves the framework's own default alone; ``Tuning()`` is ``tuning: defaults``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    max_batch: int | None = Field(default=None, ge=1)
    batch_window_ms: float | None = Field(default=None, ge=0)
    replicas: int | None = Field(default=None, ge=1)
    queue_limit: int | None = Field(default=None, ge=1)
    server_timeout_s: float | None = Field(default=None, gt=0)
    autoscale: Autoscale | None = None

    def chosen(self) -> dict[str, object]:
        """The knobs that are set, by name."""
        return {name: getattr(self, name) for name in type(self).model_fields if getattr(self, name) is not None}


class NoOptions(BaseModel):
    """For adapters without options of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
