/* See cuda_call.h. Also initialisation, the enumeration of devices, and contexts: what a process keeps for itself. */
#define _GNU_SOURCE
#include "cuda_call.h"

#include "clients.h"
#include "faults.h"
#include "nvml_abi.h"

#include <ctype.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What the context of a device is to this process. */
struct context {
    uint32_t references;
    uint32_t generation; /* Part of its handle, so that a stale one is known. */
    uint32_t slot, client;
};

static enum { NEVER, READY, FORKED } state;
static struct cuda_device devices[MAX_GPUS];
static int device_count;
static struct context contexts[MAX_GPUS];
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static __thread cuda_context current;

/* --- faults ------------------------------------------------------------------------------------------------------- */

static int endure(const char *symbol, struct subject subject)
{
    bool any = fault_due((struct node *)state_look(), symbol, subject) != NULL;
    state_done();
    return any ? (int)suffer(symbol, subject) : CUDA_SUCCESS;
}

static struct subject about(int device)
{
    if (device < 0)
        return (struct subject){-1, -1};
    return (struct subject){(int)devices[device].gpu, (int)devices[device].gpu_instance};
}

/* --- enumeration -------------------------------------------------------------------------------------------------- */

static struct cuda_device whole_gpu(const struct node *node, uint32_t index)
{
    const struct gpu *gpu = &node->gpus[index];
    const struct board *board = &boards[gpu->board];
    struct cuda_device device = {
        .gpu = index, .gpu_instance = NVML_NO_INSTANCE, .compute_instance = NVML_NO_INSTANCE,
        .multiprocessors = multiprocessors(board),
    };
    snprintf(device.uuid, sizeof device.uuid, "%s", gpu->uuid);
    snprintf(device.name, sizeof device.name, "%s", board->name);
    return device;
}

static struct cuda_device mig_device(const struct node *node, uint32_t index, const struct mig_device *slots)
{
    const struct gpu *gpu = &node->gpus[index];
    const struct gpu_instance *instance = &gpu->instances[slots->instance];
    const struct compute_instance *compute = &instance->compute[slots->compute];
    const struct profile *profile = &boards[gpu->board].profiles[instance->profile];
    struct cuda_device device = {
        .gpu = index, .mig = true, .slots = *slots, .gpu_instance = instance->id, .compute_instance = compute->id,
        .multiprocessors = profile->multiprocessors / profile->compute_slices * compute->width,
    };
    snprintf(device.uuid, sizeof device.uuid, "%s", compute->uuid);
    name_mig_device(device.name, sizeof device.name, gpu, instance, compute);
    return device;
}

/* Add a GPU, or its first MIG device where it is in MIG mode. False: there is nothing to add, or it is there. */
static bool add_gpu(const struct node *node, int index)
{
    struct mig_device all[MAX_COMPUTE_INSTANCES];
    if (index < 0 || node->gpus[index].lost)
        return false;
    for (int at = 0; at < device_count; at++)
        if (devices[at].gpu == (uint32_t)index)
            return false;
    if (!node->gpus[index].mig_current) {
        devices[device_count++] = whole_gpu(node, (uint32_t)index);
        return true;
    }
    mig_devices(&node->gpus[index], all);
    for (uint32_t at = 0; at < MAX_COMPUTE_INSTANCES; at++)
        if (all[at].there) {
            devices[device_count++] = mig_device(node, (uint32_t)index, &all[at]);
            return true;
        }
    return false;
}

static bool add_mig_device(const struct node *node, const char *uuid)
{
    struct mig_device slots;
    for (uint32_t index = 0; index < node->gpu_count; index++) {
        if (node->gpus[index].lost || !sees_gpu(&node->gpus[index]) ||
            !find_mig_device(&node->gpus[index], uuid, &slots))
            continue;
        devices[device_count++] = mig_device(node, index, &slots);
        return true;
    }
    return false;
}

/* The GPU whose UUID begins so; -1: none, or several. */
static int gpu_by_uuid(const struct node *node, const char *uuid)
{
    int found = -1;
    for (uint32_t index = 0; index < node->gpu_count; index++) {
        if (!sees_gpu(&node->gpus[index]) || strncmp(node->gpus[index].uuid, uuid, strlen(uuid)) != 0)
            continue;
        if (found >= 0)
            return -1;
        found = (int)index;
    }
    return found;
}

static bool add_named(const struct node *node, const char *name)
{
    char *end;
    if (device_count == MAX_GPUS)
        return false;
    if (strncmp(name, "MIG-", 4) == 0)
        return add_mig_device(node, name);
    if (strncmp(name, "GPU-", 4) == 0)
        return add_gpu(node, gpu_by_uuid(node, name));
    unsigned long rank = strtoul(name, &end, 10);
    return isdigit((unsigned char)name[0]) && *end == '\0' && rank < MAX_GPUS &&
           add_gpu(node, seen_gpu(node, (uint32_t)rank));
}

static void enumerate(const struct node *node)
{
    char text[4096], *rest = text, *name;
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    device_count = 0;
    if (visible == NULL) {
        for (uint32_t rank = 0; rank < node->gpu_count; rank++)
            add_gpu(node, seen_gpu(node, rank));
    } else {
        snprintf(text, sizeof text, "%s", visible);
        while ((name = strsep(&rest, ",")) != NULL) {
            name += strspn(name, " ");
            name[strcspn(name, " ")] = '\0';
            if (!add_named(node, name))
                break; /* The first that cannot be is the end of the list. */
        }
    }
    for (int at = 0; at < device_count; at++)
        if (devices[at].mig) { /* One MIG device, and then no GPU beside it. */
            devices[0] = devices[at];
            device_count = 1;
        }
}

/* --- initialisation ----------------------------------------------------------------------------------------------- */

static void in_child(void)
{
    pthread_mutex_init(&guard, NULL);
    if (state == READY)
        state = FORKED; /* CUDA cannot be used in a child, nor be initialised there again. */
}

__attribute__((constructor)) static void at_fork(void)
{
    pthread_atfork(NULL, NULL, in_child);
}

static int initialise(void)
{
    if (!sees_node("nvidiactl") || !state_open(getenv("NVSIM_STATE")))
        return CUDA_ERROR_NO_DEVICE;
    const struct node *node = state_look();
    bool loaded = node->driver_loaded;
    if (loaded)
        enumerate(node);
    state_done();
    int result = loaded ? endure("cuInit", about(-1)) : CUDA_ERROR_NO_DEVICE;
    if (result == CUDA_SUCCESS && !sees_node("nvidia-uvm"))
        result = CUDA_ERROR_UNKNOWN;
    if (result == CUDA_SUCCESS && device_count == 0)
        result = CUDA_ERROR_NO_DEVICE;
    if (result != CUDA_SUCCESS)
        state_close();
    return result;
}

CUDA cuInit(unsigned flags)
{
    if (flags != 0)
        return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&guard);
    int result = state == FORKED ? CUDA_ERROR_NOT_INITIALIZED : CUDA_SUCCESS;
    if (state == NEVER && (result = initialise()) == CUDA_SUCCESS)
        __atomic_store_n(&state, READY, __ATOMIC_SEQ_CST);
    pthread_mutex_unlock(&guard);
    return result;
}

bool cuda_initialised(void)
{
    return __atomic_load_n(&state, __ATOMIC_SEQ_CST) == READY;
}

/* --- calls -------------------------------------------------------------------------------------------------------- */

int cuda_begin(const char *symbol)
{
    return cuda_initialised() ? endure(symbol, about(-1)) : CUDA_ERROR_NOT_INITIALIZED;
}

int cuda_begin_device(const char *symbol, int number, const struct cuda_device **device)
{
    if (!cuda_initialised())
        return CUDA_ERROR_NOT_INITIALIZED;
    if (number < 0 || number >= device_count)
        return CUDA_ERROR_INVALID_DEVICE;
    *device = &devices[number];
    return endure(symbol, about(number));
}

const struct node *cuda_hold(void)
{
    return state_look();
}

CUDA cuDeviceGetCount(int *count)
{
    int result = cuda_begin(__func__);
    if (result == CUDA_SUCCESS)
        *count = device_count;
    return result;
}

/* --- contexts ----------------------------------------------------------------------------------------------------- */

enum { HANDLE_MAGIC = 0xcd };

static cuda_context handle_of(int device)
{
    return (cuda_context)(uintptr_t)((uint64_t)HANDLE_MAGIC << 56 | (uint64_t)contexts[device].generation << 8 |
                                     (uint64_t)device);
}

/* The device of a context, and what the process has of it. */
static int resolve(cuda_context given, int *device, struct context *context)
{
    uint64_t bits = (uint64_t)(uintptr_t)given;
    if (bits >> 56 != HANDLE_MAGIC || (int)(bits & 0xff) >= device_count)
        return CUDA_ERROR_INVALID_CONTEXT;
    *device = (int)(bits & 0xff);
    pthread_mutex_lock(&guard);
    *context = contexts[*device];
    bool stale = handle_of(*device) != given || context->references == 0;
    pthread_mutex_unlock(&guard);
    return stale ? CUDA_ERROR_CONTEXT_IS_DESTROYED : CUDA_SUCCESS;
}

int cuda_resume_use(bool changes, struct cuda_use *use)
{
    struct context context;
    int result = resolve(current, &use->device, &context);
    if (result != CUDA_SUCCESS)
        return result;
    const struct cuda_device *device = &devices[use->device];
    use->changes = changes;
    use->node = changes ? state_change() : (struct node *)state_look();
    use->gpu = &use->node->gpus[device->gpu];
    use->board = &boards[use->gpu->board];
    use->instance = device->mig ? &use->gpu->instances[device->slots.instance] : NULL;
    use->reach = reach(use->board, use->instance);
    const struct client *client = &use->node->clients[context.slot];
    use->client = context.client;
    use->pid = client->pid;
    if (!use->gpu->lost && client->used && client->serial == context.client)
        return CUDA_SUCCESS;
    state_done(); /* The GPU fell off the bus, or the node booted under it. */
    return CUDA_ERROR_UNKNOWN;
}

int cuda_begin_use(const char *symbol, bool changes, struct cuda_use *use)
{
    struct context context;
    int device = -1;
    if (!cuda_initialised())
        return CUDA_ERROR_NOT_INITIALIZED;
    int result = resolve(current, &device, &context);
    if (result == CUDA_SUCCESS)
        result = endure(symbol, about(device));
    return result == CUDA_SUCCESS ? cuda_resume_use(changes, use) : result;
}

int cuda_end_use(const struct cuda_use *use, int result)
{
    if (use->changes && result == CUDA_SUCCESS)
        state_commit();
    state_done();
    return result;
}

/* Whether a new context may be made on the device now. */
static int admission(const struct node *node, const struct cuda_device *device)
{
    const struct gpu *gpu = &node->gpus[device->gpu];
    const struct compute_instance *compute = &gpu->instances[device->slots.instance].compute[device->slots.compute];
    if (gpu->lost)
        return CUDA_ERROR_UNKNOWN;
    if (device->mig ? !compute->used || compute->serial != device->slots.serial : gpu->mig_current != 0)
        return CUDA_ERROR_INVALID_DEVICE; /* It is no more what it was when this process looked. */
    if (gpu->compute_mode == MODE_PROHIBITED || gpu->draining)
        return CUDA_ERROR_DEVICE_UNAVAILABLE;
    bool taken = device->mig ? instance_in_use(node, device->gpu, device->gpu_instance, device->compute_instance)
                             : gpu_in_use(node, device->gpu);
    return gpu->compute_mode != MODE_DEFAULT && taken ? CUDA_ERROR_DEVICE_UNAVAILABLE : CUDA_SUCCESS;
}

/* The memory that a context itself takes: about what nvidia-smi shows of an idle one on an A100 and on its slices. */
static uint64_t context_bytes(const struct cuda_device *device)
{
    return (uint64_t)(64 + 3 * device->multiprocessors) * MIB;
}

/* Make this process a client of the device, in a node that is being changed. */
static int register_client(struct node *node, const struct cuda_device *device, struct context *context)
{
    struct gpu *gpu = &node->gpus[device->gpu];
    const struct board *board = &boards[gpu->board];
    const struct gpu_instance *instance = device->mig ? &gpu->instances[device->slots.instance] : NULL;
    bury_clients(node);
    int result = admission(node, device);
    if (result != CUDA_SUCCESS)
        return result;
    int slot = add_client(node, device->gpu, device->gpu_instance, device->compute_instance);
    if (slot < 0)
        return CUDA_ERROR_OPERATING_SYSTEM;
    context->slot = (uint32_t)slot;
    context->client = node->clients[slot].serial;
    struct allocation *own = allocate(gpu, reach(board, instance), context_bytes(device), context->client, true);
    if (own == NULL)
        result = CUDA_ERROR_OUT_OF_MEMORY;
    else if (!memory_write(board, gpu, (struct range){own->from, own->to}, 0, WRITTEN_BY_DRIVER))
        result = CUDA_ERROR_UNKNOWN;
    if (result != CUDA_SUCCESS)
        client_unlock(context->slot);
    return result;
}

CUDA cuDevicePrimaryCtxRetain(cuda_context *context, int number)
{
    const struct cuda_device *device;
    int result = cuda_begin_device(__func__, number, &device);
    int64_t takes = 0;
    if (result != CUDA_SUCCESS)
        return result;
    pthread_mutex_lock(&guard);
    struct context *own = &contexts[number];
    if (own->references == 0) {
        struct node *node = state_change();
        takes = (int64_t)node->create_context_ms * 1000000;
        result = register_client(node, device, own);
        if (result == CUDA_SUCCESS)
            state_commit();
        state_done();
        own->generation += result == CUDA_SUCCESS;
    }
    own->references += result == CUDA_SUCCESS;
    *context = result == CUDA_SUCCESS ? handle_of(number) : NULL;
    pthread_mutex_unlock(&guard);
    take_time(result == CUDA_SUCCESS ? takes : 0);
    return result;
}

static void leave(struct context *context)
{
    struct node *node = state_change();
    if (node->clients[context->slot].used && node->clients[context->slot].serial == context->client) {
        end_client(node, context->slot);
        state_commit();
    }
    client_unlock(context->slot);
    state_done();
}

CUDA cuDevicePrimaryCtxRelease_v2(int number)
{
    const struct cuda_device *device;
    int result = cuda_begin_device(__func__, number, &device);
    if (result != CUDA_SUCCESS)
        return result;
    pthread_mutex_lock(&guard);
    if (contexts[number].references == 0)
        result = CUDA_ERROR_INVALID_CONTEXT;
    else if (--contexts[number].references == 0)
        leave(&contexts[number]);
    pthread_mutex_unlock(&guard);
    return result;
}

CUDA cuDevicePrimaryCtxGetState(int number, unsigned *flags, int *active)
{
    const struct cuda_device *device;
    int result = cuda_begin_device(__func__, number, &device);
    if (result != CUDA_SUCCESS)
        return result;
    pthread_mutex_lock(&guard);
    *flags = 0;
    *active = contexts[number].references > 0;
    pthread_mutex_unlock(&guard);
    return CUDA_SUCCESS;
}

CUDA cuCtxSetCurrent(cuda_context context)
{
    struct context found;
    int device, result = cuda_begin(__func__);
    if (result == CUDA_SUCCESS && context != NULL)
        result = resolve(context, &device, &found);
    if (result == CUDA_SUCCESS)
        current = context;
    return result;
}

CUDA cuCtxGetCurrent(cuda_context *context)
{
    int result = cuda_begin(__func__);
    if (result == CUDA_SUCCESS)
        *context = current;
    return result;
}

CUDA cuCtxGetDevice(int *number)
{
    struct cuda_use use;
    int result = cuda_begin_use(__func__, false, &use);
    if (result != CUDA_SUCCESS)
        return result;
    *number = use.device;
    return cuda_end_use(&use, CUDA_SUCCESS);
}

/* Nothing here is done behind the caller's back, so there is nothing to wait for. */
CUDA cuCtxSynchronize(void)
{
    struct cuda_use use;
    int result = cuda_begin_use(__func__, false, &use);
    return result == CUDA_SUCCESS ? cuda_end_use(&use, CUDA_SUCCESS) : result;
}
