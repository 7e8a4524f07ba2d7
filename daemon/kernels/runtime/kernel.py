"""Loaded machine code, and launches with little Python between call and driver.

Owns how arguments are packed and which launch attributes are set; refuses to know what is
computed. The thread in which the device is current. A launch may be captured into a CUDA graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from cuda.bindings import driver

from daemon.kernels.runtime.compiler import Cubin
from daemon.kernels.runtime.device_array import DeviceArray
from daemon.kernels.runtime.driver import checked

Dim = tuple[int, int, int]
TENSOR_MAP_BYTES = 128
NO_STREAM = 0
"""The stream of a device that computes nothing; no real one has this handle."""

_FIELDS: dict[str, Any] = {
    "pointer": ctypes.c_uint64,
    "int32": ctypes.c_int32,
    "int64": ctypes.c_int64,
    "float32": ctypes.c_float,
    "tensor_map": ctypes.c_byte * TENSOR_MAP_BYTES,
}


class Module:
    """A cubin, loaded on the device when one of its kernels first runs; they keep it loaded."""

    def __init__(self, cubin: Cubin) -> None:
        self._cubin = cubin

    def kernel(self, name: str, parameters: Sequence[str], shared_bytes: int = 0) -> Kernel:
        """One `extern "C"` kernel.

        Args:
            parameters: the kind of each parameter in order: "pointer", "int32", "int64", "float32",
                or "tensor_map" (a `const __grid_constant__` CUtensorMap).
            shared_bytes: the most dynamic shared memory that a launch will ask for.
        """
        return Kernel(name, parameters, shared_bytes, self)

    @cached_property
    def handle(self) -> driver.CUmodule:
        """The driver's own; waits for the compiler.

        Raises:
            KernelCompileError: it does not compile.
            DeviceError: the driver refuses it.
        """
        return checked(driver.cuModuleLoadData(self._cubin.code()), "load a kernel")


class Kernel:
    """A function on the device with a declared parameter list."""

    def __init__(
        self, name: str, parameters: Sequence[str], shared_bytes: int, module: Module
    ) -> None:
        self.name = name
        self._shared_bytes = shared_bytes
        self._module = module
        self._fields = [_FIELDS[kind]() for kind in parameters]
        self._tensor_maps = [kind == "tensor_map" for kind in parameters]
        addresses = [ctypes.addressof(field) for field in self._fields]
        self._addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self._configs: dict[tuple[Any, ...], driver.CUlaunchConfig] = {}

    @cached_property
    def _function(self) -> driver.CUfunction:
        found = driver.cuModuleGetFunction(self._module.handle, self.name.encode())
        function = checked(found, f"find {self.name}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        if self._shared_bytes > 0:
            limited = driver.cuFuncSetAttribute(function, attribute, self._shared_bytes)
            checked(limited, f"give {self.name} {self._shared_bytes} bytes of shared memory")
        return function

    def launch(
        self,
        stream: int,
        grid: Dim,
        block: Dim,
        *arguments: Any,
        shared_bytes: int = 0,
        cluster: Dim | None = None,
        dependent: bool = False,
    ) -> None:
        """Start the kernel; arguments are packed before this returns.

        Args:
            arguments: DeviceArray (or an address) for "pointer", numbers for the others, an encoded
                CUtensorMap for "tensor_map".
            cluster: blocks per cluster, on Hopper and later.
            dependent: may start before the previous kernel has ended; it must then wait with
                griddepcontrol before it reads what that kernel wrote.

        Raises:
            DeviceError: the launch was refused, or an earlier kernel failed.
        """
        if stream == NO_STREAM:
            return
        self._pack(arguments)
        key = (stream, grid, block, shared_bytes, cluster, dependent)
        config = self._configs.get(key)
        if config is None:
            config = self._configs[key] = _launch_config(*key)
        launched = driver.cuLaunchKernelEx(
            config, self._function, ctypes.addressof(self._addresses), 0
        )
        if launched[0] != driver.CUresult.CUDA_SUCCESS:
            checked(launched, f"launch {self.name}")

    def blocks_per_sm(self, threads: int, shared_bytes: int = 0) -> int:
        """How many blocks fit one multiprocessor at once."""
        count = driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            self._function, threads, shared_bytes
        )
        return int(checked(count, f"ask for the occupancy of {self.name}"))

    def _pack(self, arguments: tuple[Any, ...]) -> None:
        assert len(arguments) == len(self._fields), self.name
        for argument, field, is_map in zip(arguments, self._fields, self._tensor_maps, strict=True):
            if type(argument) is DeviceArray:
                field.value = argument.pointer
            elif is_map:
                ctypes.memmove(field, argument.getPtr(), TENSOR_MAP_BYTES)
            else:
                field.value = argument


def _launch_config(
    stream: int,
    grid: Dim,
    block: Dim,
    shared_bytes: int,
    cluster: Dim | None,
    dependent: bool,
) -> driver.CUlaunchConfig:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(stream)
    attributes = []
    if cluster is not None:
        attributes.append(_cluster_attribute(cluster))
    if dependent:
        attributes.append(_dependent_attribute())
    config.attrs = attributes
    config.numAttrs = len(attributes)
    return config


def _cluster_attribute(cluster: Dim) -> driver.CUlaunchAttribute:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    value = attribute.value.clusterDim
    value.x, value.y, value.z = cluster
    return attribute


def _dependent_attribute() -> driver.CUlaunchAttribute:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute
