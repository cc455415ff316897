/* What every call of the library goes through: is NVML initialised, what is the handle, is a fault due, who may.
 *
 * Handles are tagged numbers and never addresses: a stale or forged one gives INVALID_ARGUMENT, in any process.
 */
#ifndef NVML_CALL_H
#define NVML_CALL_H

#include "devices.h"
#include "nvml_abi.h"

/* An NVML function. */
#define NVML EXPORT int

enum kind { GPU = 1, MIG_DEVICE = 2, GPU_INSTANCE = 4, COMPUTE_INSTANCE = 8 };

/* What a call is about. Of what is only looked at nothing may be written. */
struct target {
    struct node *node;
    const struct board *board;
    struct gpu *gpu;
    uint32_t index;
    enum kind kind;
    struct gpu_instance *instance;    /* Of an instance or a MIG device. */
    struct compute_instance *compute; /* Of a compute instance or a MIG device. */
    bool changes;
};

/* Begin a call about `handle`, which may be of any of `kinds`. On success the node is locked until `done`. */
int look(const char *symbol, nvml_handle handle, unsigned kinds, struct target *target);
/* The same for a call that is refused to the unprivileged. */
int look_privileged(const char *symbol, nvml_handle handle, unsigned kinds, struct target *target);
/* The same for a call that changes the node, which is refused to them too. */
int change(const char *symbol, nvml_handle handle, unsigned kinds, struct target *target);
/* End a call. A change is in force from here on, unless `result` is an error. */
int done(const struct target *target, int result);

/* An NVML function that answers one question about a device of any of `kinds`: `answer`, of the call's `target`. */
#define ANSWER(symbol, kinds, type, answer) \
    NVML symbol(nvml_handle device, type *given) \
    { \
        struct target target; \
        int result = look(__func__, device, kinds, &target); \
        if (result != NVML_SUCCESS) \
            return result; \
        *given = (answer); \
        return done(&target, NVML_SUCCESS); \
    }

/* Begin a call about the node. */
int look_at_node(const char *symbol, const struct node **node);
/* Look again within the same call, which suffers a fault once only. */
int look_again_at_node(const struct node **node);

nvml_handle gpu_handle(const struct node *node, uint32_t index);
nvml_handle instance_handle(const struct target *target, const struct gpu_instance *instance);
nvml_handle compute_handle(const struct target *target, const struct gpu_instance *instance,
                           const struct compute_instance *compute);

const struct profile *profile_of(const struct target *target);

/* Copy text into a caller's buffer, as NVML does: whole, or INSUFFICIENT_SIZE. */
int give_text(char *buffer, uint32_t length, const char *text);

nvml_handle mig_device_handle(uint32_t gpu, const struct mig_device *device);

/* Of this process: whether NVML is initialised, and what MIG devices there were when it was. */
bool initialised(void);
const struct mig_device *enumerated_at_init(uint32_t gpu);

#endif
