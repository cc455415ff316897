/* nvidia-smi, as far as NVML cannot do what it does: `-L`, `--gpu-reset`, `--version`.
 *
 * Words and exit codes are those of its manual (RETURN VALUE) and of transcripts: 255 where a GPU is in use, else
 * NVML's code. A fault of the symbol `gpu-reset` makes a reset fail or hang.
 */
#define _GNU_SOURCE
#include "devices.h"
#include "errors.h"
#include "faults.h"
#include "life.h"
#include "nvml_abi.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BAD_USE = 2, NO_DEVICES = 6, IN_USE_EXIT = 255 };

/* --- which GPUs --------------------------------------------------------------------------------------------------- */

struct choice {
    uint32_t count;
    uint32_t gpus[MAX_GPUS];
};

/* The GPU of an index, a UUID or a PCI address; -1: none. */
static int gpu_named(const struct node *node, const char *name)
{
    char *end;
    unsigned domain, bus, slot;
    unsigned long rank = strtoul(name, &end, 10);
    if (name[0] != '\0' && *end == '\0')
        return rank < MAX_GPUS ? seen_gpu(node, (uint32_t)rank) : -1;
    bool address = sscanf(name, "%x:%x:%x", &domain, &bus, &slot) == 3 && domain == 0 && slot == 0;
    for (uint32_t index = 0; index < node->gpu_count; index++) {
        const struct gpu *gpu = &node->gpus[index];
        if (sees_gpu(gpu) && (address ? gpu->bus == bus : strcmp(gpu->uuid, name) == 0))
            return (int)index;
    }
    return -1;
}

/* The GPUs of a comma list, or all (NULL). False: one of them is not there. */
static bool choose(const struct node *node, const char *list, struct choice *chosen)
{
    chosen->count = 0;
    for (uint32_t rank = 0; list == NULL && seen_gpu(node, rank) >= 0; rank++)
        chosen->gpus[chosen->count++] = (uint32_t)seen_gpu(node, rank);
    if (list == NULL)
        return chosen->count > 0;
    char text[1024], *rest = text, *name;
    snprintf(text, sizeof text, "%s", list);
    while ((name = strsep(&rest, ",")) != NULL) {
        int gpu = gpu_named(node, name);
        if (gpu < 0 || chosen->count == MAX_GPUS)
            return false;
        chosen->gpus[chosen->count++] = (uint32_t)gpu;
    }
    return true;
}

static int no_devices(void)
{
    puts("No devices were found");
    return NO_DEVICES;
}

/* --- -L ----------------------------------------------------------------------------------------------------------- */

static void list_mig_devices(const struct gpu *gpu)
{
    struct mig_device found[MAX_COMPUTE_INSTANCES];
    mig_devices(gpu, found);
    for (uint32_t index = 0; index < MAX_COMPUTE_INSTANCES; index++) {
        if (!found[index].there)
            continue;
        const struct gpu_instance *instance = &gpu->instances[found[index].instance];
        const struct compute_instance *compute = &instance->compute[found[index].compute];
        char name[80];
        name_profile(name, sizeof name, &boards[gpu->board].profiles[instance->profile], compute->width);
        printf("  MIG %-12sDevice %2u: (UUID: %s)\n", name, index, compute->uuid);
    }
}

static int list_gpus(const struct node *node)
{
    struct choice all;
    int result = NVML_SUCCESS;
    if (!choose(node, NULL, &all))
        return no_devices();
    for (uint32_t rank = 0; rank < all.count; rank++) {
        const struct gpu *gpu = &node->gpus[all.gpus[rank]];
        if (gpu->lost) {
            printf("Unable to determine the device handle for GPU 0000:%02X:00.0: GPU is lost.  Reboot the system to "
                   "recover this GPU\n", gpu->bus);
            result = NVML_GPU_IS_LOST;
            continue;
        }
        printf("GPU %u: %s (UUID: %s)\n", rank, boards[gpu->board].name, gpu->uuid);
        list_mig_devices(gpu);
    }
    return result;
}

/* --- --gpu-reset -------------------------------------------------------------------------------------------------- */

static int reset_one(uint32_t gpu)
{
    struct subject subject = {(int)gpu, -1};
    bool any = fault_due((struct node *)state_look(), "gpu-reset", subject) != NULL;
    state_done();
    int result = any ? (int)suffer("gpu-reset", subject) : NVML_SUCCESS;
    if (result != NVML_SUCCESS)
        return result;
    struct node *node = state_change();
    result = reset_refusal(node, gpu);
    if (result == NVML_SUCCESS) {
        reset_gpu(node, &node->gpus[gpu]);
        state_commit();
    }
    state_done();
    return result;
}

static void complain(const uint32_t *buses, const int *results, uint32_t count)
{
    uint32_t busy = 0;
    puts("The following GPUs could not be reset:");
    for (uint32_t at = 0; at < count; at++) {
        if (results[at] != NVML_SUCCESS)
            printf("  GPU 00000000:%02X:00.0: %s\n", buses[at], nvml_error(results[at]));
        busy += results[at] == NVML_IN_USE;
    }
    if (busy > 0)
        printf("\n%u device%s currently being used by one or more other processes (e.g., Fabric Manager, CUDA "
               "application, graphics application such as an X server, or a monitoring application such as another "
               "instance of nvidia-smi). Please first kill all processes using %s and all compute applications running "
               "in the system.\n", busy, busy == 1 ? " is" : "s are", busy == 1 ? "this device" : "these devices");
}

static int reset(const char *list)
{
    struct choice chosen;
    uint32_t buses[MAX_GPUS];
    int results[MAX_GPUS], worst = NVML_SUCCESS;
    const struct node *node = state_look();
    bool known = choose(node, list, &chosen);
    for (uint32_t at = 0; known && at < chosen.count; at++)
        buses[at] = node->gpus[chosen.gpus[at]].bus;
    state_done();
    if (!known)
        return no_devices();
    for (uint32_t at = 0; at < chosen.count; at++) {
        results[at] = reset_one(chosen.gpus[at]);
        if (results[at] == NVML_SUCCESS)
            printf("GPU 00000000:%02X:00.0 was successfully reset.\n", buses[at]);
        else if (worst != IN_USE_EXIT)
            worst = results[at] == NVML_IN_USE ? IN_USE_EXIT : results[at] & 0xff;
    }
    if (worst == NVML_SUCCESS)
        puts("All done.");
    else
        complain(buses, results, chosen.count);
    return worst;
}

/* --- the command -------------------------------------------------------------------------------------------------- */

static int versions(const struct node *node)
{
    char nvml[NAME_LENGTH];
    snprintf(nvml, sizeof nvml, "%s", node->driver_version);
    if (strchr(nvml, '.') != NULL && strrchr(nvml, '.') != strchr(nvml, '.'))
        *strrchr(nvml, '.') = '\0';
    printf("NVIDIA-SMI version  : %s\nNVML version        : %s\nDRIVER version      : %s\nCUDA Version        : 12.8\n",
           node->driver_version, nvml, node->driver_version);
    return NVML_SUCCESS;
}

struct command {
    bool list, reset, version;
    const char *gpus;
};

/* The text of an option that begins so and has its value behind "=", or in the next argument. */
static const char *value_of(int count, char **arguments, int *at, const char *shortly, const char *longly)
{
    size_t length = strlen(longly);
    const char *given = arguments[*at];
    if (strncmp(given, longly, length) == 0 && given[length] == '=')
        return given + length + 1;
    if ((strcmp(given, shortly) == 0 || strcmp(given, longly) == 0) && *at + 1 < count)
        return arguments[++*at];
    return NULL;
}

static bool parse(int count, char **arguments, struct command *command)
{
    for (int at = 1; at < count; at++) {
        const char *given = arguments[at], *gpus = value_of(count, arguments, &at, "-i", "--id");
        if (gpus != NULL)
            command->gpus = gpus;
        else if (strcmp(given, "-L") == 0 || strcmp(given, "--list-gpus") == 0)
            command->list = true;
        else if (strcmp(given, "-r") == 0 || strcmp(given, "--gpu-reset") == 0)
            command->reset = true;
        else if (strcmp(given, "--version") == 0)
            command->version = true;
        else
            return false;
    }
    bool one = command->list + command->reset + command->version == 1;
    return one && (command->gpus == NULL || command->reset);
}

int main(int count, char **arguments)
{
    struct command command = {0};
    if (!parse(count, arguments, &command)) {
        puts("This nvidia-smi is part of a simulator: it knows -L, --gpu-reset [-i GPU,…] and --version.");
        return BAD_USE;
    }
    bool loaded = sees_node("nvidiactl") && state_open(getenv("NVSIM_STATE"));
    const struct node *node = loaded ? state_look() : NULL;
    if (!loaded || !node->driver_loaded) {
        puts("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
             "NVIDIA driver is installed and running.\n");
        return NVML_DRIVER_NOT_LOADED;
    }
    int result = command.list ? list_gpus(node) : command.version ? versions(node) : NVML_SUCCESS;
    state_done();
    return command.reset ? reset(command.gpus) : result;
}
