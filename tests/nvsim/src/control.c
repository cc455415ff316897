/* What no driver offers: making a node, breaking it, looking into it. Called by the Python package beside this folder.
 *
 * Every function returns 0, or a negative number where it was asked for what there is not.
 */
#define _GNU_SOURCE
#include "call.h"
#include "life.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NO_FILE = -1, NO_SUCH = -2, NO_ROOM = -3, REFUSED = -4 };

/* Make a node of `count` GPUs of one board; each bit of `layouts` says which way one numbers its GPU instances. */
EXPORT int nvsim_create(const char *path, const char *board, uint32_t count, uint32_t layouts, uint64_t seed)
{
    uint32_t row = 0;
    while (row < board_count && strcmp(boards[row].name, board) != 0)
        row++;
    if (row == board_count || count > MAX_GPUS)
        return NO_SUCH;
    struct node *node = calloc(1, sizeof *node);
    if (node == NULL)
        return NO_ROOM;
    *node = (struct node){.driver_version = "570.148.08", .driver_loaded = 1, .gpu_count = count, .clock_scale = 1.0};
    node->clock_real = clock_monotonic();
    new_boot_id(node, seed);
    for (uint32_t index = 0; index < count; index++) {
        node->gpus[index] = new_gpu(row, index, seed);
        node->gpus[index].layout = layouts >> index & 1;
    }
    bool written = state_write(path, node);
    free(node);
    return written ? 0 : NO_FILE;
}

/* --- any field ---------------------------------------------------------------------------------------------------- */

struct entry {
    const char *name;
    size_t offset, size;
};

#define ENTRY(type, field) {#field, offsetof(struct type, field), sizeof(((struct type *)0)->field)}

static const struct entry GPU_ENTRIES[] = {
    ENTRY(gpu, minor), ENTRY(gpu, layout), ENTRY(gpu, mig_current), ENTRY(gpu, mig_pending), ENTRY(gpu, mig_busy),
    ENTRY(gpu, mig_reset_required), ENTRY(gpu, hidden_indices), ENTRY(gpu, lost), ENTRY(gpu, reset_refused),
    ENTRY(gpu, ecc_volatile.corrected), ENTRY(gpu, ecc_volatile.uncorrected), ENTRY(gpu, ecc_aggregate.corrected),
    ENTRY(gpu, ecc_aggregate.uncorrected), ENTRY(gpu, remapped_corrected), ENTRY(gpu, remapped_uncorrected),
    ENTRY(gpu, remap_pending), ENTRY(gpu, remap_failed), ENTRY(gpu, recovery_action), ENTRY(gpu, power_mw),
    ENTRY(gpu, limit_mw), ENTRY(gpu, celsius), ENTRY(gpu, memory_celsius), ENTRY(gpu, utilization),
    ENTRY(gpu, memory_utilization), ENTRY(gpu, locked_min), ENTRY(gpu, locked_max), ENTRY(gpu, application_clock),
    ENTRY(gpu, persistence), ENTRY(gpu, compute_mode), ENTRY(gpu, draining), ENTRY(gpu, generation),
};

static const struct entry NODE_ENTRIES[] = {
    ENTRY(node, driver_loaded), ENTRY(node, unprivileged), ENTRY(node, refuse_4g_3g), ENTRY(node, stale_enumeration),
    ENTRY(node, uuid_policy), ENTRY(node, create_gpu_instance_ms),
    ENTRY(node, create_compute_instance_ms), ENTRY(node, destroy_gpu_instance_ms),
    ENTRY(node, destroy_compute_instance_ms), ENTRY(node, events_told),
};

#define COUNT(entries) (sizeof(entries) / sizeof((entries)[0]))

/* The field of that name of a GPU, or of the node where `gpu` is -1. */
static void *field(struct node *node, int gpu, const char *name, size_t *size)
{
    const struct entry *entries = gpu < 0 ? NODE_ENTRIES : GPU_ENTRIES;
    size_t count = gpu < 0 ? COUNT(NODE_ENTRIES) : COUNT(GPU_ENTRIES);
    if (gpu >= (int)node->gpu_count)
        return NULL;
    char *base = gpu < 0 ? (char *)node : (char *)&node->gpus[gpu];
    for (size_t at = 0; at < count; at++)
        if (strcmp(entries[at].name, name) == 0) {
            *size = entries[at].size;
            return base + entries[at].offset;
        }
    return NULL;
}

EXPORT int nvsim_set(const char *path, int gpu, const char *name, uint64_t value)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    size_t size = 0;
    if (gpu >= 0 && gpu < (int)node->gpu_count)
        meter(node, &node->gpus[gpu]); /* The field may be one that its power hangs on. */
    void *at = field(node, gpu, name, &size);
    if (at != NULL) {
        memcpy(at, &value, size); /* Little-endian, as all of NVIDIA's hosts are. */
        state_commit();
    }
    state_done();
    return at == NULL ? NO_SUCH : 0;
}

EXPORT int nvsim_get(const char *path, int gpu, const char *name, uint64_t *value)
{
    if (!state_control(path))
        return NO_FILE;
    size_t size = 0;
    void *at = field((struct node *)state_look(), gpu, name, &size);
    *value = 0;
    if (at != NULL)
        memcpy(value, at, size);
    state_done();
    return at == NULL ? NO_SUCH : 0;
}

EXPORT int nvsim_boot_id(const char *path, char *text, uint32_t length)
{
    if (!state_control(path))
        return NO_FILE;
    int result = give_text(text, length, state_look()->boot_id) == NVML_SUCCESS ? 0 : NO_ROOM;
    state_done();
    return result;
}

/* --- processes ---------------------------------------------------------------------------------------------------- */

EXPORT int nvsim_add_process(const char *path, uint32_t gpu, uint32_t pid, uint32_t kind, uint32_t instance,
                             uint32_t compute, uint64_t memory)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    int result = gpu < node->gpu_count ? NO_ROOM : NO_SUCH;
    for (uint32_t slot = 0; result == NO_ROOM && slot < MAX_PROCESSES; slot++)
        if (!node->gpus[gpu].processes[slot].used) {
            node->gpus[gpu].processes[slot] = (struct process){1, pid, kind, instance, compute, memory};
            state_commit();
            result = 0;
        }
    state_done();
    return result;
}

/* Take a process away from every GPU. */
EXPORT int nvsim_end_process(const char *path, uint32_t pid)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    int result = NO_SUCH;
    for (uint32_t gpu = 0; gpu < node->gpu_count; gpu++)
        for (uint32_t slot = 0; slot < MAX_PROCESSES; slot++) {
            struct process *one = &node->gpus[gpu].processes[slot];
            if (one->used && one->pid == pid) {
                memset(one, 0, sizeof *one);
                result = 0;
            }
        }
    if (result == 0)
        state_commit();
    state_done();
    return result;
}

/* --- what goes wrong ---------------------------------------------------------------------------------------------- */

/* Add a fault; its number, by which it is asked about and taken away. */
EXPORT int nvsim_add_fault(const char *path, const char *symbol, int gpu, int instance, uint32_t after, uint32_t times,
                           uint32_t result, uint32_t delay_ms)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    int number = NO_ROOM;
    for (int slot = 0; number < 0 && slot < MAX_FAULTS && strlen(symbol) < NAME_LENGTH; slot++)
        if (!node->faults[slot].used) {
            node->faults[slot] = (struct fault){
                .used = 1, .gpu = gpu, .gpu_instance = instance, .after = after, .times = times, .result = result,
                .delay_ms = delay_ms,
            };
            snprintf(node->faults[slot].symbol, NAME_LENGTH, "%s", symbol);
            state_commit();
            number = slot;
        }
    state_done();
    return number;
}

/* How many calls the fault has matched. */
EXPORT int nvsim_fault_seen(const char *path, int number)
{
    if (!state_control(path))
        return NO_FILE;
    const struct node *node = state_look();
    int seen = number >= 0 && number < MAX_FAULTS && node->faults[number].used ? (int)node->faults[number].seen : NO_SUCH;
    state_done();
    return seen;
}

EXPORT int nvsim_remove_fault(const char *path, int number)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    bool there = number >= 0 && number < MAX_FAULTS && node->faults[number].used;
    if (there) {
        memset(&node->faults[number], 0, sizeof node->faults[number]);
        state_commit();
    }
    state_done();
    return there ? 0 : NO_SUCH;
}

EXPORT int nvsim_tell(const char *path, uint64_t type, uint64_t data, uint32_t gpu, uint32_t instance, uint32_t compute)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    bool there = gpu < node->gpu_count;
    if (there) {
        tell(node, type, data, gpu, instance, compute);
        state_commit();
    }
    state_done();
    return there ? 0 : NO_SUCH;
}

EXPORT int nvsim_lose(const char *path, uint32_t gpu)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    bool there = gpu < node->gpu_count;
    if (there) {
        lose_gpu(node, &node->gpus[gpu]);
        state_commit();
    }
    state_done();
    return there ? 0 : NO_SUCH;
}

/* What `nvidia-smi --gpu-reset` does: refused while somebody uses the GPU, or where the board refuses a lone reset. */
EXPORT int nvsim_reset(const char *path, uint32_t gpu)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    int result = gpu < node->gpu_count ? 0 : NO_SUCH;
    if (result == 0) {
        const struct gpu *it = &node->gpus[gpu];
        if (has_processes(it) || it->mig_busy || it->reset_refused || it->lost || !privileged(node))
            result = REFUSED;
    }
    if (result == 0) {
        node->gpus[gpu].mig_reset_required = 0;
        reset_gpu(node, &node->gpus[gpu]);
        state_commit();
    }
    state_done();
    return result;
}

EXPORT int nvsim_reboot(const char *path, uint64_t seed)
{
    if (!state_control(path))
        return NO_FILE;
    reboot(state_change(), seed);
    state_commit();
    state_done();
    return 0;
}

/* --- time --------------------------------------------------------------------------------------------------------- */

/* From now on time passes `scale` times as fast as it does, or stands still but for nvsim_advance. */
EXPORT int nvsim_clock(const char *path, int manual, double scale)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    node->clock_base = clock_now(node);
    node->clock_real = clock_monotonic();
    node->clock_manual = manual != 0;
    node->clock_scale = scale;
    state_commit();
    state_done();
    return 0;
}

EXPORT int nvsim_advance(const char *path, int64_t nanoseconds)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    node->clock_base += nanoseconds;
    state_commit();
    state_done();
    return 0;
}
