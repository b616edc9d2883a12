"""LoRA (Hu et al. 2021) by PEFT: two small matrices beside each linear layer learn, everything else is frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

if TYPE_CHECKING:
    from peft import PeftModel

    from trainer.peft_adapter import Load


@dataclass(frozen=True)
class Config:
    r: Annotated[int, ">= 1"] = 16
    """Rank of the update of each layer."""
    alpha: Annotated[float, "> 0"] = 32.0
    """The update is multiplied by alpha / r, with `rslora` by alpha / √r."""
    dropout: Annotated[float, ">= 0", "< 1"] = 0.0
    """Part of an adapter's inputs left out in training."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (all but the output layer), names such as `[q_proj, v_proj]`, or one regular expression that a
    layer's whole name matches."""
    rslora: bool = False
    """Scale by alpha / √r (Kalajdzievski 2023): larger ranks then keep learning."""
    dora: bool = False
    """Learn the length of each row apart from its direction (Liu et al. 2024)."""
    init: Literal["default", "gaussian"] = "default"
    """How the first matrix of each pair begins: uniform, or gaussian; the second begins with zeros."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules that are trained whole, and saved with the adapter."""

    def __post_init__(self) -> None:
        from trainer.peft_adapter import check_options

        check_options(self)


def build(config: Config, load: Load) -> PeftModel:
    from trainer.peft_adapter import adapt

    return adapt(config, load)
