/* See devices.h. */
#include "devices.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

uint32_t multiprocessors(const struct board *board)
{
    return board->cores / (board->compute_major == 8 ? 64 : 128); /* 8.0 is the only 8 among the boards. */
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
            if (instance->compute[compute].used &&
                sees_mig_device(gpu, instance->id, instance->compute[compute].id)) {
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

bool find_mig_device(const struct gpu *gpu, const char *uuid, struct mig_device *found)
{
    struct mig_device all[MAX_COMPUTE_INSTANCES];
    mig_devices(gpu, all);
    for (uint32_t at = 0; at < MAX_COMPUTE_INSTANCES; at++) {
        const struct gpu_instance *instance = &gpu->instances[all[at].instance];
        const struct compute_instance *compute = &instance->compute[all[at].compute];
        char legacy[UUID_LENGTH * 2];
        snprintf(legacy, sizeof legacy, "MIG-%s/%u/%u", gpu->uuid, instance->id, compute->id);
        if (all[at].there && (strcmp(uuid, compute->uuid) == 0 || strcmp(uuid, legacy) == 0)) {
            *found = all[at];
            return true;
        }
    }
    return false;
}

void name_profile(char *name, size_t size, const struct profile *profile, uint32_t width)
{
    if (width == profile->compute_slices)
        snprintf(name, size, "%s", profile->name);
    else
        snprintf(name, size, "%uc.%s", width, profile->name);
}

void name_mig_device(char *name, size_t size, const struct gpu *gpu, const struct gpu_instance *instance,
                     const struct compute_instance *compute)
{
    const struct board *board = &boards[gpu->board];
    char short_name[80];
    name_profile(short_name, sizeof short_name, &board->profiles[instance->profile], compute->width);
    snprintf(name, size, "%s MIG %s", board->name, short_name);
}
