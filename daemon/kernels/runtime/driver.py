"""One call into the CUDA driver, with its status turned into our errors.

Owns the mapping of driver statuses to messages; knows no arrays and no kernels. Any thread.
"""

from typing import Any

from cuda.bindings import driver

from daemon.errors import DeviceError, DeviceLost, NoDevice, OutOfDeviceMemory

NO_DEVICE = {
    driver.CUresult.CUDA_ERROR_NO_DEVICE,
    driver.CUresult.CUDA_ERROR_NOT_INITIALIZED,
    driver.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
    driver.CUresult.CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE,
}

LOST = frozenset(
    f"CUDA_ERROR_{name}"
    for name in (
        "ILLEGAL_ADDRESS", "LAUNCH_TIMEOUT", "LAUNCH_FAILED", "ASSERT", "HARDWARE_STACK_ERROR",
        "ILLEGAL_INSTRUCTION", "MISALIGNED_ADDRESS", "INVALID_ADDRESS_SPACE", "INVALID_PC",
        "ECC_UNCORRECTABLE", "NVLINK_UNCORRECTABLE", "CONTAINED", "CONTEXT_IS_DESTROYED",
        "DEVICE_UNAVAILABLE",
    )
)  # fmt: skip
"""After these every further call fails as well, says the driver's manual."""


def checked(result: tuple[Any, ...], doing: str) -> Any:
    """The value of a driver call `(status, value...)`; None, one value or a tuple of values.

    Args:
        doing: what was tried, for the message, such as "allocate 512 MiB".

    Raises:
        OutOfDeviceMemory, NoDevice, DeviceLost, DeviceError: by the status.
    """
    status, values = result[0], result[1:]
    if status != driver.CUresult.CUDA_SUCCESS:
        raise _error(status, doing)
    return values[0] if len(values) == 1 else values or None


def _error(status: driver.CUresult, doing: str) -> DeviceError:
    _, text = driver.cuGetErrorString(status)
    reason = text.decode() if text else status.name
    message = f"Could not {doing}: {reason} ({status.name})."
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        return OutOfDeviceMemory(message)
    if status in NO_DEVICE:
        return NoDevice(message)
    if status.name in LOST:
        return DeviceLost(message)
    return DeviceError(message)
