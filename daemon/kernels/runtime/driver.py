"""One call into the CUDA driver, with its status turned into our errors.

Owns the mapping of driver statuses to messages; knows no arrays and no kernels. Any thread.
"""

from typing import Any

from cuda.bindings import driver

from daemon.errors import DeviceError, NoDevice, OutOfDeviceMemory

NO_DEVICE = {
    driver.CUresult.CUDA_ERROR_NO_DEVICE,
    driver.CUresult.CUDA_ERROR_NOT_INITIALIZED,
    driver.CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
    driver.CUresult.CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE,
}


def checked(result: tuple[Any, ...], doing: str) -> Any:
    """The value of a driver call `(status, value...)`; None, one value or a tuple of values.

    Args:
        doing: what was tried, for the message, such as "allocate 512 MiB".

    Raises:
        OutOfDeviceMemory, NoDevice, DeviceError: by the status.
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
    return DeviceError(message)
