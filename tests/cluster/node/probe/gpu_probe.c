/* The one program in the images of real nodes: what a tenant or a miner does with a GPU, as words on its command line.
 *
 *   gpu-probe WORD...      each is done in turn; what it finds goes to standard output, one fact per line
 *
 *   environment      variables GPU_TENANCY_* and NVIDIA_*:                          "GPU_TENANCY_UUID=GPU-..."
 *   devices          what NVML shows it, MIG instances instead of their GPU:        "device GPU-...", "devices 1"
 *   context          a CUDA context on the first device, kept to the end:           "context 81920 MiB"
 *   read             all free memory, as it was found, at 64 places; a line for     "read clean", "read 5a at 0"
 *                    each that is not zero and not like the place before:
 *   write=HEX        fills all of that memory with a byte:                          "wrote 5a to 81000 MiB"
 *   ignore-term      SIGTERM is ignored from here on
 *   sleep[=SECONDS]  does nothing, until it is told to end:                         "sleeping"
 *   exit=STATUS      ends with that status
 *   pause            a pod's sandbox: reaps orphans and does nothing
 *   libraries        what the program loader has loaded so far:                     "library /lib64/libc.so.6"
 *
 * SIGTERM ends it with status 0. It is the first process of its container, where no signal has a default action. NVML
 * and CUDA are loaded when asked for, by the names that every program uses; where they are missing it says
 * "devices none: ..." and "context none: ..." and goes on, for that is a fact as well.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PLACES 64
#define MIB (1024 * 1024)

extern char **environ;

static void *library;
static const char *missing;

static void *function(const char *name)
{
    void *found = dlsym(library, name);
    if (!found && !missing)
        missing = name;
    return found;
}

/* Loads a library and says why not, after `what`. */
static bool load(const char *name, const char *what)
{
    missing = NULL;
    library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
    if (!library)
        printf("%s none: %s\n", what, dlerror());
    return library != NULL;
}

static bool complete(const char *what)
{
    if (missing)
        printf("%s none: the library has no %s\n", what, missing);
    return !missing;
}

/* ------------------------------------------------------------------------------------------------ NVML */

typedef void *Device;

static int (*nvml_init)(void);
static int (*nvml_count)(unsigned int *);
static int (*nvml_device)(unsigned int, Device *);
static int (*nvml_uuid)(Device, char *, unsigned int);
static int (*nvml_mig_mode)(Device, unsigned int *, unsigned int *);
static int (*nvml_mig_count)(Device, unsigned int *);
static int (*nvml_mig_device)(Device, unsigned int, Device *);

static unsigned int print_device(Device device)
{
    char uuid[96];
    if (nvml_uuid(device, uuid, sizeof uuid))
        return 0;
    printf("device %s\n", uuid);
    return 1;
}

static unsigned int print_gpu(Device gpu)
{
    unsigned int mode = 0, pending, count = 0, printed = 0;
    Device instance;

    if (nvml_mig_mode(gpu, &mode, &pending) || !mode)
        return print_device(gpu);
    nvml_mig_count(gpu, &count);
    for (unsigned int index = 0; index < count; index++)
        if (!nvml_mig_device(gpu, index, &instance))
            printed += print_device(instance);
    return printed;
}

static void devices(void)
{
    unsigned int count = 0, printed = 0;
    int error;
    Device gpu;

    if (!load("libnvidia-ml.so.1", "devices"))
        return;
    nvml_init = function("nvmlInit_v2");
    nvml_count = function("nvmlDeviceGetCount_v2");
    nvml_device = function("nvmlDeviceGetHandleByIndex_v2");
    nvml_uuid = function("nvmlDeviceGetUUID");
    nvml_mig_mode = function("nvmlDeviceGetMigMode");
    nvml_mig_count = function("nvmlDeviceGetMaxMigDeviceCount");
    nvml_mig_device = function("nvmlDeviceGetMigDeviceHandleByIndex");
    if (!complete("devices"))
        return;
    if ((error = nvml_init()) || (error = nvml_count(&count))) {
        printf("devices none: NVML error %d\n", error);
        return;
    }
    for (unsigned int index = 0; index < count; index++)
        if (!nvml_device(index, &gpu))
            printed += print_gpu(gpu);
    printf("devices %u\n", printed);
}

/* ------------------------------------------------------------------------------------------------ CUDA */

static int (*cu_init)(unsigned int);
static int (*cu_device)(int *, int);
static int (*cu_retain)(void **, int);
static int (*cu_set_current)(void *);
static int (*cu_memory)(size_t *, size_t *);
static int (*cu_alloc)(uint64_t *, size_t);
static int (*cu_memset)(uint64_t, unsigned char, size_t);
static int (*cu_copy)(void *, uint64_t, size_t);

static uint64_t memory;
static size_t memory_size;

static void context(void)
{
    size_t unused, total;
    void *made;
    int device, error;

    if (!load("libcuda.so.1", "context"))
        return;
    cu_init = function("cuInit");
    cu_device = function("cuDeviceGet");
    cu_retain = function("cuDevicePrimaryCtxRetain");
    cu_set_current = function("cuCtxSetCurrent");
    cu_memory = function("cuMemGetInfo_v2");
    cu_alloc = function("cuMemAlloc_v2");
    cu_memset = function("cuMemsetD8_v2");
    cu_copy = function("cuMemcpyDtoH_v2");
    if (!complete("context"))
        return;
    if ((error = cu_init(0)) || (error = cu_device(&device, 0)) || (error = cu_retain(&made, device)) ||
        (error = cu_set_current(made)) || (error = cu_memory(&unused, &total))) {
        printf("context none: CUDA error %d\n", error);
        return;
    }
    memory_size = unused;
    printf("context %zu MiB\n", total / MIB);
}

/* All that is free, or as much of it as can be had in one piece. */
static bool allocate(const char *what)
{
    int error = memory_size ? 0 : 201; /* CUDA_ERROR_INVALID_CONTEXT */

    while (!memory && memory_size >= MIB && (error = cu_alloc(&memory, memory_size)))
        memory_size -= memory_size / 16 + 1;
    if (!memory)
        printf("%s none: CUDA error %d\n", what, error);
    return memory != 0;
}

static void read_memory(void)
{
    bool clean = true;
    unsigned char before = 0;

    if (!allocate("read"))
        return;
    for (unsigned int place = 0; place < PLACES; place++) {
        size_t offset = (memory_size - 1) / (PLACES - 1) * place;
        unsigned char found = 0;
        int error = cu_copy(&found, memory + offset, 1);
        if (error) {
            printf("read none: CUDA error %d at %zu\n", error, offset);
            return;
        }
        if (found && found != before)
            printf("read %02x at %zu\n", found, offset);
        clean = clean && !found;
        before = found;
    }
    if (clean)
        printf("read clean\n");
}

static void write_memory(const char *text)
{
    unsigned char byte = (unsigned char)strtoul(text, NULL, 16);
    int error;

    if (!allocate("write"))
        return;
    if ((error = cu_memset(memory, byte, memory_size)))
        printf("write none: CUDA error %d\n", error);
    else
        printf("wrote %02x to %zu MiB\n", byte, memory_size / MIB);
}

/* ---------------------------------------------------------------------------------------------- the rest */

static void end(int number)
{
    (void)number;
    _exit(0);
}

static void on_signal(int number, void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler};
    sigaction(number, &action, NULL);
}

static void sleep_for(const char *seconds)
{
    struct timespec rest = {.tv_sec = seconds ? atol(seconds) : INT32_MAX};

    printf("sleeping\n");
    fflush(stdout);
    while (nanosleep(&rest, &rest) && errno == EINTR)
        continue;
}

static void pause_for_ever(void)
{
    struct sigaction no_zombies = {.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDWAIT};
    sigaction(SIGCHLD, &no_zombies, NULL);
    for (;;)
        pause();
}

static void environment(void)
{
    for (char **one = environ; *one; one++)
        if (!strncmp(*one, "GPU_TENANCY_", 12) || !strncmp(*one, "NVIDIA_", 7))
            printf("%s\n", *one);
}

static int print_library(struct dl_phdr_info *info, size_t size, void *unused)
{
    (void)size, (void)unused;
    if (info->dlpi_name[0] == '/')
        printf("library %s\n", info->dlpi_name);
    return 0;
}

/* The word's value where it is `name` or `name=value`; NULL for no value. */
static bool is(const char *word, const char *name, const char **value)
{
    size_t length = strlen(name);

    if (strncmp(word, name, length) || (word[length] && word[length] != '='))
        return false;
    *value = word[length] ? word + length + 1 : NULL;
    return true;
}

static bool obey(const char *word)
{
    const char *value;

    if (is(word, "environment", &value))
        environment();
    else if (is(word, "devices", &value))
        devices();
    else if (is(word, "context", &value))
        context();
    else if (is(word, "read", &value))
        read_memory();
    else if (is(word, "write", &value) && value)
        write_memory(value);
    else if (is(word, "ignore-term", &value))
        on_signal(SIGTERM, SIG_IGN);
    else if (is(word, "sleep", &value))
        sleep_for(value);
    else if (is(word, "exit", &value) && value)
        exit(atoi(value));
    else if (is(word, "pause", &value))
        pause_for_ever();
    else if (is(word, "libraries", &value))
        dl_iterate_phdr(print_library, NULL);
    else
        return false;
    fflush(stdout);
    return true;
}

int main(int count, char **words)
{
    on_signal(SIGTERM, end);
    on_signal(SIGINT, end);
    for (int index = 1; index < count; index++) {
        if (!obey(words[index])) {
            fprintf(stderr, "gpu-probe: unknown word \"%s\"; the words stand at the head of gpu_probe.c\n", words[index]);
            return 2;
        }
    }
    return 0;
}
