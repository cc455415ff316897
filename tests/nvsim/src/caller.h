/* What the calling process may do, and which of the node's devices it sees.
 *
 * Changes need CAP_SYS_ADMIN, as NVIDIA's kernel module has it: root in an ordinary container has not got it. With
 * `$NVSIM_DEV` naming a folder of device nodes (a container's /dev), a process sees the GPUs whose node is there and
 * the MIG devices whose two capability nodes are; without it, everything.
 */
#ifndef CALLER_H
#define CALLER_H

#include "state.h"

/* What the libraries offer to others. */
#define EXPORT __attribute__((visibility("default")))

bool has_cap_sys_admin(void);
/* Whether the calling process may change anything. */
bool privileged(const struct node *node);

/* Whether the node of that name is in the folder of device nodes. */
bool sees_node(const char *name);
bool sees_gpu(const struct gpu *gpu);
/* The `rank`th GPU that the process sees; -1: it sees fewer. */
int seen_gpu(const struct node *node, uint32_t rank);
bool sees_mig_device(const struct gpu *gpu, uint32_t gpu_instance, uint32_t compute_instance);

/* Minor number of the node /dev/nvidia-caps/nvidia-cap<n> that grants access to a GPU instance (compute_instance -1),
 * or to a compute instance of it; as the driver lists them in /proc/driver/nvidia-caps/mig-minors. */
uint32_t capability(uint32_t minor, uint32_t gpu_instance, int compute_instance);

#endif
