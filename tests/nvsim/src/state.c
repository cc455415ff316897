/* The state file: mapping, locking, changes that happen as a whole, the clock and what runs on it. */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct file {
    uint64_t magic;
    uint64_t size;
    _Atomic uint32_t active; /* Which copy is in force. */
    _Atomic uint32_t bell;   /* Rung whenever an event is told: what waiters sleep on. */
    struct node copies[2];
};

/* A process may look at two nodes: the one whose driver it talks to, and the one that it controls. */
struct mapping {
    struct file *file;
    int descriptor;
    char path[PATH_MAX];
};

enum { CLIENT, CONTROL };

static struct mapping mappings[2] = {{.descriptor = -1}, {.descriptor = -1}};
static __thread int current = CLIENT;
static pthread_mutex_t threads = PTHREAD_MUTEX_INITIALIZER;

static void unmap(struct mapping *mapping)
{
    if (mapping->file != NULL) {
        munmap(mapping->file, sizeof(struct file));
        close(mapping->descriptor);
    }
    *mapping = (struct mapping){.descriptor = -1};
}

static bool map(struct mapping *mapping, const char *path)
{
    struct stat info;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return false;
    struct file *mapped = MAP_FAILED;
    if (fstat(fd, &info) == 0 && (size_t)info.st_size == sizeof(struct file))
        mapped = mmap(NULL, sizeof(struct file), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped != MAP_FAILED && (mapped->magic != STATE_MAGIC || mapped->size != sizeof(struct file))) {
        munmap(mapped, sizeof(struct file));
        mapped = MAP_FAILED;
    }
    if (mapped == MAP_FAILED) {
        close(fd);
        return false;
    }
    unmap(mapping);
    mapping->file = mapped;
    mapping->descriptor = fd;
    snprintf(mapping->path, sizeof mapping->path, "%s", path);
    return true;
}

bool state_open(const char *path)
{
    if (path == NULL)
        return false;
    /* Closing any descriptor of a file ends a process' locks on it: not while a thread holds one. */
    pthread_mutex_lock(&threads);
    bool opened = map(&mappings[CLIENT], path);
    pthread_mutex_unlock(&threads);
    return opened;
}

void state_close(void)
{
    pthread_mutex_lock(&threads);
    unmap(&mappings[CLIENT]);
    pthread_mutex_unlock(&threads);
}

/* Whether the file mapped is still the one at that path. */
static bool is_at(const struct mapping *mapping, const char *path)
{
    struct stat there, held;
    return mapping->file != NULL && strcmp(mapping->path, path) == 0 && stat(path, &there) == 0 &&
           fstat(mapping->descriptor, &held) == 0 && there.st_ino == held.st_ino && there.st_dev == held.st_dev;
}

bool state_control(const char *path)
{
    /* Kept until state_done: another thread must not turn to another node meanwhile. */
    pthread_mutex_lock(&threads);
    if (!is_at(&mappings[CONTROL], path) && !map(&mappings[CONTROL], path)) {
        pthread_mutex_unlock(&threads);
        return false;
    }
    current = CONTROL;
    return true;
}

static struct file *in_use(void)
{
    return mappings[current].file;
}

/* Record locks are a process' own: a child does not inherit them, and the kernel gives them back when it dies. They do not
 * exclude its threads, so those have a mutex. */
static void lock(void)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (current == CLIENT)
        pthread_mutex_lock(&threads);
    while (fcntl(mappings[current].descriptor, F_SETLKW, &whole) != 0 && errno == EINTR)
        ;
}

static void fresh_mutex(void)
{
    pthread_mutex_init(&threads, NULL);
}

__attribute__((constructor)) static void at_fork(void)
{
    pthread_atfork(NULL, NULL, fresh_mutex); /* A thread that held it does not live on in the child. */
}

const struct node *state_look(void)
{
    lock();
    struct file *file = in_use();
    return &file->copies[atomic_load(&file->active)];
}

struct node *state_change(void)
{
    lock();
    struct file *file = in_use();
    uint32_t active = atomic_load(&file->active);
    memcpy(&file->copies[active ^ 1], &file->copies[active], sizeof(struct node));
    return &file->copies[active ^ 1];
}

void state_commit(void)
{
    struct file *file = in_use();
    uint32_t active = atomic_load(&file->active);
    bool told = file->copies[active].events_told != file->copies[active ^ 1].events_told;
    atomic_store(&file->active, active ^ 1);
    if (told) {
        atomic_fetch_add(&file->bell, 1);
        syscall(SYS_futex, &file->bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

void state_done(void)
{
    struct flock whole = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
    fcntl(mappings[current].descriptor, F_SETLK, &whole);
    current = CLIENT;
    pthread_mutex_unlock(&threads);
}

bool state_write(const char *path, const struct node *node)
{
    char fresh[PATH_MAX];
    snprintf(fresh, sizeof fresh, "%s.%d", path, (int)getpid());
    int fd = open(fresh, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return false;
    struct file *blank = calloc(1, sizeof *blank);
    bool written = false;
    if (blank != NULL) {
        blank->magic = STATE_MAGIC;
        blank->size = sizeof *blank;
        blank->copies[0] = *node;
        written = write(fd, blank, sizeof *blank) == (ssize_t)sizeof *blank;
        free(blank);
    }
    fchmod(fd, 0666); /* Containers run as anybody. */
    close(fd);
    written = written && rename(fresh, path) == 0;
    if (!written)
        unlink(fresh);
    return written;
}

void state_await_event(uint64_t last, int64_t nanoseconds)
{
    struct file *file = in_use();
    uint32_t bell = atomic_load(&file->bell);
    const struct node *node = state_look();
    bool told = node->events_told != last;
    state_done();
    if (told)
        return;
    struct timespec most = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    syscall(SYS_futex, &file->bell, FUTEX_WAIT, bell, &most, NULL, 0);
}

/* --- time and what runs on it ---------------------------------------------------------------------------------- */

int64_t clock_monotonic(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t clock_now(const struct node *node)
{
    if (node->clock_manual)
        return node->clock_base;
    return node->clock_base + (int64_t)((double)(clock_monotonic() - node->clock_real) * node->clock_scale);
}

uint32_t drawn_mw(const struct gpu *gpu)
{
    return gpu->power_mw < gpu->limit_mw ? gpu->power_mw : gpu->limit_mw;
}

uint64_t energy_uj(const struct node *node, const struct gpu *gpu)
{
    /* mW × ns = pJ. */
    unsigned __int128 picojoules = (unsigned __int128)drawn_mw(gpu) * (uint64_t)(clock_now(node) - gpu->energy_at);
    return gpu->energy_uj + (uint64_t)(picojoules / 1000000);
}

void meter(const struct node *node, struct gpu *gpu)
{
    gpu->energy_uj = energy_uj(node, gpu);
    gpu->energy_at = clock_now(node);
}

void tell(struct node *node, uint64_t type, uint64_t data, uint32_t gpu, uint32_t gpu_instance,
          uint32_t compute_instance)
{
    node->events_told++;
    node->events[node->events_told % MAX_EVENTS] =
        (struct event){node->events_told, type, data, gpu, gpu_instance, compute_instance};
}
