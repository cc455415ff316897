/* What every CUDA call goes through: is CUDA initialised, what devices does this process see, which context is current,
 * is a fault due.
 *
 * A process keeps the devices that it saw when it called cuInit: either whole GPUs or one MIG device, as CUDA has it.
 */
#ifndef CUDA_CALL_H
#define CUDA_CALL_H

#include "cuda_abi.h"
#include "devices.h"
#include "memory.h"

/* A CUDA function. */
#define CUDA EXPORT int

enum { CUDA_VERSION = 12080 };

/* A device as CUDA numbers them. */
struct cuda_device {
    uint32_t gpu;
    bool mig;
    struct mig_device slots; /* Of a MIG device. */
    uint32_t gpu_instance, compute_instance; /* Their ids; NVML_NO_INSTANCE of a whole GPU. */
    char uuid[UUID_LENGTH];
    char name[160];
    uint32_t multiprocessors;
};

bool cuda_initialised(void);
/* Begin a call about none of the devices. */
int cuda_begin(const char *symbol);
/* Begin a call about the device of that number. */
int cuda_begin_device(const char *symbol, int number, const struct cuda_device **device);

/* A call within a context, with the node held from begin to end. Of what is only looked at nothing may be written. */
struct cuda_use {
    struct node *node;
    const struct board *board;
    struct gpu *gpu;
    const struct gpu_instance *instance; /* NULL: the whole GPU. */
    struct range reach;
    int device;
    uint32_t client, pid;
    bool changes;
};

/* Begin a call within the thread's current context. */
int cuda_begin_use(const char *symbol, bool changes, struct cuda_use *use);
/* Begin once more within the same call, which suffers a fault once only. */
int cuda_resume_use(bool changes, struct cuda_use *use);
int cuda_end_use(const struct cuda_use *use, int result);

/* Hold the node for a question about a device. */
const struct node *cuda_hold(void);

#endif
