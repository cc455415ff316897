/* What no driver offers: making a node, breaking it, looking into it. Called by the Python package beside this folder.
 *
 * Every function returns 0, or a negative number where it was asked for what there is not.
 */
#define _GNU_SOURCE
#include "nvml_call.h"
#include "life.h"
#include "memory.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const uint32_t NOBODY = 0xFFFFFFFF; /* No user has this number. */

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
    node->owner = has_cap_sys_admin() ? NOBODY : geteuid();
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
    bool fixed; /* To be looked at only. */
};

#define PLACE(type, field) #field, offsetof(struct type, field), sizeof(((struct type *)0)->field)
#define ENTRY(type, field) {PLACE(type, field), false}
#define FIXED(type, field) {PLACE(type, field), true}

static const struct entry GPU_ENTRIES[] = {
    ENTRY(gpu, minor), ENTRY(gpu, layout), ENTRY(gpu, mig_current), ENTRY(gpu, mig_pending), ENTRY(gpu, mig_busy),
    ENTRY(gpu, mig_reset_required), ENTRY(gpu, hidden_indices), ENTRY(gpu, lost), ENTRY(gpu, reset_refused),
    ENTRY(gpu, ecc_volatile.corrected), ENTRY(gpu, ecc_volatile.uncorrected), ENTRY(gpu, ecc_aggregate.corrected),
    ENTRY(gpu, ecc_aggregate.uncorrected), ENTRY(gpu, remapped_corrected), ENTRY(gpu, remapped_uncorrected),
    ENTRY(gpu, remap_pending), ENTRY(gpu, remap_failed), ENTRY(gpu, recovery_action), ENTRY(gpu, power_mw),
    ENTRY(gpu, limit_mw), ENTRY(gpu, celsius), ENTRY(gpu, memory_celsius), ENTRY(gpu, utilization),
    ENTRY(gpu, memory_utilization), ENTRY(gpu, locked_min), ENTRY(gpu, locked_max), ENTRY(gpu, application_clock),
    ENTRY(gpu, persistence), ENTRY(gpu, compute_mode), ENTRY(gpu, draining), ENTRY(gpu, generation),
    ENTRY(gpu, pcie_generation), ENTRY(gpu, pcie_width), ENTRY(gpu, pcie_replays),
};

static const struct entry NODE_ENTRIES[] = {
    ENTRY(node, driver_loaded), ENTRY(node, unprivileged), ENTRY(node, refuse_4g_3g), ENTRY(node, stale_enumeration),
    ENTRY(node, uuid_policy), ENTRY(node, nvml_is_use), ENTRY(node, create_gpu_instance_ms),
    ENTRY(node, create_compute_instance_ms), ENTRY(node, destroy_gpu_instance_ms),
    ENTRY(node, destroy_compute_instance_ms), ENTRY(node, events_told),
    ENTRY(node, create_context_ms), ENTRY(node, memset_mb_s), ENTRY(node, copy_mb_s),
    FIXED(node, gpu_count),
};

#define COUNT(entries) (sizeof(entries) / sizeof((entries)[0]))

/* The field of that name of a GPU, or of the node where `gpu` is -1; NULL: there is none, or none to be changed. */
static void *field(struct node *node, int gpu, const char *name, bool change, size_t *size)
{
    const struct entry *entries = gpu < 0 ? NODE_ENTRIES : GPU_ENTRIES;
    size_t count = gpu < 0 ? COUNT(NODE_ENTRIES) : COUNT(GPU_ENTRIES);
    if (gpu >= (int)node->gpu_count)
        return NULL;
    char *base = gpu < 0 ? (char *)node : (char *)&node->gpus[gpu];
    for (size_t at = 0; at < count; at++)
        if (strcmp(entries[at].name, name) == 0 && !(change && entries[at].fixed)) {
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
    void *at = field(node, gpu, name, true, &size);
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
    void *at = field((struct node *)state_look(), gpu, name, false, &size);
    *value = 0;
    if (at != NULL)
        memcpy(value, at, size);
    state_done();
    return at == NULL ? NO_SUCH : 0;
}

EXPORT int nvsim_text(const char *path, const char *name, char *text, uint32_t length)
{
    if (!state_control(path))
        return NO_FILE;
    const struct node *node = state_look();
    const char *found = strcmp(name, "boot_id") == 0 ? node->boot_id
                        : strcmp(name, "driver_version") == 0 ? node->driver_version : NULL;
    int result = found == NULL ? NO_SUCH : give_text(text, length, found) == NVML_SUCCESS ? 0 : NO_ROOM;
    state_done();
    return result;
}

/* The name of the `number`th field that can be set, of a GPU or of the node; NULL: there are fewer. */
EXPORT const char *nvsim_field(int of_gpu, uint32_t number)
{
    const struct entry *entries = of_gpu ? GPU_ENTRIES : NODE_ENTRIES;
    for (size_t at = 0; at < (of_gpu ? COUNT(GPU_ENTRIES) : COUNT(NODE_ENTRIES)); at++)
        if (!entries[at].fixed && number-- == 0)
            return entries[at].name;
    return NULL;
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

/* --- memory ------------------------------------------------------------------------------------------------------- */

struct residue {
    uint32_t slice, pattern, writer;
    uint64_t bytes;
};

/* The range of the device of that UUID which whoever holds it can reach. */
static bool reach_of(const struct node *node, const char *uuid, uint32_t *gpu, struct range *range)
{
    struct mig_device mig;
    for (*gpu = 0; *gpu < node->gpu_count; ++*gpu) {
        const struct gpu *it = &node->gpus[*gpu];
        bool whole = strcmp(it->uuid, uuid) == 0;
        if (!whole && !find_mig_device(it, uuid, &mig))
            continue;
        *range = reach(&boards[it->board], whole ? NULL : &it->instances[mig.instance]);
        return true;
    }
    return false;
}

/* What stands within a range, slice by slice and ascending: how many rows, of which at most `room` are filled. */
static int list_residue(const struct board *board, const struct gpu *gpu, struct range within, struct residue *rows,
                        int room)
{
    int count = 0;
    for (uint32_t slice = 0; slice < board->memory_slices; slice++) {
        struct range part = slice_range(board, slice);
        uint64_t from = part.from > within.from ? part.from : within.from, end;
        uint64_t to = part.to < within.to ? part.to : within.to;
        for (; from < to; from = end) {
            const struct stretch *one = &gpu->memory[stretch_at(board, gpu, from, &end)];
            end = end < to ? end : to;
            if (count < room)
                rows[count] = (struct residue){slice, one->pattern, one->writer, end - from};
            count++;
        }
    }
    return count;
}

/* What stands in all of a GPU's memory. */
EXPORT int nvsim_residue(const char *path, uint32_t gpu, struct residue *rows, int room)
{
    if (!state_control(path))
        return NO_FILE;
    const struct node *node = state_look();
    int result = NO_SUCH;
    if (gpu < node->gpu_count) {
        const struct board *board = &boards[node->gpus[gpu].board];
        result = list_residue(board, &node->gpus[gpu], (struct range){0, memory_size(board)}, rows, room);
    }
    state_done();
    return result;
}

/* What the holder of a GPU or a MIG device can read. */
EXPORT int nvsim_readable(const char *path, const char *uuid, struct residue *rows, int room)
{
    if (!state_control(path))
        return NO_FILE;
    uint32_t gpu;
    struct range range;
    const struct node *node = state_look();
    int result = NO_SUCH;
    if (reach_of(node, uuid, &gpu, &range))
        result = list_residue(&boards[node->gpus[gpu].board], &node->gpus[gpu], range, rows, room);
    state_done();
    return result;
}

/* Write a pattern over one memory slice of a GPU, or all of it (-1), as a former holder would have left it. */
EXPORT int nvsim_plant(const char *path, uint32_t gpu, int slice, uint32_t pattern, uint32_t writer)
{
    if (!state_control(path))
        return NO_FILE;
    struct node *node = state_change();
    int result = NO_SUCH;
    if (gpu < node->gpu_count && slice < (int)boards[node->gpus[gpu].board].memory_slices) {
        const struct board *board = &boards[node->gpus[gpu].board];
        struct range range = {0, memory_size(board)};
        if (slice >= 0)
            range = slice_range(board, (uint32_t)slice);
        result = memory_write(board, &node->gpus[gpu], range, pattern, writer) ? 0 : NO_ROOM;
    }
    if (result == 0)
        state_commit();
    state_done();
    return result;
}

/* Number of the capability node of a GPU instance, or of a compute instance of it; see caller.h. */
EXPORT uint32_t nvsim_capability(uint32_t minor, uint32_t instance, int compute)
{
    return capability(minor, instance, compute);
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

struct fault_row {
    char symbol[NAME_LENGTH];
    int32_t gpu, gpu_instance;
    uint32_t after, times, seen, result, delay_ms;
};

EXPORT int nvsim_fault(const char *path, int number, struct fault_row *row)
{
    if (!state_control(path))
        return NO_FILE;
    const struct node *node = state_look();
    bool there = number >= 0 && number < MAX_FAULTS && node->faults[number].used;
    if (there) {
        const struct fault *it = &node->faults[number];
        *row = (struct fault_row){
            .gpu = it->gpu, .gpu_instance = it->gpu_instance, .after = it->after, .times = it->times, .seen = it->seen,
            .result = it->result, .delay_ms = it->delay_ms,
        };
        memcpy(row->symbol, it->symbol, sizeof row->symbol);
    }
    state_done();
    return there ? 0 : NO_SUCH;
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
    if (result == 0 && reset_refusal(node, gpu) != NVML_SUCCESS)
        result = REFUSED;
    if (result == 0) {
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
