/* CUDA's calls about the driver and its devices: errors, versions, names, addresses, attributes. */
#include "cuda_call.h"

#include <stdio.h>
#include <string.h>

static const struct {
    int code;
    const char *name, *text;
} ERRORS[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {4, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {220, "CUDA_ERROR_NVLINK_UNCORRECTABLE", "uncorrectable NVLink error detected during the execution"},
    {304, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {800, "CUDA_ERROR_NOT_PERMITTED", "operation not permitted"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {802, "CUDA_ERROR_SYSTEM_NOT_READY", "system not yet initialized"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static int say(int code, bool name, const char **text)
{
    *text = NULL;
    for (size_t row = 0; row < sizeof ERRORS / sizeof ERRORS[0]; row++)
        if (ERRORS[row].code == code)
            *text = name ? ERRORS[row].name : ERRORS[row].text;
    return *text == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUDA cuGetErrorName(int code, const char **name)
{
    return say(code, true, name);
}

CUDA cuGetErrorString(int code, const char **text)
{
    return say(code, false, text);
}

CUDA cuDriverGetVersion(int *version)
{
    *version = CUDA_VERSION; /* Before cuInit too. */
    return CUDA_SUCCESS;
}

/* --- devices ------------------------------------------------------------------------------------------------------ */

CUDA cuDeviceGet(int *device, int number)
{
    const struct cuda_device *found;
    int result = cuda_begin_device(__func__, number, &found);
    if (result == CUDA_SUCCESS)
        *device = number;
    return result;
}

CUDA cuDeviceGetName(char *name, int length, int number)
{
    const struct cuda_device *device;
    int result = cuda_begin_device(__func__, number, &device);
    if (result != CUDA_SUCCESS)
        return result;
    if (name == NULL || length <= 0)
        return CUDA_ERROR_INVALID_VALUE;
    snprintf(name, (size_t)length, "%s", device->name);
    return CUDA_SUCCESS;
}

/* The 16 bytes that the hexadecimal digits of a UUID stand for, after its prefix. */
static struct cuda_uuid bytes_of(const char *text)
{
    struct cuda_uuid uuid = {{0}};
    int digits = 0;
    for (const char *at = strchr(text, '-') + 1; *at && digits < 32; at++) {
        if (*at == '-')
            continue;
        int value = *at <= '9' ? *at - '0' : *at - 'a' + 10;
        uuid.bytes[digits / 2] = (uint8_t)(uuid.bytes[digits / 2] << 4 | value);
        digits++;
    }
    return uuid;
}

/* Of a MIG device: the GPU's. */
CUDA cuDeviceGetUuid(struct cuda_uuid *uuid, int number)
{
    const struct cuda_device *device;
    int result = cuda_begin_device(__func__, number, &device);
    if (result != CUDA_SUCCESS)
        return result;
    *uuid = bytes_of(cuda_hold()->gpus[device->gpu].uuid);
    state_done();
    return CUDA_SUCCESS;
}

CUDA cuDeviceGetUuid_v2(struct cuda_uuid *uuid, int number)
{
    const struct cuda_device *device;
    int result = cuda_begin_device(__func__, number, &device);
    if (result == CUDA_SUCCESS)
        *uuid = bytes_of(device->uuid);
    return result;
}

CUDA cuDeviceTotalMem_v2(size_t *bytes, int number)
{
    const struct cuda_device *device;
    int result = cuda_begin_device(__func__, number, &device);
    if (result != CUDA_SUCCESS)
        return result;
    const struct gpu *gpu = &cuda_hold()->gpus[device->gpu];
    *bytes = memory_total(&boards[gpu->board], device->mig ? &gpu->instances[device->slots.instance] : NULL);
    state_done();
    return CUDA_SUCCESS;
}

CUDA cuDeviceGetPCIBusId(char *address, int length, int number)
{
    const struct cuda_device *device;
    int result = cuda_begin_device(__func__, number, &device);
    if (result != CUDA_SUCCESS)
        return result;
    if (address == NULL || length < 13)
        return CUDA_ERROR_INVALID_VALUE;
    snprintf(address, (size_t)length, "0000:%02X:00.0", cuda_hold()->gpus[device->gpu].bus);
    state_done();
    return CUDA_SUCCESS;
}

/* -1: an attribute that the simulator does not know. */
static int attribute_of(const struct cuda_device *device, const struct gpu *gpu, int attribute)
{
    const struct board *board = &boards[gpu->board];
    switch (attribute) {
    case CUDA_WARP_SIZE: return 32;
    case CUDA_MULTIPROCESSORS: return (int)device->multiprocessors;
    case CUDA_INTEGRATED: return 0;
    case CUDA_COMPUTE_MODE: return (int)gpu->compute_mode;
    case CUDA_ECC_ENABLED: return 1;
    case CUDA_PCI_BUS: return (int)gpu->bus;
    case CUDA_PCI_DEVICE: return 0;
    case CUDA_UNIFIED_ADDRESSING: return 1;
    case CUDA_PCI_DOMAIN: return 0;
    case CUDA_COMPUTE_CAPABILITY_MAJOR: return (int)board->compute_major;
    case CUDA_COMPUTE_CAPABILITY_MINOR: return (int)board->compute_minor;
    default: return -1;
    }
}

CUDA cuDeviceGetAttribute(int *value, int attribute, int number)
{
    const struct cuda_device *device;
    int result = cuda_begin_device(__func__, number, &device);
    if (result != CUDA_SUCCESS)
        return result;
    *value = attribute_of(device, &cuda_hold()->gpus[device->gpu], attribute);
    state_done();
    return *value < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
