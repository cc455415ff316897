/* The simulated node: everything about it that outlives a call, as it lies in the shared state file.
 *
 * The file holds two copies of the node. A change is made in the copy that is not in force, which is then put in force
 * by one store: whatever process is killed at whatever instruction, every other one sees the node before or after,
 * never between. Processes exclude each other by a lock that the kernel gives back when its holder dies.
 */
#ifndef STATE_H
#define STATE_H

#include <stdbool.h>
#include <stdint.h>

#define STATE_MAGIC 0x6e7673696d303032ull /* "nvsim002" */

enum {
    MAX_GPUS = 16,
    MAX_GPU_INSTANCES = 7,
    MAX_COMPUTE_INSTANCES = 7,
    MAX_PROCESSES = 64,
    MAX_EVENTS = 256,
    MAX_FAULTS = 64,
    MAX_CLIENTS = 256,
    MAX_ALLOCATIONS = 256,
    MAX_STRETCHES = 512,
    MEMORY_SLICES = 8,
    UUID_LENGTH = 48,
    NAME_LENGTH = 64,
};

struct compute_instance {
    uint32_t used;
    uint32_t id;       /* Within its GPU instance. */
    uint32_t width;    /* Compute slices. */
    uint32_t start;    /* First compute slice within the GPU instance. */
    uint32_t serial;   /* Of the node; part of its handles, so that a stale one is known. */
    char uuid[UUID_LENGTH]; /* Of the MIG device that it makes. */
};

struct gpu_instance {
    uint32_t used;
    uint32_t id;
    uint32_t profile;  /* Row of the board's table. */
    uint32_t start;    /* First memory slice. */
    uint32_t serial;
    struct compute_instance compute[MAX_COMPUTE_INSTANCES];
};

struct process {
    uint32_t used;
    uint32_t pid;
    uint32_t kind;     /* 0 compute, 1 graphics, 2 MPS. */
    uint32_t gpu_instance, compute_instance; /* NVML_NO_INSTANCE where it uses the whole GPU. */
    uint64_t memory;   /* Bytes. */
};

/* A CUDA context: who uses a GPU from a process that is there. See clients.h. */
struct client {
    uint32_t used;
    uint32_t serial;   /* Of the node; what its allocations are known by. */
    uint32_t pid;      /* As the process itself knows it. */
    uint32_t gpu;
    uint32_t gpu_instance, compute_instance; /* NVML_NO_INSTANCE where it uses the whole GPU. */
    uint64_t program;  /* With the pid, what tells the process that asks from one of the same pid. */
};

/* Device memory that a client holds. */
struct allocation {
    uint64_t from, to;
    uint32_t client;   /* Its serial; 0: free. */
    uint32_t context;  /* Not asked for: what the context itself takes. */
};

/* Device memory up to where the next stretch begins: a pattern of 32 bits again and again, and who wrote it. */
struct stretch {
    uint64_t from;
    uint32_t pattern;
    uint32_t writer;   /* A pid as its process knows it, or one of `writers`. */
};

enum writers { WRITTEN_BY_NOBODY = 0, WRITTEN_BY_DRIVER = 0xFFFFFFFF };

struct ecc {
    uint64_t corrected, uncorrected;
};

struct gpu {
    uint32_t board;        /* Row of `boards`. */
    uint32_t generation;   /* Of its handles: a new one after a reset or a change of mode. */
    uint32_t minor;
    uint32_t bus;          /* PCI bus. */
    char uuid[UUID_LENGTH];
    char serial[NAME_LENGTH];
    uint32_t layout;       /* Which of its board's two ways to number GPU instances: 0 or 1. */

    uint32_t mig_current, mig_pending;
    uint32_t mig_busy;           /* Some client holds it: a change of mode stays pending. */
    uint32_t mig_reset_required; /* Only a reset makes a change of mode real. */
    uint32_t hidden_indices;     /* Bits of MIG device indices that stay empty. */
    struct gpu_instance instances[MAX_GPU_INSTANCES];
    struct process processes[MAX_PROCESSES];

    uint32_t lost;
    uint32_t reset_refused;
    struct ecc ecc_volatile, ecc_aggregate;
    uint32_t remapped_corrected, remapped_uncorrected, remap_pending, remap_failed;
    uint32_t recovery_action;

    uint32_t power_mw;           /* What it would draw without a limit. */
    uint32_t limit_mw;
    uint64_t energy_uj;          /* Since the driver was loaded, up to `energy_at`. */
    int64_t energy_at;           /* Nanoseconds of the simulator's clock. */
    int32_t celsius, memory_celsius;
    uint32_t utilization, memory_utilization;
    uint32_t locked_min, locked_max, memory_locked_min, memory_locked_max; /* MHz; 0: not locked. */
    uint32_t application_clock;  /* MHz; 0: the board's. */
    uint32_t persistence, compute_mode, draining;
    uint32_t pcie_generation, pcie_width; /* Of a link that has come down; 0: as it should be. */
    uint32_t pcie_replays;

    struct allocation allocations[MAX_ALLOCATIONS];
    uint32_t stretch_count;
    struct stretch memory[MAX_STRETCHES]; /* Ascending, the first from 0; survives everything but a reboot. */
};

/* What a call is made to do instead of, or before, what it does. The first that matches wins. */
struct fault {
    uint32_t used;
    char symbol[NAME_LENGTH]; /* "*": every call of NVML; "cu*": whatever begins so. */
    int32_t gpu, gpu_instance; /* -1: any. */
    uint32_t after;           /* Matching calls that it leaves alone first. */
    uint32_t times;           /* Matching calls that it then spoils; 0: all. */
    uint32_t seen;
    uint32_t result;          /* nvmlReturn_t, or CUresult of a CUDA call; 0: only late. */
    uint32_t delay_ms;
};

struct event {
    uint64_t number;          /* From 1. */
    uint64_t type, data;
    uint32_t gpu, gpu_instance, compute_instance;
};

enum uuid_policy { UUID_NEW = 0, UUID_STABLE = 1 };

struct node {
    char boot_id[UUID_LENGTH];
    char driver_version[NAME_LENGTH];
    uint32_t driver_loaded;
    uint32_t unprivileged;    /* Every caller is. */
    uint32_t owner;           /* Who may change it without CAP_SYS_ADMIN: whoever made it without; or nobody. */
    uint32_t refuse_4g_3g;    /* As drivers before R510 did. */
    uint32_t stale_enumeration; /* A process sees the MIG devices that there were when it called nvmlInit. */
    uint32_t uuid_policy;
    uint32_t nvml_is_use;     /* A process that has NVML initialised uses every GPU, as far as resets and modes go. */
    uint32_t gpu_count;
    uint32_t serial;          /* Of the last instance or client made. */
    uint64_t events_told;     /* Number of the last event. */

    uint32_t clock_manual;
    double clock_scale;
    int64_t clock_base, clock_real; /* Simulated nanoseconds, and those of CLOCK_MONOTONIC they belong to. */

    uint32_t create_gpu_instance_ms, create_compute_instance_ms, destroy_gpu_instance_ms, destroy_compute_instance_ms;
    uint32_t create_context_ms;
    uint32_t memset_mb_s, copy_mb_s; /* 10^6 bytes a second of a whole GPU; 0: at once. */

    struct event events[MAX_EVENTS];
    struct fault faults[MAX_FAULTS];
    struct client clients[MAX_CLIENTS];
    struct gpu gpus[MAX_GPUS]; /* Last: of a change only those that there are get copied. */
};

/* Map the node whose driver this process talks to. False: there is no file, or it is no state of this version. */
bool state_open(const char *path);
void state_close(void);
/* Turn to the node at `path` until state_done, in this thread. False: there is no such. */
bool state_control(const char *path);

/* Look at the node. The pointer holds until state_done. */
const struct node *state_look(void);
/* Change the node: a copy, in force after state_commit, forgotten after state_done. */
struct node *state_change(void);
void state_commit(void);
void state_done(void);

/* Descriptor of the file beside the state in which each client holds a lock on the byte of its slot; -1: there is none.
 * It is closed only where this process holds no lock in it, because that would end them. */
int state_clients(void);

/* Make a new state file for `node`; replaces one that is there in one step. */
bool state_write(const char *path, const struct node *node);

/* Sleep until an event is told after the one numbered `last`, or so long. */
void state_await_event(uint64_t last, int64_t nanoseconds);

int64_t clock_monotonic(void);
/* Let so much real time pass. The node must not be held. */
void take_time(int64_t nanoseconds);
/* The simulator's time in nanoseconds. */
int64_t clock_now(const struct node *node);

/* Bring a GPU's energy up to now; called before anything changes its power. */
void meter(const struct node *node, struct gpu *gpu);
uint64_t energy_uj(const struct node *node, const struct gpu *gpu);
uint32_t drawn_mw(const struct gpu *gpu);

void tell(struct node *node, uint64_t type, uint64_t data, uint32_t gpu, uint32_t gpu_instance,
          uint32_t compute_instance);

#endif
