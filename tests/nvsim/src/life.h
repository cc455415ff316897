/* What happens to a GPU as a whole: a change of its mode, a reset, a reboot of the node, falling off the bus. */
#ifndef LIFE_H
#define LIFE_H

#include "state.h"

/* A GPU of the board, as it is when it is new. `seed` makes its UUID and serial number. */
struct gpu new_gpu(uint32_t board, uint32_t index, uint64_t seed);
void new_boot_id(struct node *node, uint64_t seed);

/* The pending MIG mode becomes the current one: no instance is left, and no handle holds. */
void settle_mode(struct node *node, struct gpu *gpu);
/* Why the calling process cannot reset a GPU: what NVML returns where something is so; SUCCESS: it can. */
int reset_refusal(const struct node *node, uint32_t gpu);
/* A reset of one GPU. The caller has seen to it that it may be. Its memory stays as it is. */
void reset_gpu(struct node *node, struct gpu *gpu);
/* A reboot of the node: a new boot id, no process, no instance, energy from nought, chance in memory. */
void reboot(struct node *node, uint64_t seed);
/* Xid 79: nothing answers until a reboot. */
void lose_gpu(struct node *node, struct gpu *gpu);

#endif
