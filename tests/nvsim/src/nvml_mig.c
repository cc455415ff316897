/* NVML's MIG calls: the mode of a GPU, GPU instances, compute instances, MIG devices. */
#include "nvml_call.h"
#include "clients.h"
#include "life.h"

#include <stdio.h>
#include <string.h>

/* End a call that takes so long where it succeeds. */
static int done_in(const struct target *target, int result, uint32_t milliseconds)
{
    result = done(target, result);
    take_time(result == NVML_SUCCESS ? (int64_t)milliseconds * 1000000 : 0);
    return result;
}

/* --- mode -------------------------------------------------------------------------------------------------------- */

NVML nvmlDeviceGetMigMode(nvml_handle device, uint32_t *current, uint32_t *pending)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    *current = target.gpu->mig_current;
    *pending = target.gpu->mig_pending;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceSetMigMode(nvml_handle device, uint32_t mode, int *activation)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (mode > 1)
        return done(&target, NVML_INVALID_ARGUMENT);
    struct gpu *gpu = target.gpu;
    gpu->mig_pending = mode;
    *activation = NVML_SUCCESS;
    if (mode == gpu->mig_current)
        return done(&target, NVML_SUCCESS);
    if (gpu->mig_reset_required)
        *activation = NVML_RESET_REQUIRED;
    else if (gpu_held(target.node, target.index))
        *activation = NVML_IN_USE;
    else
        settle_mode(target.node, gpu);
    return done(&target, NVML_SUCCESS);
}

/* --- GPU instances: what there could be -------------------------------------------------------------------------- */

static int profile_with(const char *symbol, nvml_handle device, uint32_t number, struct target *target,
                        const struct profile **profile)
{
    int result = look(symbol, device, GPU, target);
    if (result != NVML_SUCCESS)
        return result;
    if (number >= NVML_GPU_INSTANCE_PROFILE_COUNT)
        return done(target, NVML_INVALID_ARGUMENT);
    bool told = target->gpu->mig_current || !target->board->mig_needs_reset; /* Hopper: whatever the mode. */
    *profile = told ? profile_by_number(target->board, number) : NULL;
    return *profile != NULL ? NVML_SUCCESS : done(target, NVML_NOT_SUPPORTED);
}

NVML nvmlDeviceGetGpuInstanceProfileInfo(nvml_handle device, uint32_t number, struct nvml_gi_profile *info)
{
    struct target target;
    const struct profile *it;
    int result = profile_with(__func__, device, number, &target, &it);
    if (result != NVML_SUCCESS)
        return result;
    *info = (struct nvml_gi_profile){
        .id = it->id, .slice_count = it->compute_slices, .instance_count = it->most,
        .multiprocessors = it->multiprocessors, .copy_engines = it->copy_engines, .decoders = it->decoders,
        .jpegs = it->jpegs, .ofas = it->ofas, .memory_mib = it->memory_mib,
    };
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetGpuInstanceProfileInfoV(nvml_handle device, uint32_t number, struct nvml_gi_profile_v2 *info)
{
    struct target target;
    const struct profile *it;
    int result = profile_with(__func__, device, number, &target, &it);
    if (result != NVML_SUCCESS)
        return result;
    if (info->version != NVML_VERSION(struct nvml_gi_profile_v2, 2))
        return done(&target, NVML_INVALID_ARGUMENT);
    *info = (struct nvml_gi_profile_v2){
        .version = info->version, .id = it->id, .slice_count = it->compute_slices, .instance_count = it->most,
        .multiprocessors = it->multiprocessors, .copy_engines = it->copy_engines, .decoders = it->decoders,
        .jpegs = it->jpegs, .ofas = it->ofas, .memory_mib = it->memory_mib,
    };
    snprintf(info->name, sizeof info->name, "MIG %s", it->name);
    return done(&target, NVML_SUCCESS);
}

/* NVML tells the unprivileged what profiles there are, and not what there is of them. */
static int profile_by(const char *symbol, nvml_handle device, uint32_t id, bool changes, struct target *target,
                      const struct profile **profile)
{
    int result = (changes ? change : look_privileged)(symbol, device, GPU, target);
    if (result != NVML_SUCCESS)
        return result;
    if (!target->gpu->mig_current)
        return done(target, NVML_NOT_SUPPORTED);
    *profile = profile_by_id(target->board, id);
    return *profile != NULL ? NVML_SUCCESS : done(target, NVML_INVALID_ARGUMENT);
}

NVML nvmlDeviceGetGpuInstancePossiblePlacements_v2(nvml_handle device, uint32_t id, struct nvml_placement *placements,
                                                   uint32_t *count)
{
    struct target target;
    const struct profile *it;
    int result = profile_by(__func__, device, id, false, &target, &it);
    if (result != NVML_SUCCESS)
        return result;
    if (placements != NULL && *count < it->start_count)
        result = NVML_INSUFFICIENT_SIZE;
    for (uint32_t at = 0; placements != NULL && result == NVML_SUCCESS && at < it->start_count; at++)
        placements[at] = (struct nvml_placement){it->starts[at], it->memory_slices};
    *count = it->start_count;
    return done(&target, result);
}

static uint32_t mask(uint32_t start, uint32_t size)
{
    return ((1u << size) - 1) << start;
}

static uint32_t occupied(const struct target *target)
{
    uint32_t bits = 0;
    for (uint32_t slot = 0; slot < MAX_GPU_INSTANCES; slot++) {
        const struct gpu_instance *one = &target->gpu->instances[slot];
        if (one->used)
            bits |= mask(one->start, target->board->profiles[one->profile].memory_slices);
    }
    return bits;
}

static uint32_t made(const struct target *target, const struct profile *profile)
{
    uint32_t count = 0;
    for (uint32_t slot = 0; slot < MAX_GPU_INSTANCES; slot++) {
        const struct gpu_instance *one = &target->gpu->instances[slot];
        count += one->used && &target->board->profiles[one->profile] == profile;
    }
    return count;
}

/* Whether an instance of the profile may begin there now. */
static bool fits(const struct target *target, const struct profile *profile, uint32_t start)
{
    if (occupied(target) & mask(start, profile->memory_slices) || made(target, profile) >= profile->most)
        return false;
    uint32_t other = profile->compute_slices == 4 ? 3 : profile->compute_slices == 3 ? 4 : 0;
    for (uint32_t slot = 0; target->node->refuse_4g_3g && other && slot < MAX_GPU_INSTANCES; slot++) {
        const struct gpu_instance *one = &target->gpu->instances[slot];
        if (one->used && target->board->profiles[one->profile].compute_slices == other)
            return false;
    }
    return true;
}

NVML nvmlDeviceGetGpuInstanceRemainingCapacity(nvml_handle device, uint32_t id, uint32_t *count)
{
    struct target target;
    const struct profile *it;
    int result = profile_by(__func__, device, id, false, &target, &it);
    if (result != NVML_SUCCESS)
        return result;
    uint32_t left = it->most - made(&target, it);
    *count = 0;
    for (uint32_t at = 0; at < it->start_count && *count < left; at++)
        *count += fits(&target, it, it->starts[at]);
    return done(&target, NVML_SUCCESS);
}

/* --- GPU instances: making them ---------------------------------------------------------------------------------- */

static int make_instance(struct target *target, const struct profile *profile, uint32_t start, nvml_handle *made_one)
{
    for (uint32_t slot = 0; slot < MAX_GPU_INSTANCES; slot++) {
        struct gpu_instance *one = &target->gpu->instances[slot];
        if (one->used)
            continue;
        *one = (struct gpu_instance){
            .used = 1, .start = start, .serial = ++target->node->serial,
            .id = gpu_instance_id(target->board, target->gpu->layout, profile->memory_slices, start),
            .profile = (uint32_t)(profile - target->board->profiles),
        };
        *made_one = instance_handle(target, one);
        return NVML_SUCCESS;
    }
    return NVML_INSUFFICIENT_RESOURCES;
}

NVML nvmlDeviceCreateGpuInstanceWithPlacement(nvml_handle device, uint32_t id, const struct nvml_placement *placement,
                                              nvml_handle *instance)
{
    struct target target;
    const struct profile *it;
    int result = profile_by(__func__, device, id, true, &target, &it);
    if (result != NVML_SUCCESS)
        return result;
    result = NVML_INVALID_ARGUMENT;
    for (uint32_t at = 0; at < it->start_count; at++)
        if (it->starts[at] == placement->start && it->memory_slices == placement->size)
            result = fits(&target, it, placement->start) ? NVML_SUCCESS : NVML_INSUFFICIENT_RESOURCES;
    if (result == NVML_SUCCESS)
        result = make_instance(&target, it, placement->start, instance);
    return done_in(&target, result, target.node->create_gpu_instance_ms);
}

NVML nvmlDeviceCreateGpuInstance(nvml_handle device, uint32_t id, nvml_handle *instance)
{
    struct target target;
    const struct profile *it;
    int result = profile_by(__func__, device, id, true, &target, &it);
    if (result != NVML_SUCCESS)
        return result;
    result = NVML_INSUFFICIENT_RESOURCES;
    for (uint32_t at = 0; at < it->start_count && result != NVML_SUCCESS; at++)
        if (fits(&target, it, it->preferred[at]))
            result = make_instance(&target, it, it->preferred[at], instance);
    return done_in(&target, result, target.node->create_gpu_instance_ms);
}

NVML nvmlDeviceGetGpuInstances(nvml_handle device, uint32_t id, nvml_handle *instances, uint32_t *count)
{
    struct target target;
    const struct profile *it;
    int result = profile_by(__func__, device, id, false, &target, &it);
    if (result != NVML_SUCCESS)
        return result;
    *count = 0;
    for (uint32_t slot = 0; slot < MAX_GPU_INSTANCES; slot++) {
        struct gpu_instance *one = &target.gpu->instances[slot];
        if (one->used && &target.board->profiles[one->profile] == it)
            instances[(*count)++] = instance_handle(&target, one);
    }
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetGpuInstanceById(nvml_handle device, uint32_t id, nvml_handle *instance)
{
    struct target target;
    int result = look_privileged(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    result = target.gpu->mig_current ? NVML_NOT_FOUND : NVML_NOT_SUPPORTED;
    for (uint32_t slot = 0; slot < MAX_GPU_INSTANCES; slot++) {
        struct gpu_instance *one = &target.gpu->instances[slot];
        if (one->used && one->id == id) {
            *instance = instance_handle(&target, one);
            result = NVML_SUCCESS;
        }
    }
    return done(&target, result);
}

NVML nvmlGpuInstanceGetInfo(nvml_handle instance, struct nvml_gi_info *info)
{
    struct target target;
    int result = look(__func__, instance, GPU_INSTANCE, &target);
    if (result != NVML_SUCCESS)
        return result;
    const struct profile *it = profile_of(&target);
    *info = (struct nvml_gi_info){
        .device = gpu_handle(target.node, target.index), .id = target.instance->id, .profile_id = it->id,
        .placement = {target.instance->start, it->memory_slices},
    };
    return done(&target, NVML_SUCCESS);
}

NVML nvmlGpuInstanceDestroy(nvml_handle instance)
{
    struct target target;
    int result = change(__func__, instance, GPU_INSTANCE, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (compute_instances(target.instance) ||
        instance_in_use(target.node, target.index, target.instance->id, NVML_NO_INSTANCE))
        return done(&target, NVML_IN_USE);
    memset(target.instance, 0, sizeof *target.instance);
    return done_in(&target, NVML_SUCCESS, target.node->destroy_gpu_instance_ms);
}

/* --- compute instances ------------------------------------------------------------------------------------------- */

/* Widths by NVML_COMPUTE_INSTANCE_PROFILE_*, which is also what the driver calls them; 0: not on these boards. */
static const uint32_t WIDTHS[NVML_COMPUTE_INSTANCE_PROFILE_COUNT] = {1, 2, 3, 4, 7, 0, 0, 0, 0};

/* The width of a compute instance profile in a GPU instance; 0 where it has no such. */
static uint32_t width_in(const struct profile *profile, uint32_t number)
{
    uint32_t width = WIDTHS[number], slices = profile->compute_slices;
    if (width > slices || (width == 3 && slices == 4))
        return 0;
    return width;
}

typedef int begin_call(const char *symbol, nvml_handle handle, unsigned kinds, struct target *target);

static int compute_profile(const char *symbol, nvml_handle instance, uint32_t number, uint32_t engines,
                           begin_call *begin, struct target *target, uint32_t *width)
{
    int result = begin(symbol, instance, GPU_INSTANCE, target);
    if (result != NVML_SUCCESS)
        return result;
    if (number >= NVML_COMPUTE_INSTANCE_PROFILE_COUNT || engines != 0)
        return done(target, NVML_INVALID_ARGUMENT);
    *width = width_in(profile_of(target), number);
    return *width ? NVML_SUCCESS : done(target, NVML_NOT_SUPPORTED);
}

NVML nvmlGpuInstanceGetComputeInstanceProfileInfo(nvml_handle instance, uint32_t number, uint32_t engines,
                                                  struct nvml_ci_profile *info)
{
    struct target target;
    uint32_t width;
    int result = compute_profile(__func__, instance, number, engines, look, &target, &width);
    if (result != NVML_SUCCESS)
        return result;
    const struct profile *it = profile_of(&target);
    *info = (struct nvml_ci_profile){
        .id = number, .slice_count = width, .instance_count = it->compute_slices / width,
        .multiprocessors = it->multiprocessors / it->compute_slices * width, .shared_copy_engines = it->copy_engines,
        .shared_decoders = it->decoders, .shared_jpegs = it->jpegs, .shared_ofas = it->ofas,
    };
    return done(&target, NVML_SUCCESS);
}

NVML nvmlGpuInstanceGetComputeInstanceProfileInfoV(nvml_handle instance, uint32_t number, uint32_t engines,
                                                   struct nvml_ci_profile_v2 *info)
{
    struct target target;
    uint32_t width;
    int result = compute_profile(__func__, instance, number, engines, look, &target, &width);
    if (result != NVML_SUCCESS)
        return result;
    if (info->version != NVML_VERSION(struct nvml_ci_profile_v2, 2))
        return done(&target, NVML_INVALID_ARGUMENT);
    const struct profile *it = profile_of(&target);
    *info = (struct nvml_ci_profile_v2){
        .version = info->version, .id = number, .slice_count = width, .instance_count = it->compute_slices / width,
        .multiprocessors = it->multiprocessors / it->compute_slices * width, .shared_copy_engines = it->copy_engines,
        .shared_decoders = it->decoders, .shared_jpegs = it->jpegs, .shared_ofas = it->ofas,
    };
    char short_name[80];
    name_profile(short_name, sizeof short_name, it, width);
    snprintf(info->name, sizeof info->name, "MIG %s", short_name);
    return done(&target, NVML_SUCCESS);
}

/* Compute slices of a GPU instance that its compute instances hold, as bits. */
static uint32_t computing(const struct gpu_instance *instance)
{
    uint32_t bits = 0;
    for (uint32_t slot = 0; slot < MAX_COMPUTE_INSTANCES; slot++)
        if (instance->compute[slot].used)
            bits |= mask(instance->compute[slot].start, instance->compute[slot].width);
    return bits;
}

/* The first compute slice where one of that width may begin; -1: nowhere. */
static int first_free(const struct target *target, uint32_t width)
{
    uint32_t bits = computing(target->instance), slices = profile_of(target)->compute_slices;
    for (uint32_t start = 0; start + width <= slices; start += width)
        if (!(bits & mask(start, width)))
            return (int)start;
    return -1;
}

NVML nvmlGpuInstanceGetComputeInstanceRemainingCapacity(nvml_handle instance, uint32_t number, uint32_t *count)
{
    struct target target;
    uint32_t width;
    int result = compute_profile(__func__, instance, number, 0, look_privileged, &target, &width);
    if (result != NVML_SUCCESS)
        return result;
    uint32_t bits = computing(target.instance);
    *count = 0;
    for (uint32_t start = 0; start + width <= profile_of(&target)->compute_slices; start += width)
        *count += !(bits & mask(start, width));
    return done(&target, NVML_SUCCESS);
}

static uint32_t free_compute_id(const struct gpu_instance *instance)
{
    for (uint32_t id = 0;; id++) {
        bool taken = false;
        for (uint32_t slot = 0; slot < MAX_COMPUTE_INSTANCES; slot++)
            taken |= instance->compute[slot].used && instance->compute[slot].id == id;
        if (!taken)
            return id;
    }
}

static uint64_t mixed(uint64_t seed, const void *bytes, size_t length)
{
    uint64_t hash = 14695981039346656037ull ^ seed * 0x9e3779b97f4a7c15ull; /* FNV-1a, seeded. */
    for (size_t at = 0; at < length; at++)
        hash = (hash ^ ((const uint8_t *)bytes)[at]) * 1099511628211ull;
    hash ^= hash >> 32;
    return hash * 0x9e3779b97f4a7c15ull;
}

/* A UUID of version 5: of where the instance is and, unless UUIDs are stable, of how many were made before it. */
static void name_device(const struct target *target, const struct gpu_instance *instance,
                        struct compute_instance *compute)
{
    char of[128];
    uint32_t number = target->node->uuid_policy == UUID_STABLE ? 0 : compute->serial;
    int length = snprintf(of, sizeof of, "%s/%s/%u/%u/%u", target->node->boot_id, target->gpu->uuid, instance->id,
                          compute->id, number);
    if (target->node->uuid_policy == UUID_STABLE)
        length = snprintf(of, sizeof of, "%s/%u/%u", target->gpu->uuid, instance->id, compute->id);
    uint64_t high = mixed(1, of, (size_t)length), low = mixed(2, of, (size_t)length);
    snprintf(compute->uuid, sizeof compute->uuid, "MIG-%08x-%04x-5%03x-%04x-%012llx", (uint32_t)(high >> 32),
             (uint32_t)(high >> 16 & 0xffff), (uint32_t)(high & 0xfff), (uint32_t)(0x8000 | (low >> 48 & 0x3fff)),
             (unsigned long long)(low & 0xffffffffffff));
}

static int make_compute(struct target *target, uint32_t width, int start, nvml_handle *compute)
{
    struct compute_instance *one = target->instance->compute;
    while (one->used && one < target->instance->compute + MAX_COMPUTE_INSTANCES - 1)
        one++;
    if (start < 0 || one->used)
        return NVML_INSUFFICIENT_RESOURCES;
    *one = (struct compute_instance){
        .used = 1, .id = free_compute_id(target->instance), .width = width, .start = (uint32_t)start,
        .serial = ++target->node->serial,
    };
    name_device(target, target->instance, one);
    *compute = compute_handle(target, target->instance, one);
    return NVML_SUCCESS;
}

NVML nvmlGpuInstanceCreateComputeInstance(nvml_handle instance, uint32_t number, nvml_handle *compute)
{
    struct target target;
    uint32_t width;
    int result = compute_profile(__func__, instance, number, 0, change, &target, &width);
    if (result != NVML_SUCCESS)
        return result;
    result = make_compute(&target, width, first_free(&target, width), compute);
    return done_in(&target, result, target.node->create_compute_instance_ms);
}

NVML nvmlGpuInstanceCreateComputeInstanceWithPlacement(nvml_handle instance, uint32_t number,
                                                       const struct nvml_placement *placement, nvml_handle *compute)
{
    struct target target;
    uint32_t width;
    int result = compute_profile(__func__, instance, number, 0, change, &target, &width);
    if (result != NVML_SUCCESS)
        return result;
    uint32_t start = placement->start;
    if (placement->size != width || start % width != 0 || start + width > profile_of(&target)->compute_slices)
        return done(&target, NVML_INVALID_ARGUMENT);
    bool taken = computing(target.instance) & mask(start, width);
    result = make_compute(&target, width, taken ? -1 : (int)start, compute);
    return done_in(&target, result, target.node->create_compute_instance_ms);
}

NVML nvmlGpuInstanceGetComputeInstancePossiblePlacements(nvml_handle instance, uint32_t number,
                                                         struct nvml_placement *placements, uint32_t *count)
{
    struct target target;
    uint32_t width;
    int result = compute_profile(__func__, instance, number, 0, look_privileged, &target, &width);
    if (result != NVML_SUCCESS)
        return result;
    uint32_t all = profile_of(&target)->compute_slices / width;
    if (placements != NULL && *count < all)
        result = NVML_INSUFFICIENT_SIZE;
    for (uint32_t at = 0; placements != NULL && result == NVML_SUCCESS && at < all; at++)
        placements[at] = (struct nvml_placement){at * width, width};
    *count = all;
    return done(&target, result);
}

NVML nvmlGpuInstanceGetComputeInstances(nvml_handle instance, uint32_t number, nvml_handle *found, uint32_t *count)
{
    struct target target;
    uint32_t width;
    int result = compute_profile(__func__, instance, number, 0, look_privileged, &target, &width);
    if (result != NVML_SUCCESS)
        return result;
    *count = 0;
    for (uint32_t slot = 0; slot < MAX_COMPUTE_INSTANCES; slot++) {
        struct compute_instance *one = &target.instance->compute[slot];
        if (one->used && one->width == width)
            found[(*count)++] = compute_handle(&target, target.instance, one);
    }
    return done(&target, NVML_SUCCESS);
}

NVML nvmlGpuInstanceGetComputeInstanceById(nvml_handle instance, uint32_t id, nvml_handle *compute)
{
    struct target target;
    int result = look_privileged(__func__, instance, GPU_INSTANCE, &target);
    if (result != NVML_SUCCESS)
        return result;
    result = NVML_NOT_FOUND;
    for (uint32_t slot = 0; slot < MAX_COMPUTE_INSTANCES; slot++) {
        struct compute_instance *one = &target.instance->compute[slot];
        if (one->used && one->id == id) {
            *compute = compute_handle(&target, target.instance, one);
            result = NVML_SUCCESS;
        }
    }
    return done(&target, result);
}

static uint32_t number_of_width(uint32_t width)
{
    uint32_t number = 0;
    while (WIDTHS[number] != width)
        number++;
    return number;
}

NVML nvmlComputeInstanceGetInfo_v2(nvml_handle compute, struct nvml_ci_info *info)
{
    struct target target;
    int result = look(__func__, compute, COMPUTE_INSTANCE, &target);
    if (result != NVML_SUCCESS)
        return result;
    struct mig_device device = {
        true, (uint32_t)(target.instance - target.gpu->instances),
        (uint32_t)(target.compute - target.instance->compute), target.compute->serial,
    };
    *info = (struct nvml_ci_info){
        .device = mig_device_handle(target.index, &device),
        .gpu_instance = instance_handle(&target, target.instance), .id = target.compute->id,
        .profile_id = number_of_width(target.compute->width),
        .placement = {target.compute->start, target.compute->width},
    };
    return done(&target, NVML_SUCCESS);
}

NVML nvmlComputeInstanceDestroy(nvml_handle compute)
{
    struct target target;
    int result = change(__func__, compute, COMPUTE_INSTANCE, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (instance_in_use(target.node, target.index, target.instance->id, target.compute->id))
        return done(&target, NVML_IN_USE);
    memset(target.compute, 0, sizeof *target.compute);
    return done_in(&target, NVML_SUCCESS, target.node->destroy_compute_instance_ms);
}

/* --- MIG devices ------------------------------------------------------------------------------------------------- */

ANSWER(nvmlDeviceGetMaxMigDeviceCount, GPU, uint32_t, target.gpu->mig_current ? target.board->compute_slices : 0)

NVML nvmlDeviceGetMigDeviceHandleByIndex(nvml_handle device, uint32_t index, nvml_handle *mig)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (index >= MAX_COMPUTE_INSTANCES)
        return done(&target, NVML_INVALID_ARGUMENT);
    struct mig_device found[MAX_COMPUTE_INSTANCES];
    mig_devices(target.gpu, found);
    const struct mig_device *one = &found[index];
    if (target.node->stale_enumeration)
        one = &enumerated_at_init(target.index)[index];
    if (!one->there)
        return done(&target, NVML_NOT_FOUND);
    *mig = mig_device_handle(target.index, one);
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml_handle mig, nvml_handle *device)
{
    struct target target;
    int result = look(__func__, mig, MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    *device = gpu_handle(target.node, target.index);
    return done(&target, NVML_SUCCESS);
}

ANSWER(nvmlDeviceIsMigDeviceHandle, GPU | MIG_DEVICE, uint32_t, target.kind == MIG_DEVICE)

ANSWER(nvmlDeviceGetGpuInstanceId, MIG_DEVICE, uint32_t, target.instance->id)

ANSWER(nvmlDeviceGetComputeInstanceId, MIG_DEVICE, uint32_t, target.compute->id)

NVML nvmlDeviceGetAttributes_v2(nvml_handle mig, struct nvml_attributes *attributes)
{
    struct target target;
    int result = look(__func__, mig, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (target.kind != MIG_DEVICE)
        return done(&target, NVML_NOT_SUPPORTED);
    const struct profile *it = profile_of(&target);
    *attributes = (struct nvml_attributes){
        .multiprocessors = it->multiprocessors / it->compute_slices * target.compute->width,
        .shared_copy_engines = it->copy_engines, .shared_decoders = it->decoders, .shared_jpegs = it->jpegs,
        .shared_ofas = it->ofas, .gpu_instance_slices = it->compute_slices,
        .compute_instance_slices = target.compute->width, .memory_mib = it->memory_mib,
    };
    return done(&target, NVML_SUCCESS);
}
