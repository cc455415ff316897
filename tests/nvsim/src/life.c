/* See life.h. */
#include "life.h"

#include "boards.h"
#include "caller.h"
#include "clients.h"
#include "memory.h"
#include "nvml_abi.h"

#include <stdio.h>
#include <string.h>

/* PCI buses of a DGX A100. */
static const uint32_t BUSES[] = {0x07, 0x0f, 0x47, 0x4e, 0x87, 0x90, 0xb7, 0xbd};

static uint64_t scrambled(uint64_t value)
{
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ull; /* splitmix64 */
    value = (value ^ value >> 27) * 0x94d049bb133111ebull;
    return value ^ value >> 31;
}

static void write_uuid(char *text, const char *prefix, uint64_t seed)
{
    uint64_t high = scrambled(seed * 2 + 1), low = scrambled(seed * 2 + 2);
    snprintf(text, UUID_LENGTH, "%s%08x-%04x-4%03x-%04x-%012llx", prefix, (uint32_t)(high >> 32),
             (uint32_t)(high >> 16 & 0xffff), (uint32_t)(high & 0xfff), (uint32_t)(0x8000 | (low >> 48 & 0x3fff)),
             (unsigned long long)(low & 0xffffffffffff));
}

static void as_loaded(const struct node *node, struct gpu *gpu)
{
    const struct board *board = &boards[gpu->board];
    gpu->power_mw = board->idle_mw;
    gpu->limit_mw = board->default_mw;
    gpu->energy_uj = 0;
    gpu->energy_at = node == NULL ? 0 : clock_now(node);
    gpu->locked_min = gpu->locked_max = gpu->memory_locked_min = gpu->memory_locked_max = 0;
    gpu->application_clock = 0;
    gpu->utilization = gpu->memory_utilization = 0;
    gpu->compute_mode = gpu->draining = 0;
    gpu->ecc_volatile = (struct ecc){0};
    gpu->remap_pending = 0;
    gpu->pcie_replays = 0;
    gpu->recovery_action = 0;
}

struct gpu new_gpu(uint32_t board, uint32_t index, uint64_t seed)
{
    struct gpu gpu = {.board = board, .generation = 1, .minor = index, .celsius = 33, .memory_celsius = 31};
    gpu.bus = index < sizeof BUSES / sizeof BUSES[0] ? BUSES[index] : 0xc0 + index;
    write_uuid(gpu.uuid, "GPU-", seed * 64 + index);
    unsigned long long number = scrambled(seed * 64 + index) % 100000000000ull;
    snprintf(gpu.serial, sizeof gpu.serial, "15%011llu", number);
    as_loaded(NULL, &gpu);
    randomise(&boards[board], &gpu, scrambled(seed * 64 + index));
    return gpu;
}

void new_boot_id(struct node *node, uint64_t seed)
{
    write_uuid(node->boot_id, "", seed ^ 0xb007b007b007b007ull);
}

void settle_mode(struct node *node, struct gpu *gpu)
{
    gpu->mig_current = gpu->mig_pending;
    memset(gpu->instances, 0, sizeof gpu->instances);
    gpu->generation++;
    tell(node, NVML_EVENT_MIG_CONFIG_CHANGE, 0, (uint32_t)(gpu - node->gpus), NVML_NO_INSTANCE, NVML_NO_INSTANCE);
}

int reset_refusal(const struct node *node, uint32_t gpu)
{
    const struct gpu *it = &node->gpus[gpu];
    if (!privileged(node))
        return NVML_NO_PERMISSION;
    if (it->lost)
        return NVML_GPU_IS_LOST;
    if (it->reset_refused)
        return NVML_NOT_SUPPORTED;
    /* Persistence mode is a client too: nvidia-persistenced keeps the GPU open. */
    return gpu_held(node, gpu) || it->persistence ? NVML_IN_USE : NVML_SUCCESS;
}

void reset_gpu(struct node *node, struct gpu *gpu)
{
    if (gpu->remap_pending)
        gpu->remapped_uncorrected++;
    gpu->mig_reset_required = 0;
    as_loaded(node, gpu);
    settle_mode(node, gpu);
}

void reboot(struct node *node, uint64_t seed)
{
    new_boot_id(node, seed);
    memset(node->clients, 0, sizeof node->clients);
    for (uint32_t index = 0; index < node->gpu_count; index++) {
        struct gpu *gpu = &node->gpus[index];
        memset(gpu->processes, 0, sizeof gpu->processes);
        memset(gpu->allocations, 0, sizeof gpu->allocations);
        randomise(&boards[gpu->board], gpu, scrambled(seed) + index);
        gpu->lost = gpu->mig_busy = 0;
        if (!boards[gpu->board].mig_needs_reset)
            gpu->mig_pending = 0; /* Where no reset is needed the mode lasts as long as the driver. */
        reset_gpu(node, gpu);
        gpu->persistence = 0;
    }
}

void lose_gpu(struct node *node, struct gpu *gpu)
{
    meter(node, gpu);
    gpu->lost = 1;
    tell(node, NVML_EVENT_XID, 79, (uint32_t)(gpu - node->gpus), NVML_NO_INSTANCE, NVML_NO_INSTANCE);
}
