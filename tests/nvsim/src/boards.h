/* What NVIDIA's boards are: names, memory, limits, and how they may be cut into instances. Facts only. */
#ifndef BOARDS_H
#define BOARDS_H

#include <stdbool.h>
#include <stdint.h>

enum { MAX_PROFILES = 8, MAX_STARTS = 8 };

struct profile {
    uint32_t number; /* NVML_GPU_INSTANCE_PROFILE_*: what one asks by. */
    uint32_t id;     /* What the driver calls it: what every other call wants. */
    uint32_t compute_slices, memory_slices;
    uint32_t memory_mib;
    uint32_t multiprocessors, copy_engines, decoders, jpegs, ofas;
    uint32_t most;   /* Instances on one GPU. */
    const char *name;
    uint32_t starts[MAX_STARTS]; /* First memory slices, ascending. */
    uint32_t start_count;
    uint32_t preferred[MAX_STARTS]; /* The same in the driver's own order. */
};

struct board {
    const char *name;  /* As NVML says it. */
    const char *vbios; /* A version that such boards are seen with. */
    uint32_t memory_mib;
    uint32_t compute_slices, memory_slices;
    uint32_t architecture; /* NVML_DEVICE_ARCH_*: 7 Ampere, 9 Hopper. */
    uint32_t compute_major, compute_minor, cores;
    uint32_t pci_device_id, pci_subsystem_id;
    uint32_t idle_mw, least_mw, most_mw, default_mw;
    uint32_t least_mhz, most_mhz, default_mhz, memory_mhz;
    uint32_t slowdown_celsius, shutdown_celsius, most_celsius, most_memory_celsius;
    bool mig_needs_reset; /* Enabling MIG resets the GPU, and the mode outlives a reboot (Ampere). */
    uint32_t profile_count;
    struct profile profiles[MAX_PROFILES];
};

extern const struct board boards[];
extern const uint32_t board_count;

/* The number that the driver gives a GPU instance of that many memory slices at that start. They are the nodes of a
 * tree, whose halves a board may have swapped. */
uint32_t gpu_instance_id(const struct board *board, uint32_t layout, uint32_t memory_slices, uint32_t start);

#endif
