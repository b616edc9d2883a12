"""Weights and activations in int8, by onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trainer.export.programs import NotHere, first_line

SAMPLES = 256
"""Training samples that show which range each activation takes."""
_HEAVY = ("Conv", "MatMul", "Gemm")
"""Operators that take nearly all of the time; the others stay in fp32."""


def write(source: Path, path: Path, batches: Iterator[Mapping[str, NDArray[Any]]]) -> None:
    """Quantise the ONNX file `source`: weights by channel, activations by what `batches` show (a network without a
    convolution: as they come). Raises NotHere where onnxruntime can't."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    kinds = {node.op_type for node in onnx.load(source, load_external_data=False).graph.node}
    if not kinds & set(_HEAVY):
        raise NotHere("the model has neither a convolution nor a matrix product")
    try:
        with _quiet():
            if "Conv" in kinds:
                quantize_static(
                    source,
                    path,
                    _Reader(batches),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(_HEAVY),
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    # x86 before VNNI adds two products in 16 bits: 7 bits of weight keep that from overflowing.
                    reduce_range=True,
                )
            else:
                quantize_dynamic(
                    source, path, op_types_to_quantize=list(_HEAVY), per_channel=True, reduce_range=True,
                    weight_type=QuantType.QInt8,
                )  # fmt: skip
    except Exception as error:  # of the quantiser: about this model
        raise NotHere(f"onnxruntime's quantisation: {first_line(error)}") from error


class _Reader:
    """What onnxruntime asks for calibration data."""

    def __init__(self, batches: Iterator[Mapping[str, NDArray[Any]]]) -> None:
        self._batches = batches

    def get_next(self) -> Mapping[str, NDArray[Any]] | None:
        return next(self._batches, None)


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises a preprocessing that the exporter has done
    try:
        yield
    finally:
        logging.disable(before)
