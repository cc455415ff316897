/* Tables of the MIG User Guide (supported profiles), checked against `nvidia-smi mig -lgip`, `-lgipp` of boards. */
#include "boards.h"

#define STARTS(...) {__VA_ARGS__}, sizeof((uint32_t[]){__VA_ARGS__}) / sizeof(uint32_t)

/* number id compute memory MiB SM CE DEC JPG OFA most name starts, preferred */
#define A100_PROFILES(one, one_mib, one_me, wide, wide_mib, two, two_mib, three, three_mib, four, seven, seven_mib) \
    { \
        {0, 19, 1, 1, one_mib, 14, 1, 0, 0, 0, 7, one, STARTS(0, 1, 2, 3, 4, 5, 6), {6, 4, 5, 0, 1, 2, 3}}, \
        {1, 14, 2, 2, two_mib, 28, 2, 1, 0, 0, 3, two, STARTS(0, 2, 4), {4, 0, 2}}, \
        {2, 9, 3, 4, three_mib, 42, 3, 2, 0, 0, 2, three, STARTS(0, 4), {4, 0}}, \
        {3, 5, 4, 4, three_mib, 56, 4, 2, 0, 0, 1, four, STARTS(0), {0}}, \
        {4, 0, 7, 8, seven_mib, 98, 7, 5, 1, 1, 1, seven, STARTS(0), {0}}, \
        {7, 20, 1, 1, one_mib, 14, 1, 1, 1, 1, 1, one_me, STARTS(0, 1, 2, 3, 4, 5, 6), {6, 4, 5, 0, 1, 2, 3}}, \
        {9, 15, 1, 2, wide_mib, 14, 1, 1, 0, 0, 4, wide, STARTS(0, 2, 4, 6), {6, 4, 0, 2}}, \
    }

#define A100_40 \
    A100_PROFILES("1g.5gb", 4864, "1g.5gb+me", "1g.10gb", 9856, "2g.10gb", 9856, "3g.20gb", 19968, "4g.20gb", \
                  "7g.40gb", 40192)
#define A100_80 \
    A100_PROFILES("1g.10gb", 9728, "1g.10gb+me", "1g.20gb", 19968, "2g.20gb", 19968, "3g.40gb", 40192, "4g.40gb", \
                  "7g.80gb", 80640)

#define HOPPER_PROFILES(one, one_mib, one_me, wide, wide_mib, two, three, three_mib, four, seven, seven_mib, all_sm) \
    { \
        {0, 19, 1, 1, one_mib, 16, 1, 1, 1, 0, 7, one, STARTS(0, 1, 2, 3, 4, 5, 6), {6, 4, 5, 0, 1, 2, 3}}, \
        {1, 14, 2, 2, wide_mib, 32, 2, 2, 2, 0, 3, two, STARTS(0, 2, 4), {4, 0, 2}}, \
        {2, 9, 3, 4, three_mib, 60, 3, 3, 3, 0, 2, three, STARTS(0, 4), {4, 0}}, \
        {3, 5, 4, 4, three_mib, 64, 4, 4, 4, 0, 1, four, STARTS(0), {0}}, \
        {4, 0, 7, 8, seven_mib, all_sm, 8, 7, 7, 1, 1, seven, STARTS(0), {0}}, \
        {7, 20, 1, 1, one_mib, 16, 1, 1, 1, 1, 1, one_me, STARTS(0, 1, 2, 3, 4, 5, 6), {6, 4, 5, 0, 1, 2, 3}}, \
        {9, 15, 1, 2, wide_mib, 26, 1, 1, 1, 0, 4, wide, STARTS(0, 2, 4, 6), {6, 4, 0, 2}}, \
    }

#define H100_80 \
    HOPPER_PROFILES("1g.10gb", 9984, "1g.10gb+me", "1g.20gb", 20096, "2g.20gb", "3g.40gb", 40448, "4g.40gb", \
                    "7g.80gb", 81152, 132)
#define H200_141 \
    HOPPER_PROFILES("1g.18gb", 16384, "1g.18gb+me", "1g.35gb", 33024, "2g.35gb", "3g.71gb", 71168, "4g.71gb", \
                    "7g.141gb", 143104, 132)

#define A30_24 \
    { \
        {0, 14, 1, 1, 5952, 14, 1, 1, 0, 0, 4, "1g.6gb", STARTS(0, 1, 2, 3), {2, 3, 0, 1}}, \
        {1, 5, 2, 2, 11968, 28, 2, 2, 0, 0, 2, "2g.12gb", STARTS(0, 2), {2, 0}}, \
        {3, 0, 4, 4, 24000, 56, 4, 4, 1, 1, 1, "4g.24gb", STARTS(0), {0}}, \
        {7, 21, 1, 1, 5952, 14, 1, 1, 1, 1, 1, "1g.6gb+me", STARTS(0, 1, 2, 3), {2, 3, 0, 1}}, \
        {8, 6, 2, 2, 11968, 28, 2, 2, 1, 1, 1, "2g.12gb+me", STARTS(0, 2), {2, 0}}, \
    }

#define A100(board, vbios_, mib, device, subsystem, most, profiles_) \
    {.name = board, .vbios = vbios_, .memory_mib = mib, .compute_slices = 7, .memory_slices = 8, .architecture = 7, \
     .compute_major = 8, .compute_minor = 0, .cores = 6912, .pci_device_id = device, .pci_subsystem_id = subsystem, \
     .idle_mw = 55000, .least_mw = 100000, .most_mw = most, .default_mw = most, \
     .least_mhz = 210, .most_mhz = 1410, .default_mhz = 1095, .memory_mhz = 1215, \
     .slowdown_celsius = 89, .shutdown_celsius = 92, .most_celsius = 85, .most_memory_celsius = 95, \
     .mig_needs_reset = true, .profile_count = 7, .profiles = profiles_}

#define HOPPER(board, vbios_, mib, device, most, profiles_) \
    {.name = board, .vbios = vbios_, .memory_mib = mib, .compute_slices = 7, .memory_slices = 8, .architecture = 9, \
     .compute_major = 9, .compute_minor = 0, .cores = 16896, .pci_device_id = device, .pci_subsystem_id = 0x16c110de, \
     .idle_mw = 70000, .least_mw = 200000, .most_mw = most, .default_mw = most, \
     .least_mhz = 345, .most_mhz = 1980, .default_mhz = 1980, .memory_mhz = 2619, \
     .slowdown_celsius = 92, .shutdown_celsius = 95, .most_celsius = 87, .most_memory_celsius = 95, \
     .mig_needs_reset = false, .profile_count = 7, .profiles = profiles_}

const struct board boards[] = {
    A100("NVIDIA A100-SXM4-40GB", "92.00.19.00.01", 40960, 0x20b010de, 0x134f10de, 400000, A100_40),
    A100("NVIDIA A100-PCIE-40GB", "92.00.25.00.08", 40960, 0x20f110de, 0x145f10de, 250000, A100_40),
    A100("NVIDIA A100-SXM4-80GB", "92.00.45.00.03", 81920, 0x20b210de, 0x147f10de, 400000, A100_80),
    A100("NVIDIA A100 80GB PCIe", "92.00.68.00.01", 81920, 0x20b510de, 0x153310de, 300000, A100_80),
    {.name = "NVIDIA A30", .vbios = "92.00.66.00.02", .memory_mib = 24576, .compute_slices = 4, .memory_slices = 4,
     .architecture = 7,
     .compute_major = 8, .compute_minor = 0, .cores = 3584, .pci_device_id = 0x20b710de, .pci_subsystem_id = 0x153210de,
     .idle_mw = 28000, .least_mw = 100000, .most_mw = 165000, .default_mw = 165000,
     .least_mhz = 210, .most_mhz = 1440, .default_mhz = 930, .memory_mhz = 1215,
     .slowdown_celsius = 89, .shutdown_celsius = 92, .most_celsius = 85, .most_memory_celsius = 95,
     .mig_needs_reset = true, .profile_count = 5, .profiles = A30_24},
    HOPPER("NVIDIA H100 80GB HBM3", "96.00.61.00.01", 81559, 0x233010de, 700000, H100_80),
    HOPPER("NVIDIA H200", "96.00.A5.00.01", 143771, 0x233510de, 700000, H200_141),
};

const uint32_t board_count = sizeof boards / sizeof boards[0];

uint32_t gpu_instance_id(const struct board *board, uint32_t layout, uint32_t memory_slices, uint32_t start)
{
    uint32_t half = board->memory_slices / 2;
    if (memory_slices == board->memory_slices)
        return 0;
    if (layout == 1) /* The upper half comes first. */
        start = (start + half) % board->memory_slices;
    /* Level by level: 1 and 2 are halves, 3 to 6 quarters, 7 to 14 eighths. */
    return board->memory_slices / memory_slices - 1 + start / memory_slices;
}
