/* NVML's calls about the node and about what a device is: versions, handles, names, addresses, memory, processes. */
#include "call.h"

#include <stdio.h>
#include <string.h>

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

EXPORT const char *nvmlErrorString(int code)
{
    if (code >= 0 && code < (int)(sizeof ERRORS / sizeof ERRORS[0]) && ERRORS[code] != NULL)
        return ERRORS[code];
    return "Unknown Error";
}

/* --- the node ---------------------------------------------------------------------------------------------------- */

NVML nvmlSystemGetDriverVersion(char *version, uint32_t length)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    result = give_text(version, length, node->driver_version);
    state_done();
    return result;
}

NVML nvmlSystemGetNVMLVersion(char *version, uint32_t length)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    char text[NAME_LENGTH + 4];
    snprintf(text, sizeof text, "12.%s", node->driver_version);
    result = give_text(version, length, text);
    state_done();
    return result;
}

NVML nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    *version = 12080;
    state_done();
    return NVML_SUCCESS;
}

NVML nvmlDeviceGetCount_v2(uint32_t *count)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    *count = node->gpu_count;
    state_done();
    return NVML_SUCCESS;
}

/* --- handles ----------------------------------------------------------------------------------------------------- */

static int found(const struct node *node, uint32_t index, nvml_handle *device)
{
    if (node->gpus[index].lost)
        return NVML_GPU_IS_LOST;
    *device = gpu_handle(node, index);
    return NVML_SUCCESS;
}

NVML nvmlDeviceGetHandleByIndex_v2(uint32_t index, nvml_handle *device)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    result = index < node->gpu_count ? found(node, index, device) : NVML_INVALID_ARGUMENT;
    state_done();
    return result;
}

static int mig_by_uuid(const struct node *node, uint32_t index, const char *uuid, nvml_handle *device)
{
    struct mig_device all[MAX_COMPUTE_INSTANCES];
    mig_devices(&node->gpus[index], all);
    for (uint32_t at = 0; at < MAX_COMPUTE_INSTANCES; at++) {
        if (!all[at].there)
            continue;
        const struct gpu_instance *instance = &node->gpus[index].instances[all[at].instance];
        const struct compute_instance *compute = &instance->compute[all[at].compute];
        char legacy[UUID_LENGTH * 2];
        snprintf(legacy, sizeof legacy, "MIG-%s/%u/%u", node->gpus[index].uuid, instance->id, compute->id);
        if (strcmp(uuid, compute->uuid) == 0 || strcmp(uuid, legacy) == 0) {
            if (node->gpus[index].lost)
                return NVML_GPU_IS_LOST;
            *device = mig_device_handle(index, &all[at]);
            return NVML_SUCCESS;
        }
    }
    return NVML_NOT_FOUND;
}

NVML nvmlDeviceGetHandleByUUID(const char *uuid, nvml_handle *device)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    result = NVML_NOT_FOUND;
    for (uint32_t index = 0; index < node->gpu_count && result == NVML_NOT_FOUND; index++)
        result = strcmp(uuid, node->gpus[index].uuid) == 0 ? found(node, index, device)
                                                           : mig_by_uuid(node, index, uuid, device);
    state_done();
    return result;
}

NVML nvmlDeviceGetHandleByPciBusId_v2(const char *address, nvml_handle *device)
{
    const struct node *node;
    unsigned domain, bus, slot;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    result = NVML_INVALID_ARGUMENT;
    if (sscanf(address, "%x:%x:%x", &domain, &bus, &slot) == 3) {
        result = NVML_NOT_FOUND;
        for (uint32_t index = 0; index < node->gpu_count; index++)
            if (node->gpus[index].bus == bus && domain == 0 && slot == 0)
                result = found(node, index, device);
    }
    state_done();
    return result;
}

/* --- what a device is -------------------------------------------------------------------------------------------- */

ANSWER(nvmlDeviceGetIndex, GPU, uint32_t, target.index)

NVML nvmlDeviceGetName(nvml_handle device, char *name, uint32_t length)
{
    struct target target;
    int result = look(__func__, device, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    char text[160];
    if (target.kind == GPU)
        snprintf(text, sizeof text, "%s", target.board->name);
    else if (target.compute->width == profile_of(&target)->compute_slices)
        snprintf(text, sizeof text, "%s MIG %s", target.board->name, profile_of(&target)->name);
    else
        snprintf(text, sizeof text, "%s MIG %uc.%s", target.board->name, target.compute->width,
                 profile_of(&target)->name);
    return done(&target, give_text(name, length, text));
}

NVML nvmlDeviceGetUUID(nvml_handle device, char *uuid, uint32_t length)
{
    struct target target;
    int result = look(__func__, device, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    return done(&target, give_text(uuid, length, target.kind == GPU ? target.gpu->uuid : target.compute->uuid));
}

NVML nvmlDeviceGetSerial(nvml_handle device, char *serial, uint32_t length)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    return done(&target, give_text(serial, length, target.gpu->serial));
}

NVML nvmlDeviceGetPciInfo_v3(nvml_handle device, struct nvml_pci *pci)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    *pci = (struct nvml_pci){
        .bus = target.gpu->bus, .pci_device_id = target.board->pci_device_id,
        .pci_subsystem_id = target.board->pci_subsystem_id,
    };
    snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "0000:%02X:00.0", target.gpu->bus);
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", target.gpu->bus);
    return done(&target, NVML_SUCCESS);
}

ANSWER(nvmlDeviceGetMinorNumber, GPU, uint32_t, target.gpu->minor)

ANSWER(nvmlDeviceGetArchitecture, GPU | MIG_DEVICE, uint32_t, target.board->architecture)

NVML nvmlDeviceGetCudaComputeCapability(nvml_handle device, int *major, int *minor)
{
    struct target target;
    int result = look(__func__, device, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    *major = (int)target.board->compute_major;
    *minor = (int)target.board->compute_minor;
    return done(&target, NVML_SUCCESS);
}

ANSWER(nvmlDeviceGetNumGpuCores, GPU, uint32_t, target.board->cores)

ANSWER(nvmlDeviceGetVirtualizationMode, GPU, uint32_t, 0) /* Bare metal. */

ANSWER(nvmlDeviceGetCurrPcieLinkGeneration, GPU, uint32_t, target.board->architecture == 7 ? 4 : 5)

ANSWER(nvmlDeviceGetCurrPcieLinkWidth, GPU, uint32_t, 16)

/* --- memory and processes ---------------------------------------------------------------------------------------- */

enum { MIB = 1 << 20, RESERVED_MIB = 450, INSTANCE_OVERHEAD_MIB = 12 };

static bool within(const struct process *process, const struct target *target)
{
    if (!process->used)
        return false;
    if (target->kind == GPU)
        return true;
    return process->gpu_instance == target->instance->id && process->compute_instance == target->compute->id;
}

static struct nvml_memory_v2 memory_of(const struct target *target)
{
    uint64_t total = target->kind == GPU ? target->board->memory_mib : profile_of(target)->memory_mib;
    uint64_t reserved = target->kind == GPU ? RESERVED_MIB : INSTANCE_OVERHEAD_MIB, used = 0;
    for (uint32_t slot = 0; slot < MAX_PROCESSES; slot++)
        if (within(&target->gpu->processes[slot], target))
            used += target->gpu->processes[slot].memory;
    total *= MIB;
    reserved *= MIB;
    return (struct nvml_memory_v2){.total = total, .reserved = reserved, .free = total - reserved - used, .used = used};
}

NVML nvmlDeviceGetMemoryInfo(nvml_handle device, struct nvml_memory *memory)
{
    struct target target;
    int result = look(__func__, device, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    struct nvml_memory_v2 all = memory_of(&target);
    *memory = (struct nvml_memory){.total = all.total, .free = all.free, .used = all.used + all.reserved};
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetMemoryInfo_v2(nvml_handle device, struct nvml_memory_v2 *memory)
{
    struct target target;
    int result = look(__func__, device, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (memory->version != NVML_VERSION(struct nvml_memory_v2, 2))
        return done(&target, NVML_ARGUMENT_VERSION_MISMATCH);
    uint32_t version = memory->version;
    *memory = memory_of(&target);
    memory->version = version;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetBAR1MemoryInfo(nvml_handle device, struct nvml_bar1 *memory)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    uint64_t total = (uint64_t)target.board->memory_mib * 2 * MIB;
    *memory = (struct nvml_bar1){.total = total, .free = total - MIB, .used = MIB};
    return done(&target, NVML_SUCCESS);
}

/* INSUFFICIENT_SIZE with the number needed is how callers learn how much room to make. */
static int processes(const char *symbol, nvml_handle device, uint32_t kind, uint32_t *count,
                     struct nvml_process *given)
{
    struct target target;
    int result = look(symbol, device, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    uint32_t room = *count, total = 0;
    for (uint32_t slot = 0; slot < MAX_PROCESSES; slot++) {
        const struct process *one = &target.gpu->processes[slot];
        if (one->kind != kind || !within(one, &target))
            continue;
        if (total < room)
            given[total] = (struct nvml_process){one->pid, one->memory, one->gpu_instance, one->compute_instance};
        total++;
    }
    *count = total;
    return done(&target, total > room ? NVML_INSUFFICIENT_SIZE : NVML_SUCCESS);
}

NVML nvmlDeviceGetComputeRunningProcesses_v3(nvml_handle device, uint32_t *count, struct nvml_process *given)
{
    return processes(__func__, device, 0, count, given);
}

NVML nvmlDeviceGetGraphicsRunningProcesses_v3(nvml_handle device, uint32_t *count, struct nvml_process *given)
{
    return processes(__func__, device, 1, count, given);
}

NVML nvmlDeviceGetMPSComputeRunningProcesses_v3(nvml_handle device, uint32_t *count, struct nvml_process *given)
{
    return processes(__func__, device, 2, count, given);
}
