/* NVML's event sets. A set belongs to the process that made it and sees what is told after it was registered for. */
#include "nvml_call.h"

#include <pthread.h>
#include <string.h>

enum { MAX_SETS = 64 };

struct event_set {
    bool used;
    uint32_t serial;
    uint64_t types[MAX_GPUS]; /* What it is registered for; 0: not at all. */
    uint64_t since[MAX_GPUS];
    uint64_t delivered;       /* Number of the last event that it gave out or passed over. */
};

static struct event_set sets[MAX_SETS];
static uint32_t made;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

enum { SET_MAGIC = 0x5e };

static nvml_handle set_handle(const struct event_set *set)
{
    return (nvml_handle)(uintptr_t)((uint64_t)SET_MAGIC << 56 | (uint64_t)(set - sets) << 32 | set->serial);
}

/* The set of a handle, with `guard` held; NULL (and not held) where there is none. */
static struct event_set *held(nvml_handle given)
{
    uint64_t bits = (uint64_t)(uintptr_t)given, slot = bits >> 32 & 0xffffff;
    pthread_mutex_lock(&guard);
    if (bits >> 56 == SET_MAGIC && slot < MAX_SETS && sets[slot].used && sets[slot].serial == (uint32_t)bits)
        return &sets[slot];
    pthread_mutex_unlock(&guard);
    return NULL;
}

NVML nvmlEventSetCreate(nvml_handle *set)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    uint64_t last = node->events_told;
    state_done();
    result = NVML_MEMORY;
    pthread_mutex_lock(&guard);
    for (uint32_t slot = 0; slot < MAX_SETS && result != NVML_SUCCESS; slot++)
        if (!sets[slot].used) {
            sets[slot] = (struct event_set){.used = true, .serial = ++made, .delivered = last};
            *set = set_handle(&sets[slot]);
            result = NVML_SUCCESS;
        }
    pthread_mutex_unlock(&guard);
    return result;
}

NVML nvmlEventSetFree(nvml_handle given)
{
    struct event_set *set = held(given);
    if (set == NULL)
        return NVML_INVALID_ARGUMENT;
    set->used = false;
    pthread_mutex_unlock(&guard);
    return NVML_SUCCESS;
}

static const uint64_t SUPPORTED = NVML_EVENT_XID | NVML_EVENT_DOUBLE_BIT_ECC | NVML_EVENT_SINGLE_BIT_ECC |
                                  NVML_EVENT_CLOCK | NVML_EVENT_MIG_CONFIG_CHANGE;

ANSWER(nvmlDeviceGetSupportedEventTypes, GPU | MIG_DEVICE, uint64_t, target.kind == GPU ? SUPPORTED : 0)

NVML nvmlDeviceRegisterEvents(nvml_handle device, uint64_t types, nvml_handle given)
{
    struct target target;
    int result = look(__func__, device, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    uint64_t last = target.node->events_told;
    uint32_t index = target.index;
    bool supported = target.kind == GPU && (types & ~SUPPORTED) == 0;
    done(&target, NVML_SUCCESS);
    struct event_set *set = held(given);
    if (set == NULL)
        return NVML_INVALID_ARGUMENT;
    if (supported) {
        if (set->types[index] == 0)
            set->since[index] = last; /* A second registration loses nothing that was told since the first. */
        set->types[index] |= types;
    }
    pthread_mutex_unlock(&guard);
    return supported ? NVML_SUCCESS : NVML_NOT_SUPPORTED;
}

/* The next event for the set, if there is one. GPU_IS_LOST where a GPU that it is registered for is gone, once all that
 * was told before has been given out. */
static int next(struct event_set *set, const struct node *node, struct nvml_event *event)
{
    uint64_t oldest = node->events_told > MAX_EVENTS ? node->events_told - MAX_EVENTS + 1 : 1;
    if (set->delivered + 1 < oldest)
        set->delivered = oldest - 1;
    while (set->delivered < node->events_told) {
        const struct event *one = &node->events[++set->delivered % MAX_EVENTS];
        if (!(set->types[one->gpu] & one->type) || one->number <= set->since[one->gpu])
            continue;
        *event = (struct nvml_event){
            gpu_handle(node, one->gpu), one->type, one->data, one->gpu_instance, one->compute_instance,
        };
        return NVML_SUCCESS;
    }
    for (uint32_t index = 0; index < node->gpu_count; index++)
        if (set->types[index] && node->gpus[index].lost)
            return NVML_GPU_IS_LOST;
    return NVML_TIMEOUT;
}

NVML nvmlEventSetWait_v2(nvml_handle given, struct nvml_event *event, uint32_t timeout_ms)
{
    const struct node *node;
    int64_t deadline = clock_monotonic() + (int64_t)timeout_ms * 1000000;
    for (bool first = true;; first = false) {
        int result = first ? look_at_node("nvmlEventSetWait_v2", &node) : look_again_at_node(&node);
        if (result != NVML_SUCCESS)
            return result;
        uint64_t last = node->events_told;
        struct event_set *set = held(given);
        result = set == NULL ? NVML_INVALID_ARGUMENT : next(set, node, event);
        if (set != NULL)
            pthread_mutex_unlock(&guard);
        state_done();
        int64_t left = deadline - clock_monotonic();
        if (result != NVML_TIMEOUT || left <= 0)
            return result;
        state_await_event(last, left);
    }
}

NVML nvmlEventSetWait(nvml_handle set, struct nvml_event *event, uint32_t timeout_ms)
{
    return nvmlEventSetWait_v2(set, event, timeout_ms);
}
