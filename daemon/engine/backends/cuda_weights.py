"""Weights on the GPU: which kernel reads which tensor, and in what form it is uploaded.

Owns the handles that `cuda_backend` gives out for matrices, tables and vectors. Engine thread only.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from daemon.engine.memory.memory_plan import WEIGHTS, WORKSPACE
from daemon.engine.weights.gguf import Tensor
from daemon.engine.weights.quant_formats import dequantize
from daemon.errors import UnsupportedModel
from daemon.kernels.embed_rows import EmbedRows
from daemon.kernels.embed_tiles import EmbedTiles
from daemon.kernels.moe_pack import (
    ExpertMatrix,
    GatedExperts,
    RawExperts,
    pack_experts,
    pack_gated,
    pack_stacked,
)
from daemon.kernels.quant_convert import CONVERTED, ROUNDED
from daemon.kernels.quant_gemm import GemmKernels, GemmPlan
from daemon.kernels.quant_gemv import GemvKernels, Plan
from daemon.kernels.quant_pack import (
    PackedMatrix,
    Packer,
    RawMatrix,
    can_pair,
    kept_format,
)
from daemon.kernels.runtime.compiler import Compiler
from daemon.kernels.runtime.device import Device
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.upload import Uploader

logger = logging.getLogger(__name__)


class CudaMatrix(NamedTuple):
    """One packed matrix `[rows, columns]`, dealt to the kernels for few rows and for many."""

    rows: int
    gemv: Plan
    gemm: GemmPlan

    @property
    def is_paired(self) -> bool:
        """Whether a gated matrix's halves alternate, or are stacked."""
        return self.gemv.matrix.paired


class CudaTable(NamedTuple):
    """An embedding: `rows` u8, as in the file or as a matrix's tiles, and what reads that."""

    rows: DeviceArray
    kernel: EmbedRows | EmbedTiles


class WeightLoader:
    """Uploads tensors; used while the model is loaded.

    Attributes:
        stacked_columns: the widest gated matrix whose halves are stacked, 0 if there is none.
    """

    def __init__(
        self,
        device: Device,
        compiler: Compiler,
        gemv: GemvKernels,
        gemm: GemmKernels,
    ) -> None:
        self.stacked_columns = 0
        self._device = device
        self._compiler = compiler
        self._uploader = Uploader(device, WORKSPACE)
        self._packer = Packer(device, compiler, self._uploader)
        self._gemv = gemv
        self._gemm = gemm
        self._num_converted: Counter[str] = Counter()

    def matrix(self, parts: Sequence[Tensor]) -> CudaMatrix:
        """Rows of all parts stacked, each in its own format."""
        with self._device.region(WEIGHTS):
            return self._dealt(self._packer.pack([self._raw(part) for part in parts]))

    def gated_matrix(self, gate: Tensor, up: Tensor) -> CudaMatrix:
        """Rows of both interleaved, so that one block of a kernel sees a pair.

        Where formats differ the halves are stacked, and a kernel of its own joins the products.
        """
        pair = self._raw(gate), self._raw(up)
        with self._device.region(WEIGHTS):
            if can_pair(*pair):
                return self._dealt(self._packer.pack_paired(*pair))
            stacked = self._dealt(self._packer.pack(pair))
        self.stacked_columns = max(self.stacked_columns, stacked.rows)
        return stacked

    def table(self, tensor: Tensor) -> CudaTable:
        """An embedding in the file's own layout, or as Q8_0 where no kernel reads that."""
        raw = self._raw(tensor)
        name = "Q8_0" if raw.format in CONVERTED else raw.format
        with self._device.region(WEIGHTS):
            rows = self._packer.copy_rows(raw)
        return CudaTable(rows, EmbedRows(self._device, self._compiler, name))

    def tied_table(self, tensor: Tensor) -> tuple[CudaTable, CudaMatrix]:
        """The output matrix, whose tiles are looked up too, unless packing has rounded them."""
        head = self.matrix([tensor])
        if tensor.format.name == "F32":
            return self.table(tensor), head
        [segment] = head.gemv.matrix.segments
        kernel = EmbedTiles(self._device, self._compiler, segment.kind)
        return CudaTable(segment.tiles, kernel), head

    def vector(self, tensor: Tensor) -> DeviceArray:
        """Float32, in the tensor's own shape."""
        with self._device.region(WEIGHTS):
            values = self._device.allocate(tensor.shape, np.float32)
        if self._device.computes:
            content = dequantize(tensor.data, tensor.format, tensor.shape)
            self._uploader.copy(np.ascontiguousarray(content).reshape(-1).view(np.uint8), values)
        return values

    def router(self, parts: Sequence[Tensor]) -> DeviceArray:
        """Float32 `[sum of rows, columns]`."""
        shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        with self._device.region(WEIGHTS):
            values = self._device.allocate(shape, np.float32)
        if self._device.computes:
            content = [dequantize(part.data, part.format, part.shape) for part in parts]
            self._uploader.copy(np.concatenate(content).reshape(-1).view(np.uint8), values)
        return values

    def experts(self, tensor: Tensor) -> ExpertMatrix:
        """Each expert's rows, in the file's format."""
        with self._device.region(WEIGHTS):
            return pack_experts(self._packer, self._raw_experts(tensor))

    def gated_experts(self, parts: Sequence[Tensor]) -> GatedExperts:
        """Rows of gate and up interleaved; apart where their formats differ."""
        raw = [self._raw_experts(part) for part in parts]
        with self._device.region(WEIGHTS):
            return (
                pack_stacked(self._packer, *raw)
                if len(raw) == 1
                else pack_gated(self._packer, *raw)
            )

    def finish(self) -> None:
        """Wait until all has arrived; says once which formats were converted."""
        self._uploader.finish()
        for name, count in sorted(self._num_converted.items()):
            what = "rounded to" if name in ROUNDED else "kept, value for value, as"
            logger.warning("weights in %s are %s Q8_0 (tensors: %d)", name, what, count)
        self._num_converted.clear()

    def _raw(self, tensor: Tensor) -> RawMatrix:
        *leading, columns = tensor.shape
        if self._device.computes and tensor.format.name in CONVERTED:
            self._num_converted[tensor.format.name] += 1
        raw = RawMatrix(tensor.format.name, prod(leading), columns, tensor.data)
        try:
            kept_format(raw)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"tensor {tensor.name}: {error}") from None
        return raw

    def _raw_experts(self, tensor: Tensor) -> RawExperts:
        return RawExperts(tensor.shape[0], self._raw(tensor))

    def _dealt(self, packed: PackedMatrix) -> CudaMatrix:
        return CudaMatrix(packed.rows, self._gemv.plan(packed), self._gemm.plan(packed))
