/* NVML's calls about the node and about what a device is: versions, handles, names, addresses, memory, processes. */
#include "nvml_call.h"
#include "clients.h"
#include "errors.h"
#include "memory.h"

#include <stdio.h>
#include <string.h>

EXPORT const char *nvmlErrorString(int code)
{
    return nvml_error(code);
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
    *version = 12080; /* That of libcuda.so.1 too. */
    state_done();
    return NVML_SUCCESS;
}

NVML nvmlDeviceGetCount_v2(uint32_t *count)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    *count = 0;
    while (seen_gpu(node, *count) >= 0)
        ++*count;
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
    int seen = seen_gpu(node, index);
    result = seen >= 0 ? found(node, (uint32_t)seen, device) : NVML_INVALID_ARGUMENT;
    state_done();
    return result;
}

static int by_uuid(const struct node *node, uint32_t index, const char *uuid, nvml_handle *device)
{
    struct mig_device mig;
    if (!sees_gpu(&node->gpus[index]))
        return NVML_NOT_FOUND;
    if (strcmp(uuid, node->gpus[index].uuid) == 0)
        return found(node, index, device);
    if (!find_mig_device(&node->gpus[index], uuid, &mig))
        return NVML_NOT_FOUND;
    if (node->gpus[index].lost)
        return NVML_GPU_IS_LOST;
    *device = mig_device_handle(index, &mig);
    return NVML_SUCCESS;
}

NVML nvmlDeviceGetHandleByUUID(const char *uuid, nvml_handle *device)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    result = NVML_NOT_FOUND;
    for (uint32_t index = 0; index < node->gpu_count && result == NVML_NOT_FOUND; index++)
        result = by_uuid(node, index, uuid, device);
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
            if (node->gpus[index].bus == bus && domain == 0 && slot == 0 && sees_gpu(&node->gpus[index]))
                result = found(node, index, device);
    }
    state_done();
    return result;
}

/* --- what a device is -------------------------------------------------------------------------------------------- */

/* Its place among those that the process sees. */
static uint32_t rank_of(const struct node *node, uint32_t gpu)
{
    uint32_t rank = 0;
    for (uint32_t index = 0; index < gpu; index++)
        rank += sees_gpu(&node->gpus[index]);
    return rank;
}

ANSWER(nvmlDeviceGetIndex, GPU, uint32_t, rank_of(target.node, target.index))

NVML nvmlDeviceGetName(nvml_handle device, char *name, uint32_t length)
{
    struct target target;
    int result = look(__func__, device, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    char text[160];
    if (target.kind == MIG_DEVICE)
        name_mig_device(text, sizeof text, target.gpu, target.instance, target.compute);
    else
        snprintf(text, sizeof text, "%s", target.board->name);
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

NVML nvmlDeviceGetVbiosVersion(nvml_handle device, char *version, uint32_t length)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    return done(&target, give_text(version, length, target.board->vbios));
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

/* --- the PCIe link ------------------------------------------------------------------------------------------------ */

enum { PCIE_WIDTH = 16 };

static uint32_t pcie_generation(const struct board *board)
{
    return board->architecture == 7 ? 4 : 5;
}

ANSWER(nvmlDeviceGetMaxPcieLinkGeneration, GPU, uint32_t, pcie_generation(target.board))

ANSWER(nvmlDeviceGetGpuMaxPcieLinkGeneration, GPU, uint32_t, pcie_generation(target.board))

ANSWER(nvmlDeviceGetMaxPcieLinkWidth, GPU, uint32_t, PCIE_WIDTH)

ANSWER(nvmlDeviceGetCurrPcieLinkGeneration, GPU, uint32_t,
       target.gpu->pcie_generation ? target.gpu->pcie_generation : pcie_generation(target.board))

ANSWER(nvmlDeviceGetCurrPcieLinkWidth, GPU, uint32_t, target.gpu->pcie_width ? target.gpu->pcie_width : PCIE_WIDTH)

ANSWER(nvmlDeviceGetPcieReplayCounter, GPU, uint32_t, target.gpu->pcie_replays)

/* --- memory and processes ---------------------------------------------------------------------------------------- */

/* Of a GPU in MIG mode as a whole NVML tells only the privileged what its instances' users do. */
static int look_at_use(const char *symbol, nvml_handle device, struct target *target)
{
    int result = look(symbol, device, GPU | MIG_DEVICE, target);
    if (result == NVML_SUCCESS && target->kind == GPU && target->gpu->mig_current && !privileged(target->node))
        return done(target, NVML_NO_PERMISSION);
    return result;
}

/* Memory is a GPU instance's: its compute instances share it. */
static struct nvml_memory_v2 memory_of(const struct target *target)
{
    const struct gpu_instance *instance = target->kind == GPU ? NULL : target->instance;
    struct range reachable = reach(target->board, instance);
    struct user users[MAX_USERS];
    uint64_t total = memory_total(target->board, instance), used = 0;
    uint64_t reserved = total - (reachable.to - reachable.from);
    uint32_t count = users_of(target->node, target->index, users);
    for (uint32_t at = 0; at < count; at++)
        if (instance == NULL || users[at].gpu_instance == instance->id)
            used += users[at].memory;
    return (struct nvml_memory_v2){.total = total, .reserved = reserved, .free = total - reserved - used, .used = used};
}

NVML nvmlDeviceGetMemoryInfo(nvml_handle device, struct nvml_memory *memory)
{
    struct target target;
    int result = look_at_use(__func__, device, &target);
    if (result != NVML_SUCCESS)
        return result;
    struct nvml_memory_v2 all = memory_of(&target);
    *memory = (struct nvml_memory){.total = all.total, .free = all.free, .used = all.used + all.reserved};
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetMemoryInfo_v2(nvml_handle device, struct nvml_memory_v2 *memory)
{
    struct target target;
    int result = look_at_use(__func__, device, &target);
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

static bool listed(const struct user *user, uint32_t kind, const struct target *target)
{
    if (user->kind != kind || user->pid == 0) /* Of another pid namespace: nobody here could name it. */
        return false;
    return target->kind == GPU || (user->gpu_instance == target->instance->id &&
                                   user->compute_instance == target->compute->id);
}

/* INSUFFICIENT_SIZE with the number needed is how callers learn how much room to make. */
static int processes(const char *symbol, nvml_handle device, uint32_t kind, uint32_t *count,
                     struct nvml_process *given)
{
    struct target target;
    int result = look_at_use(symbol, device, &target);
    if (result != NVML_SUCCESS)
        return result;
    struct user users[MAX_USERS];
    uint32_t room = *count, total = 0, all = users_of(target.node, target.index, users);
    for (uint32_t at = 0; at < all; at++) {
        const struct user *one = &users[at];
        if (!listed(one, kind, &target))
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
