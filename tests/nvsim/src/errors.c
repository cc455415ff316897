/* See errors.h. */
#include "errors.h"

#include "nvml_abi.h"

#include <stddef.h>

static const char *const ERRORS[] = {
    [NVML_SUCCESS] = "Success",
    [NVML_UNINITIALIZED] = "Uninitialized",
    [NVML_INVALID_ARGUMENT] = "Invalid Argument",
    [NVML_NOT_SUPPORTED] = "Not Supported",
    [NVML_NO_PERMISSION] = "Insufficient Permissions",
    [NVML_NOT_FOUND] = "Not Found",
    [NVML_INSUFFICIENT_SIZE] = "Insufficient Size",
    [NVML_DRIVER_NOT_LOADED] = "Driver Not Loaded",
    [NVML_TIMEOUT] = "Timeout",
    [NVML_GPU_IS_LOST] = "GPU is lost",
    [NVML_RESET_REQUIRED] = "GPU requires restart",
    [NVML_IN_USE] = "In use by another client",
    [NVML_MEMORY] = "Insufficient Memory",
    [NVML_INSUFFICIENT_RESOURCES] = "Insufficient Resources",
    [NVML_ARGUMENT_VERSION_MISMATCH] = "The provided version is invalid/unsupported",
    [NVML_NOT_READY] = "The system is not ready for the request",
    [NVML_INVALID_STATE] = "Invalid state to perform the requested operation",
};

const char *nvml_error(int code)
{
    if (code >= 0 && code < (int)(sizeof ERRORS / sizeof ERRORS[0]) && ERRORS[code] != NULL)
        return ERRORS[code];
    return "Unknown Error";
}
