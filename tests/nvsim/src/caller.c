/* See caller.h. */
#define _GNU_SOURCE
#include "caller.h"

#include <limits.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

bool has_cap_sys_admin(void)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{0}};
    if (syscall(SYS_capget, &header, data) != 0)
        return false;
    return data[CAP_SYS_ADMIN / 32].effective >> CAP_SYS_ADMIN % 32 & 1;
}

bool privileged(const struct node *node)
{
    if (node->unprivileged || getenv("NVSIM_UNPRIVILEGED") != NULL)
        return false;
    return node->owner == geteuid() || has_cap_sys_admin();
}

bool sees_node(const char *name)
{
    char path[PATH_MAX];
    const char *folder = getenv("NVSIM_DEV");
    if (folder == NULL)
        return true;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return access(path, F_OK) == 0;
}

bool sees_gpu(const struct gpu *gpu)
{
    char name[32];
    snprintf(name, sizeof name, "nvidia%u", gpu->minor);
    return sees_node(name);
}

int seen_gpu(const struct node *node, uint32_t rank)
{
    uint32_t seen = 0;
    for (uint32_t index = 0; index < node->gpu_count; index++)
        if (sees_gpu(&node->gpus[index]) && seen++ == rank)
            return (int)index;
    return -1;
}

bool sees_mig_device(const struct gpu *gpu, uint32_t gpu_instance, uint32_t compute_instance)
{
    char of_instance[48], of_compute[48];
    snprintf(of_instance, sizeof of_instance, "nvidia-caps/nvidia-cap%u", capability(gpu->minor, gpu_instance, -1));
    snprintf(of_compute, sizeof of_compute, "nvidia-caps/nvidia-cap%u",
             capability(gpu->minor, gpu_instance, (int)compute_instance));
    return sees_node(of_instance) && sees_node(of_compute);
}

uint32_t capability(uint32_t minor, uint32_t gpu_instance, int compute_instance)
{
    enum { FIRST = 3, INSTANCES = 15, COMPUTE_INSTANCES = 8 }; /* 1 and 2 are `config` and `monitor`. */
    uint32_t instance = (minor * INSTANCES + gpu_instance) * (1 + COMPUTE_INSTANCES);
    return FIRST + instance + (uint32_t)(compute_instance + 1);
}
