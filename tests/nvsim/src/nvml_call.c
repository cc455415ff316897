/* Handles, faults and permissions: see nvml_call.h. Also what a process keeps for itself: its initialisation. */
#define _GNU_SOURCE
#include "nvml_call.h"

#include "clients.h"
#include "faults.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

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

/* Let a fault that is due have its way with a call about that handle. */
static int suffer_about(const char *symbol, nvml_handle given)
{
    struct target target = {0};
    struct node *node = (struct node *)state_look();
    (void)resolve(node, given, ~0u, &target);
    struct subject subject = {
        target.gpu == NULL ? -1 : (int)target.index, target.instance == NULL ? -1 : (int)target.instance->id,
    };
    bool any = fault_due(node, symbol, subject) != NULL;
    state_done();
    return any ? (int)suffer(symbol, subject) : NVML_SUCCESS;
}

/* --- calls ------------------------------------------------------------------------------------------------------- */

enum way { LOOK, LOOK_PRIVILEGED, CHANGE };

static int begin(const char *symbol, nvml_handle given, unsigned kinds, struct target *target, enum way way)
{
    if (!initialised())
        return NVML_UNINITIALIZED;
    int result = suffer_about(symbol, given);
    if (result != NVML_SUCCESS)
        return result;
    struct node *node = way == CHANGE ? state_change() : (struct node *)state_look();
    result = resolve(node, given, kinds, target);
    target->changes = way == CHANGE;
    if (result == NVML_SUCCESS && way != LOOK && !privileged(node))
        result = NVML_NO_PERMISSION;
    if (result != NVML_SUCCESS)
        state_done();
    return result;
}

int look(const char *symbol, nvml_handle given, unsigned kinds, struct target *target)
{
    return begin(symbol, given, kinds, target, LOOK);
}

int look_privileged(const char *symbol, nvml_handle given, unsigned kinds, struct target *target)
{
    return begin(symbol, given, kinds, target, LOOK_PRIVILEGED);
}

int change(const char *symbol, nvml_handle given, unsigned kinds, struct target *target)
{
    return begin(symbol, given, kinds, target, CHANGE);
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
    int result = suffer_about(symbol, NULL);
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

const struct profile *profile_of(const struct target *target)
{
    return &target->board->profiles[target->instance->profile];
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
    if (!sees_node("nvidiactl") || !state_open(getenv("NVSIM_STATE")))
        return NVML_DRIVER_NOT_LOADED; /* There is a library, but no driver behind it. */
    const struct node *node = state_look();
    bool loaded = node->driver_loaded;
    for (uint32_t index = 0; loaded && index < node->gpu_count; index++)
        mig_devices(&node->gpus[index], enumerated[index]);
    state_done();
    if (!loaded)
        state_close();
    return loaded ? suffer_about("nvmlInitWithFlags", NULL) : NVML_DRIVER_NOT_LOADED;
}

NVML nvmlInitWithFlags(uint32_t flags)
{
    (void)flags;
    pthread_mutex_lock(&initialising);
    int result = references == 0 ? load() : NVML_SUCCESS;
    if (result == NVML_SUCCESS && references == 0)
        watch_node(true);
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
    if (references > 0 && __atomic_sub_fetch(&references, 1, __ATOMIC_SEQ_CST) == 0)
        watch_node(false);
    pthread_mutex_unlock(&initialising);
    return result;
}
