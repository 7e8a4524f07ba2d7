"""Weights on the GPU: which kernel reads which tensor, and in what form it is uploaded.

Owns the handles that `cuda_backend` gives out for matrices, tables and vectors. Engine thread only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from daemon.engine.weights.gguf import Tensor
from daemon.engine.weights.quant_formats import dequantize
from daemon.errors import UnsupportedModel
from daemon.kernels.embed_rows import FORMATS as EMBED_FORMATS
from daemon.kernels.embed_rows import EmbedRows
from daemon.kernels.quant_gemm import GemmKernels, GemmPlan
from daemon.kernels.quant_gemv import GemvKernels, Plan
from daemon.kernels.quant_pack import PackedMatrix, Packer, RawMatrix, as_q8_0, can_pair
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray


class CudaMatrix(NamedTuple):
    """One packed matrix `[rows, columns]`, dealt to the kernels for few rows and for many."""

    rows: int
    gemv: Plan
    gemm: GemmPlan


class CudaTable(NamedTuple):
    """An embedding: `rows` u8 `[rows, bytes of a row]` as in the file, and what reads it."""

    tensor: Tensor
    rows: DeviceArray
    kernel: EmbedRows


class WeightLoader:
    """Uploads tensors; used while the model is loaded."""

    def __init__(
        self, device: Device, compiler: Compiler, gemv: GemvKernels, gemm: GemmKernels
    ) -> None:
        self._device = device
        self._compiler = compiler
        self._packer = Packer(device, compiler)
        self._gemv = gemv
        self._gemm = gemm

    def matrix(self, parts: Sequence[Tensor]) -> CudaMatrix:
        """Rows of all parts stacked, each in its own format."""
        return self._dealt(self._packer.pack([_raw(part) for part in parts]))

    def gated_matrix(self, gate: Tensor, up: Tensor) -> CudaMatrix:
        """Rows of both interleaved, so that one block of a kernel sees a pair.

        Raises:
            UnsupportedModel: the two have different formats.
        """
        pair = _raw(gate), _raw(up)
        if not can_pair(*pair):
            raise UnsupportedModel(
                f"{gate.name} is {gate.format.name} {gate.shape} and {up.name} {up.format.name} "
                f"{up.shape}: the GPU kernels need a pair of one format, in multiples of 32 rows"
            )
        return self._dealt(self._packer.pack_paired(*pair))

    def table(self, tensor: Tensor) -> CudaTable:
        """An embedding in the file's own layout, or as Q8_0 where no kernel reads that."""
        raw = _raw(tensor)
        format_name, data = raw.format, raw.data
        if format_name not in EMBED_FORMATS:
            format_name, data = "Q8_0", as_q8_0(raw)
        rows = self._device.to_device(np.ascontiguousarray(data).reshape(raw.rows, -1))
        return CudaTable(tensor, rows, EmbedRows(self._device, self._compiler, format_name))

    def vector(self, tensor: Tensor) -> DeviceArray:
        """Float32, in the tensor's own shape."""
        values = dequantize(tensor.data, tensor.format, tensor.shape)
        return self._device.to_device(np.ascontiguousarray(values))

    def _dealt(self, packed: PackedMatrix) -> CudaMatrix:
        return CudaMatrix(packed.rows, self._gemv.plan(packed), self._gemm.plan(packed))


def _raw(tensor: Tensor) -> RawMatrix:
    rows, columns = tensor.shape
    return RawMatrix(tensor.format.name, rows, columns, tensor.data)
