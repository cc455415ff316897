/* Handles, faults and permissions: see call.h. Also what a process keeps for itself: its initialisation. */
#define _GNU_SOURCE
#include "call.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static unsigned references;
static pthread_mutex_t initialising = PTHREAD_MUTEX_INITIALIZER;
static struct mig_device enumerated[MAX_GPUS][MAX_COMPUTE_INSTANCES];

/* --- handles ----------------------------------------------------------------------------------------------------- */

enum { HANDLE_MAGIC = 0x5a };

static nvml_handle handle(enum kind kind, uint32_t gpu, uint32_t instance, uint32_t compute, uint32_t serial)
{
    return (nvml_handle)(uintptr_t)((uint64_t)HANDLE_MAGIC << 56 | (uint64_t)kind << 52 | (uint64_t)gpu << 44 |
                                    (uint64_t)instance << 40 | (uint64_t)compute << 36 | serial);
}

nvml_handle gpu_handle(const struct node *node, uint32_t index)
{
    return handle(GPU, index, 0, 0, node->gpus[index].generation);
}

nvml_handle instance_handle(const struct target *target, const struct gpu_instance *instance)
{
    return handle(GPU_INSTANCE, target->index, (uint32_t)(instance - target->gpu->instances), 0, instance->serial);
}

nvml_handle compute_handle(const struct target *target, const struct gpu_instance *instance,
                           const struct compute_instance *compute)
{
    return handle(COMPUTE_INSTANCE, target->index, (uint32_t)(instance - target->gpu->instances),
                  (uint32_t)(compute - instance->compute), compute->serial);
}

nvml_handle mig_device_handle(uint32_t gpu, const struct mig_device *device)
{
    return handle(MIG_DEVICE, gpu, device->instance, device->compute, device->serial);
}

/* What a handle stands for; INVALID_ARGUMENT for one that stands for nothing (any more). */
static int resolve(struct node *node, nvml_handle given, unsigned kinds, struct target *target)
{
    uint64_t bits = (uint64_t)(uintptr_t)given;
    uint32_t index = bits >> 44 & 0xff, slot = bits >> 40 & 0xf, compute = bits >> 36 & 0xf, serial = (uint32_t)bits;
    enum kind kind = (enum kind)(bits >> 52 & 0xf);
    if (bits >> 56 != HANDLE_MAGIC || !(kind & kinds) || index >= node->gpu_count)
        return NVML_INVALID_ARGUMENT;
    *target = (struct target){.node = node, .gpu = &node->gpus[index], .index = index, .kind = kind};
    target->board = &boards[target->gpu->board];
    if (target->gpu->lost)
        return NVML_GPU_IS_LOST;
    if (kind == GPU)
        return slot == 0 && compute == 0 && serial == target->gpu->generation ? NVML_SUCCESS : NVML_INVALID_ARGUMENT;
    if (slot >= MAX_GPU_INSTANCES || compute >= MAX_COMPUTE_INSTANCES || !target->gpu->instances[slot].used)
        return NVML_INVALID_ARGUMENT;
    target->instance = &target->gpu->instances[slot];
    if (kind == GPU_INSTANCE)
        return serial == target->instance->serial ? NVML_SUCCESS : NVML_INVALID_ARGUMENT;
    target->compute = &target->instance->compute[compute];
    return target->compute->used && serial == target->compute->serial ? NVML_SUCCESS : NVML_INVALID_ARGUMENT;
}

/* --- faults ------------------------------------------------------------------------------------------------------ */

static bool matches(const struct fault *fault, const char *symbol, const struct target *target)
{
    if (!fault->used || (strcmp(fault->symbol, "*") != 0 && strcmp(fault->symbol, symbol) != 0))
        return false;
    if (fault->times != 0 && fault->seen >= fault->after + fault->times)
        return false;
    if (fault->gpu >= 0 && (target->gpu == NULL || (uint32_t)fault->gpu != target->index))
        return false;
    return fault->gpu_instance < 0 ||
           (target->instance != NULL && target->instance->id == (uint32_t)fault->gpu_instance);
}

static struct fault *due(struct node *node, const char *symbol, nvml_handle given)
{
    struct target target = {0};
    (void)resolve(node, given, ~0u, &target);
    for (uint32_t slot = 0; slot < MAX_FAULTS; slot++)
        if (matches(&node->faults[slot], symbol, &target))
            return &node->faults[slot];
    return NULL;
}

/* Let the first fault that matches have its way: sleep as long as it says, and say what it wants returned. */
static int suffer(const char *symbol, nvml_handle given)
{
    uint32_t result = NVML_SUCCESS, delay = 0;
    bool any = due((struct node *)state_look(), symbol, given) != NULL;
    state_done();
    if (!any)
        return NVML_SUCCESS;
    struct fault *fault = due(state_change(), symbol, given);
    if (fault != NULL && fault->seen++ >= fault->after) {
        result = fault->result;
        delay = fault->delay_ms;
    }
    state_commit();
    state_done();
    struct timespec time = {delay / 1000, (long)(delay % 1000) * 1000000};
    nanosleep(&time, NULL);
    return (int)result;
}

/* --- calls ------------------------------------------------------------------------------------------------------- */

bool privileged(const struct node *node)
{
    return !node->unprivileged && getenv("NVSIM_UNPRIVILEGED") == NULL;
}

static int begin(const char *symbol, nvml_handle given, unsigned kinds, struct target *target, bool changes)
{
    if (!initialised())
        return NVML_UNINITIALIZED;
    int result = suffer(symbol, given);
    if (result != NVML_SUCCESS)
        return result;
    struct node *node = changes ? state_change() : (struct node *)state_look();
    result = resolve(node, given, kinds, target);
    target->changes = changes;
    if (result == NVML_SUCCESS && changes && !privileged(node))
        result = NVML_NO_PERMISSION;
    if (result != NVML_SUCCESS)
        state_done();
    return result;
}

int look(const char *symbol, nvml_handle given, unsigned kinds, struct target *target)
{
    return begin(symbol, given, kinds, target, false);
}

int change(const char *symbol, nvml_handle given, unsigned kinds, struct target *target)
{
    return begin(symbol, given, kinds, target, true);
}

int done(const struct target *target, int result)
{
    if (target->changes && result == NVML_SUCCESS)
        state_commit();
    state_done();
    return result;
}

int look_at_node(const char *symbol, const struct node **node)
{
    if (!initialised())
        return NVML_UNINITIALIZED;
    int result = suffer(symbol, NULL);
    return result == NVML_SUCCESS ? look_again_at_node(node) : result;
}

int look_again_at_node(const struct node **node)
{
    if (!initialised())
        return NVML_UNINITIALIZED;
    *node = state_look();
    return NVML_SUCCESS;
}

int give_text(char *buffer, uint32_t length, const char *text)
{
    size_t needed = strlen(text) + 1;
    if (buffer == NULL)
        return NVML_INVALID_ARGUMENT;
    if (needed > length)
        return NVML_INSUFFICIENT_SIZE;
    memcpy(buffer, text, needed);
    return NVML_SUCCESS;
}

/* --- profiles and MIG devices ------------------------------------------------------------------------------------ */

const struct profile *profile_by_number(const struct board *board, uint32_t number)
{
    for (uint32_t row = 0; row < board->profile_count; row++)
        if (board->profiles[row].number == number)
            return &board->profiles[row];
    return NULL;
}

const struct profile *profile_by_id(const struct board *board, uint32_t id)
{
    for (uint32_t row = 0; row < board->profile_count; row++)
        if (board->profiles[row].id == id)
            return &board->profiles[row];
    return NULL;
}

const struct profile *profile_of(const struct target *target)
{
    return &target->board->profiles[target->instance->profile];
}

uint32_t compute_instances(const struct gpu_instance *instance)
{
    uint32_t count = 0;
    for (uint32_t slot = 0; slot < MAX_COMPUTE_INSTANCES; slot++)
        count += instance->compute[slot].used;
    return count;
}

static int by_instance_id(const void *one, const void *other)
{
    const struct mig_device *a = one, *b = other;
    return a->serial < b->serial ? -1 : a->serial > b->serial;
}

void mig_devices(const struct gpu *gpu, struct mig_device found[MAX_COMPUTE_INSTANCES])
{
    struct mig_device all[MAX_GPU_INSTANCES * MAX_COMPUTE_INSTANCES];
    uint32_t count = 0;
    for (uint32_t slot = 0; slot < MAX_GPU_INSTANCES; slot++) {
        const struct gpu_instance *instance = &gpu->instances[slot];
        for (uint32_t compute = 0; instance->used && compute < MAX_COMPUTE_INSTANCES; compute++)
            if (instance->compute[compute].used) {
                uint32_t order = instance->id * 16 + instance->compute[compute].id;
                all[count++] = (struct mig_device){true, slot, compute, order};
            }
    }
    qsort(all, count, sizeof all[0], by_instance_id);
    memset(found, 0, MAX_COMPUTE_INSTANCES * sizeof found[0]);
    for (uint32_t index = 0, next = 0; index < MAX_COMPUTE_INSTANCES && next < count; index++) {
        if (gpu->hidden_indices >> index & 1)
            continue;
        found[index] = all[next++];
        const struct gpu_instance *instance = &gpu->instances[found[index].instance];
        found[index].serial = instance->compute[found[index].compute].serial;
    }
}

/* --- initialisation of this process ------------------------------------------------------------------------------ */

bool initialised(void)
{
    return __atomic_load_n(&references, __ATOMIC_SEQ_CST) > 0;
}

const struct mig_device *enumerated_at_init(uint32_t gpu)
{
    return enumerated[gpu];
}

static int load(void)
{
    if (!state_open(getenv("NVSIM_STATE")))
        return NVML_DRIVER_NOT_LOADED; /* There is a library, but no driver behind it. */
    const struct node *node = state_look();
    bool loaded = node->driver_loaded;
    for (uint32_t index = 0; loaded && index < node->gpu_count; index++)
        mig_devices(&node->gpus[index], enumerated[index]);
    state_done();
    if (!loaded)
        state_close();
    return loaded ? suffer("nvmlInitWithFlags", NULL) : NVML_DRIVER_NOT_LOADED;
}

NVML nvmlInitWithFlags(uint32_t flags)
{
    (void)flags;
    pthread_mutex_lock(&initialising);
    int result = references == 0 ? load() : NVML_SUCCESS;
    if (result == NVML_SUCCESS)
        __atomic_add_fetch(&references, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&initialising);
    return result;
}

NVML nvmlInit_v2(void)
{
    return nvmlInitWithFlags(0);
}

NVML nvmlShutdown(void)
{
    pthread_mutex_lock(&initialising);
    int result = references > 0 ? NVML_SUCCESS : NVML_UNINITIALIZED;
    if (references > 0)
        __atomic_sub_fetch(&references, 1, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&initialising);
    return result;
}
