/* See faults.h. */
#include "faults.h"

#include <string.h>

static bool named(const char *name, const char *symbol)
{
    if (strcmp(name, "*") == 0)
        name = "nvml*"; /* What a CUDA call returns is no code of NVML's. */
    size_t length = strlen(name);
    if (length > 0 && name[length - 1] == '*')
        return strncmp(name, symbol, length - 1) == 0;
    return strcmp(name, symbol) == 0;
}

static bool matches(const struct fault *fault, const char *symbol, struct subject subject)
{
    if (!fault->used || !named(fault->symbol, symbol))
        return false;
    if (fault->times != 0 && fault->seen >= fault->after + fault->times)
        return false;
    return (fault->gpu < 0 || fault->gpu == subject.gpu) &&
           (fault->gpu_instance < 0 || fault->gpu_instance == subject.gpu_instance);
}

struct fault *fault_due(struct node *node, const char *symbol, struct subject subject)
{
    for (uint32_t slot = 0; slot < MAX_FAULTS; slot++)
        if (matches(&node->faults[slot], symbol, subject))
            return &node->faults[slot];
    return NULL;
}

uint32_t suffer(const char *symbol, struct subject subject)
{
    uint32_t result = 0, delay = 0;
    struct fault *fault = fault_due(state_change(), symbol, subject);
    if (fault != NULL && fault->seen++ >= fault->after) {
        result = fault->result;
        delay = fault->delay_ms;
    }
    state_commit();
    state_done();
    take_time((int64_t)delay * 1000000);
    return result;
}
