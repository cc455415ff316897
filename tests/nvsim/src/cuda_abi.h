/* The part of the CUDA driver API's ABI that the simulator serves: codes and constants, as libcuda.so.1 has them. */
#ifndef CUDA_ABI_H
#define CUDA_ABI_H

#include <stdint.h>

/* A context. Callers only hand it back. */
typedef void *cuda_context;
typedef uint64_t cuda_pointer;

enum cuda_result {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_OPERATING_SYSTEM = 304,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
    CUDA_ERROR_UNKNOWN = 999,
};

/* CUdevice_attribute. */
enum {
    CUDA_WARP_SIZE = 10,
    CUDA_MULTIPROCESSORS = 16,
    CUDA_INTEGRATED = 18,
    CUDA_COMPUTE_MODE = 20,
    CUDA_ECC_ENABLED = 32,
    CUDA_PCI_BUS = 33,
    CUDA_PCI_DEVICE = 34,
    CUDA_UNIFIED_ADDRESSING = 41,
    CUDA_PCI_DOMAIN = 50,
    CUDA_COMPUTE_CAPABILITY_MAJOR = 75,
    CUDA_COMPUTE_CAPABILITY_MINOR = 76,
};

/* Compute modes: also NVML's. */
enum { MODE_DEFAULT, MODE_EXCLUSIVE_THREAD, MODE_PROHIBITED, MODE_EXCLUSIVE_PROCESS };

/* CUdriverProcAddressQueryResult. */
enum { CUDA_SYMBOL_FOUND = 0, CUDA_SYMBOL_NOT_FOUND = 1, CUDA_SYMBOL_NEWER = 2 };

struct cuda_uuid {
    uint8_t bytes[16];
};

#endif
