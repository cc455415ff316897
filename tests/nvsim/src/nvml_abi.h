/* The part of NVML's ABI that the simulator serves: codes, constants, structures, as libnvidia-ml.so.1 lays them out.
 *
 * Sizes and offsets are those that nvidia-ml-py declares; `_Static_assert`s hold them. Nothing here is the simulator's.
 */
#ifndef NVML_ABI_H
#define NVML_ABI_H

#include <stdint.h>

/* A handle. Callers only hand it back. */
typedef void *nvml_handle;

enum nvml_return {
    NVML_SUCCESS = 0,
    NVML_UNINITIALIZED = 1,
    NVML_INVALID_ARGUMENT = 2,
    NVML_NOT_SUPPORTED = 3,
    NVML_NO_PERMISSION = 4,
    NVML_NOT_FOUND = 6,
    NVML_INSUFFICIENT_SIZE = 7,
    NVML_DRIVER_NOT_LOADED = 9,
    NVML_TIMEOUT = 10,
    NVML_GPU_IS_LOST = 15,
    NVML_RESET_REQUIRED = 16,
    NVML_IN_USE = 19,
    NVML_MEMORY = 20,
    NVML_INSUFFICIENT_RESOURCES = 23,
    NVML_ARGUMENT_VERSION_MISMATCH = 25,
    NVML_NOT_READY = 27,
    NVML_INVALID_STATE = 29,
    NVML_UNKNOWN = 999,
};

/* Slices and engines of instances. */
enum { NVML_GPU_INSTANCE_PROFILE_COUNT = 18, NVML_COMPUTE_INSTANCE_PROFILE_COUNT = 9 };

struct nvml_placement {
    uint32_t start, size;
};

struct nvml_gi_profile {
    uint32_t id, is_p2p_supported, slice_count, instance_count, multiprocessors, copy_engines, decoders, encoders,
        jpegs, ofas;
    uint64_t memory_mib;
};
_Static_assert(sizeof(struct nvml_gi_profile) == 48, "nvmlGpuInstanceProfileInfo_t");

struct nvml_gi_profile_v2 {
    uint32_t version, id, is_p2p_supported, slice_count, instance_count, multiprocessors, copy_engines, decoders,
        encoders, jpegs, ofas;
    uint64_t memory_mib;
    char name[96];
};
_Static_assert(sizeof(struct nvml_gi_profile_v2) == 152, "nvmlGpuInstanceProfileInfo_v2_t");

struct nvml_gi_info {
    nvml_handle device;
    uint32_t id, profile_id;
    struct nvml_placement placement;
};
_Static_assert(sizeof(struct nvml_gi_info) == 24, "nvmlGpuInstanceInfo_t");

struct nvml_ci_profile {
    uint32_t id, slice_count, instance_count, multiprocessors, shared_copy_engines, shared_decoders, shared_encoders,
        shared_jpegs, shared_ofas;
};
_Static_assert(sizeof(struct nvml_ci_profile) == 36, "nvmlComputeInstanceProfileInfo_t");

struct nvml_ci_profile_v2 {
    uint32_t version, id, slice_count, instance_count, multiprocessors, shared_copy_engines, shared_decoders,
        shared_encoders, shared_jpegs, shared_ofas;
    char name[96];
};
_Static_assert(sizeof(struct nvml_ci_profile_v2) == 136, "nvmlComputeInstanceProfileInfo_v2_t");

struct nvml_ci_info {
    nvml_handle device, gpu_instance;
    uint32_t id, profile_id;
    struct nvml_placement placement;
};
_Static_assert(sizeof(struct nvml_ci_info) == 32, "nvmlComputeInstanceInfo_t");

struct nvml_attributes {
    uint32_t multiprocessors, shared_copy_engines, shared_decoders, shared_encoders, shared_jpegs, shared_ofas,
        gpu_instance_slices, compute_instance_slices;
    uint64_t memory_mib;
};
_Static_assert(sizeof(struct nvml_attributes) == 40, "nvmlDeviceAttributes_t");

struct nvml_memory {
    uint64_t total, free, used;
};
_Static_assert(sizeof(struct nvml_memory) == 24, "nvmlMemory_t");

struct nvml_memory_v2 {
    uint32_t version;
    uint64_t total, reserved, free, used;
};
_Static_assert(sizeof(struct nvml_memory_v2) == 40, "nvmlMemory_v2_t");

struct nvml_pci {
    char bus_id_legacy[16];
    uint32_t domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};
_Static_assert(sizeof(struct nvml_pci) == 68, "nvmlPciInfo_t");

struct nvml_utilization {
    uint32_t gpu, memory;
};

struct nvml_process {
    uint32_t pid;
    uint64_t used_memory;
    uint32_t gpu_instance, compute_instance;
};
_Static_assert(sizeof(struct nvml_process) == 24, "nvmlProcessInfo_t");

struct nvml_event {
    nvml_handle device;
    uint64_t type, data;
    uint32_t gpu_instance, compute_instance;
};
_Static_assert(sizeof(struct nvml_event) == 32, "nvmlEventData_t");

struct nvml_temperature {
    uint32_t version, sensor;
    int32_t celsius;
};
_Static_assert(sizeof(struct nvml_temperature) == 12, "nvmlTemperature_v1_t");

struct nvml_field {
    uint32_t id, scope;
    int64_t timestamp, latency;
    uint32_t value_type, status;
    union {
        double real;
        uint32_t u32;
        uint64_t u64;
        int64_t i64;
    } value;
};
_Static_assert(sizeof(struct nvml_field) == 40, "nvmlFieldValue_t");

struct nvml_remap_histogram {
    uint32_t max, high, partial, low, none;
};
_Static_assert(sizeof(struct nvml_remap_histogram) == 20, "nvmlRowRemapperHistogramValues_t");

struct nvml_sram_ecc {
    uint32_t version;
    uint64_t aggregate_parity, aggregate_sec_ded, aggregate_corrected, volatile_parity, volatile_sec_ded,
        volatile_corrected, bucket_l2, bucket_sm, bucket_pcie, bucket_mcu, bucket_other;
    uint32_t threshold_exceeded;
};
_Static_assert(sizeof(struct nvml_sram_ecc) == 104, "nvmlEccSramErrorStatus_v1_t");

struct nvml_bar1 {
    uint64_t total, free, used;
};

/* "This version of this structure", as versioned structures carry it. */
#define NVML_VERSION(type, number) ((uint32_t)(sizeof(type) | ((uint32_t)(number) << 24)))

/* Where an event or a process cannot be attributed to an instance. */
#define NVML_NO_INSTANCE 0xFFFFFFFFu

enum {
    NVML_EVENT_SINGLE_BIT_ECC = 0x1,
    NVML_EVENT_DOUBLE_BIT_ECC = 0x2,
    NVML_EVENT_CLOCK = 0x10,
    NVML_EVENT_XID = 0x8,
    NVML_EVENT_MIG_CONFIG_CHANGE = 0x100,
};

enum { NVML_VALUE_UINT = 1, NVML_VALUE_ULONGLONG = 3 };

#endif
