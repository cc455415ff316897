/* Who uses a GPU: the processes that a test said do, and those that hold a CUDA context.
 *
 * The latter are known to live by a record lock that each holds on one byte of a file beside the state: the kernel ends
 * it with the process, whatever that dies of, and says whose it is in the pid namespace of whoever asks.
 */
#ifndef CLIENTS_H
#define CLIENTS_H

#include "state.h"

enum { MAX_USERS = MAX_PROCESSES + MAX_CLIENTS };

struct user {
    uint32_t pid;      /* As the calling process sees it; 0: not at all. */
    uint32_t kind;     /* As of `struct process`. */
    uint32_t gpu_instance, compute_instance;
    uint64_t memory;   /* Bytes. */
};

/* The users of a GPU; how many. Of a node that is looked at or changed. */
uint32_t users_of(const struct node *node, uint32_t gpu, struct user found[MAX_USERS]);
bool gpu_in_use(const struct node *node, uint32_t gpu);
/* Whether an instance has users, or one compute instance of it (NVML_NO_INSTANCE: any). */
bool instance_in_use(const struct node *node, uint32_t gpu, uint32_t instance, uint32_t compute);

/* Whether something keeps a GPU from being reset or changing its mode: users, a client that a test said there is, or,
 * where the node counts them, other processes with NVML initialised (monitoring is a use, says nvidia-smi's manual). */
bool gpu_held(const struct node *node, uint32_t gpu);
/* From now on this process has NVML initialised, or has it no more. */
void watch_node(bool watching);
bool watches_node(void);

/* Whether this process is a client of the node. */
bool client_of_this_process(const struct node *node);
/* Forget the clients that are dead, and give back what they had allocated. */
void bury_clients(struct node *node);
/* Make this process a client, with the lock that shows it: its slot; -1 where there is no room or no file for it. */
int add_client(struct node *node, uint32_t gpu, uint32_t gpu_instance, uint32_t compute_instance);
/* Take the client in the slot and all that it holds from the node. Once that is in force: client_unlock. */
void end_client(struct node *node, uint32_t slot);
void client_unlock(uint32_t slot);

#endif
