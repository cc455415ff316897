/* Profiles, instances and MIG devices of a node's GPUs, as the drivers' libraries look for them. */
#ifndef DEVICES_H
#define DEVICES_H

#include "boards.h"
#include "caller.h"
#include "state.h"

#include <stddef.h>

const struct profile *profile_by_number(const struct board *board, uint32_t number);
const struct profile *profile_by_id(const struct board *board, uint32_t id);
/* Of a whole GPU. */
uint32_t multiprocessors(const struct board *board);
uint32_t compute_instances(const struct gpu_instance *instance);

/* A MIG device of a GPU, by the slots of its GPU instance and its compute instance; not there: a hole. */
struct mig_device {
    bool there;
    uint32_t instance, compute;
    uint32_t serial;
};
/* Those that the calling process sees, by index. */
void mig_devices(const struct gpu *gpu, struct mig_device found[MAX_COMPUTE_INSTANCES]);
/* The one of that UUID, in its present or its older form. */
bool find_mig_device(const struct gpu *gpu, const char *uuid, struct mig_device *found);

/* Names of devices, as NVML and CUDA say them. */
void name_profile(char *name, size_t size, const struct profile *profile, uint32_t width);
void name_mig_device(char *name, size_t size, const struct gpu *gpu, const struct gpu_instance *instance,
                     const struct compute_instance *compute);

#endif
