"""QLoRA (Dettmers et al. 2023): LoRA beside base weights of 4 or 8 bits, by bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    bits: Literal["nf4", "fp4", "int8"] = "nf4"
    """Type of the base's linear layers: normal-float or float of 4 bits, or whole numbers of 8."""
    double_quantization: bool = True
    """Keep the scales of the 4-bit blocks in 8 bits, too: 0.4 bits less per weight."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type in which 4-bit layers compute; `int8` computes in float16."""

    def __post_init__(self) -> None:
        from trainer.peft_adapter import check_options

        check_options(self)


def build(config: Config, load: Load) -> PeftModel:
    from trainer.peft_adapter import adapt

    return adapt(config, load, quantization(config))


def quantization(config: Config) -> Any:
    """transformers' `BitsAndBytesConfig`. Raises UserError without bitsandbytes, or a platform that it runs on."""
    import torch
    from transformers import BitsAndBytesConfig

    _require_bitsandbytes()
    if config.bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bits,
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, config.compute_dtype),
    )


def _require_bitsandbytes() -> None:
    import torch

    from trainer.errors import UserError
    from trainer.peft_adapter import quiet_bitsandbytes

    quiet_bitsandbytes()
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # absent, or without its library for this platform
        raise UserError(
            f"adapter qlora: needs bitsandbytes ({type(error).__name__}: {error}): pip install bitsandbytes, or use "
            "adapter=lora"
        ) from error
    if torch.backends.mps.is_available() and not torch.cuda.is_available():
        raise UserError("adapter qlora: bitsandbytes has no kernels for Apple's GPUs; use adapter=lora")
