/* The state file: mapping, locking, changes that happen as a whole, the clock and what runs on it. */
#define _GNU_SOURCE
#include "state.h"

#include "clients.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
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
    int clients;
    char path[PATH_MAX];
};

enum { CLIENT, CONTROL };

#define NOTHING {.descriptor = -1, .clients = -1}

static struct mapping mappings[2] = {NOTHING, NOTHING};
static __thread int current = CLIENT;
static pthread_mutex_t threads = PTHREAD_MUTEX_INITIALIZER;

static struct node *in_force(const struct mapping *mapping)
{
    return &mapping->file->copies[atomic_load(&mapping->file->active)];
}

/* Locks of open file descriptions: they exclude the threads of one process and the libraries within it, each of which
 * opens the file for itself, and the kernel gives them back when the last who has the description open dies. */
static void file_lock(const struct mapping *mapping, short type)
{
    struct flock whole = {.l_type = type, .l_whence = SEEK_SET};
    while (fcntl(mapping->descriptor, F_OFD_SETLKW, &whole) != 0 && errno == EINTR)
        ;
}

static bool same_file(int one, int other)
{
    struct stat first, second;
    return one >= 0 && other >= 0 && fstat(one, &first) == 0 && fstat(other, &second) == 0 &&
           first.st_ino == second.st_ino && first.st_dev == second.st_dev;
}

/* Whether this process holds locks in the file of clients, all of which end when it closes any descriptor of it. */
static bool locks_in(const struct mapping *mapping)
{
    return client_of_this_process(in_force(mapping)) ||
           (watches_node() && same_file(mapping->clients, mappings[CLIENT].clients));
}

static void unmap(struct mapping *mapping)
{
    if (mapping->file != NULL) {
        file_lock(mapping, F_WRLCK);
        if (mapping->clients >= 0 && !locks_in(mapping))
            close(mapping->clients);
        file_lock(mapping, F_UNLCK);
        munmap(mapping->file, sizeof(struct file));
        close(mapping->descriptor);
    }
    *mapping = (struct mapping)NOTHING;
}

static void beside(char *path, const char *state)
{
    snprintf(path, PATH_MAX, "%s.clients", state);
}

static bool map(struct mapping *mapping, const char *path)
{
    struct stat info;
    char clients[PATH_MAX];
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
    beside(clients, path);
    mapping->file = mapped;
    mapping->descriptor = fd;
    mapping->clients = open(clients, O_RDWR | O_CLOEXEC);
    snprintf(mapping->path, sizeof mapping->path, "%s", path);
    return true;
}

bool state_open(const char *path)
{
    if (path == NULL)
        return false;
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

int state_clients(void)
{
    return mappings[current].clients;
}

static void lock(void)
{
    if (current == CLIENT)
        pthread_mutex_lock(&threads);
    file_lock(&mappings[current], F_WRLCK);
}

/* A child has its parent's descriptors, and with them its locks: it opens the files for itself. */
static void open_again(struct mapping *mapping)
{
    char same[64];
    snprintf(same, sizeof same, "/proc/self/fd/%d", mapping->descriptor);
    int fd = open(same, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        fd = open(mapping->path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    dup3(fd, mapping->descriptor, O_CLOEXEC);
    close(fd);
}

static void in_child(void)
{
    pthread_mutex_init(&threads, NULL); /* A thread that held it does not live on in the child. */
    for (int which = CLIENT; which <= CONTROL; which++)
        if (mappings[which].file != NULL)
            open_again(&mappings[which]);
}

__attribute__((constructor)) static void at_fork(void)
{
    pthread_atfork(NULL, NULL, in_child);
}

const struct node *state_look(void)
{
    lock();
    return in_force(&mappings[current]);
}

struct node *state_change(void)
{
    lock();
    struct file *file = in_use();
    const struct node *now = in_force(&mappings[current]);
    struct node *next = &file->copies[atomic_load(&file->active) ^ 1];
    memcpy(next, now, offsetof(struct node, gpus) + now->gpu_count * sizeof now->gpus[0]);
    return next;
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
    file_lock(&mappings[current], F_UNLCK);
    current = CLIENT;
    pthread_mutex_unlock(&threads);
}

/* Write a file beside `path` and put it there in one step. Anybody may open it: containers run as anybody. */
static bool put(const char *path, const void *content, size_t size)
{
    char fresh[PATH_MAX];
    snprintf(fresh, sizeof fresh, "%s.%d", path, (int)getpid());
    int fd = open(fresh, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0)
        return false;
    bool written = write(fd, content, size) == (ssize_t)size && fchmod(fd, 0666) == 0;
    close(fd);
    written = written && rename(fresh, path) == 0;
    if (!written)
        unlink(fresh);
    return written;
}

bool state_write(const char *path, const struct node *node)
{
    char clients[PATH_MAX];
    beside(clients, path);
    struct file *blank = calloc(1, sizeof *blank);
    if (blank == NULL)
        return false;
    blank->magic = STATE_MAGIC;
    blank->size = sizeof *blank;
    blank->copies[0] = *node;
    bool written = put(clients, "", 0) && put(path, blank, sizeof *blank);
    free(blank);
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

void take_time(int64_t nanoseconds)
{
    struct timespec left = {nanoseconds / 1000000000, nanoseconds % 1000000000};
    while (nanoseconds > 0 && nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
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
