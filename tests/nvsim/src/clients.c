/* See clients.h. */
#define _GNU_SOURCE
#include "clients.h"

#include "nvml_abi.h"

#include <fcntl.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>

/* What the kernel drew for this program when it was started: the same for every library in the process, another one for
 * whatever else has had its pid. */
static uint64_t this_program(void)
{
    const char *drawn = (const char *)getauxval(AT_RANDOM);
    uint64_t program = 0;
    if (drawn != NULL)
        memcpy(&program, drawn + 8, sizeof program);
    return program * 0x9e3779b97f4a7c15ull + 1;
}

enum { WATCHERS = 1 << 20 }; /* The byte that every process with NVML initialised has a shared lock on. */

static bool watches;

static struct flock byte_of(uint32_t slot, short type)
{
    return (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)slot, .l_len = 1};
}

static bool is_this_process(const struct client *client)
{
    return client->used && client->pid == (uint32_t)getpid() && client->program == this_program();
}

/* Whether the client in the slot lives, and what its pid is here. A process is not told of its own locks. */
static bool alive(const struct node *node, uint32_t slot, uint32_t *pid)
{
    const struct client *client = &node->clients[slot];
    struct flock held = byte_of(slot, F_WRLCK);
    if (!client->used || state_clients() < 0 || fcntl(state_clients(), F_GETLK, &held) != 0)
        return false;
    if (held.l_type == F_UNLCK) {
        *pid = (uint32_t)getpid();
        return is_this_process(client);
    }
    *pid = held.l_pid > 0 ? (uint32_t)held.l_pid : 0;
    return true;
}

static uint64_t held_by(const struct gpu *gpu, uint32_t client)
{
    uint64_t bytes = 0;
    for (uint32_t slot = 0; slot < MAX_ALLOCATIONS; slot++)
        if (gpu->allocations[slot].client == client)
            bytes += gpu->allocations[slot].to - gpu->allocations[slot].from;
    return bytes;
}

uint32_t users_of(const struct node *node, uint32_t gpu, struct user found[MAX_USERS])
{
    uint32_t count = 0, pid;
    for (uint32_t slot = 0; slot < MAX_PROCESSES; slot++) {
        const struct process *one = &node->gpus[gpu].processes[slot];
        if (one->used)
            found[count++] = (struct user){one->pid, one->kind, one->gpu_instance, one->compute_instance, one->memory};
    }
    for (uint32_t slot = 0; slot < MAX_CLIENTS; slot++) {
        const struct client *one = &node->clients[slot];
        if (one->used && one->gpu == gpu && alive(node, slot, &pid))
            found[count++] = (struct user){pid, 0, one->gpu_instance, one->compute_instance,
                                           held_by(&node->gpus[gpu], one->serial)};
    }
    return count;
}

bool gpu_in_use(const struct node *node, uint32_t gpu)
{
    struct user found[MAX_USERS];
    return users_of(node, gpu, found) > 0;
}

bool instance_in_use(const struct node *node, uint32_t gpu, uint32_t instance, uint32_t compute)
{
    struct user found[MAX_USERS];
    uint32_t count = users_of(node, gpu, found);
    for (uint32_t at = 0; at < count; at++)
        if (found[at].gpu_instance == instance &&
            (compute == NVML_NO_INSTANCE || found[at].compute_instance == compute))
            return true;
    return false;
}

static bool watched(void)
{
    struct flock held = byte_of(WATCHERS, F_WRLCK);
    return fcntl(state_clients(), F_GETLK, &held) == 0 && held.l_type != F_UNLCK;
}

bool gpu_held(const struct node *node, uint32_t gpu)
{
    return gpu_in_use(node, gpu) || node->gpus[gpu].mig_busy || (node->nvml_is_use && watched());
}

void watch_node(bool watching)
{
    struct flock byte = byte_of(WATCHERS, watching ? F_RDLCK : F_UNLCK);
    fcntl(state_clients(), F_SETLK, &byte);
    watches = watching;
}

bool watches_node(void)
{
    return watches;
}

bool client_of_this_process(const struct node *node)
{
    for (uint32_t slot = 0; slot < MAX_CLIENTS; slot++)
        if (is_this_process(&node->clients[slot]))
            return true;
    return false;
}

void bury_clients(struct node *node)
{
    uint32_t pid;
    for (uint32_t slot = 0; state_clients() >= 0 && slot < MAX_CLIENTS; slot++)
        if (node->clients[slot].used && !alive(node, slot, &pid))
            end_client(node, slot);
}

int add_client(struct node *node, uint32_t gpu, uint32_t gpu_instance, uint32_t compute_instance)
{
    for (uint32_t slot = 0; slot < MAX_CLIENTS; slot++) {
        struct flock wanted = byte_of(slot, F_WRLCK);
        if (node->clients[slot].used || fcntl(state_clients(), F_SETLK, &wanted) != 0)
            continue;
        node->clients[slot] = (struct client){
            .used = 1, .serial = ++node->serial, .pid = (uint32_t)getpid(), .program = this_program(), .gpu = gpu,
            .gpu_instance = gpu_instance, .compute_instance = compute_instance,
        };
        return (int)slot;
    }
    return -1;
}

void end_client(struct node *node, uint32_t slot)
{
    struct client *client = &node->clients[slot];
    struct allocation *held = node->gpus[client->gpu].allocations;
    for (uint32_t at = 0; at < MAX_ALLOCATIONS; at++)
        if (held[at].client == client->serial)
            held[at] = (struct allocation){0};
    *client = (struct client){0};
}

void client_unlock(uint32_t slot)
{
    struct flock byte = byte_of(slot, F_UNLCK);
    fcntl(state_clients(), F_SETLK, &byte);
}
