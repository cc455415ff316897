/* What stands in a GPU's memory and who wrote it, to the byte, and which of it is allocated.
 *
 * The worst that a driver may do: it clears nothing. What a process, an instance or a reset leaves stays there for
 * whoever is given the same range next, until somebody writes over it or the node boots. A context's own range is the
 * driver's, which writes all of it when it makes the context.
 */
#ifndef MEMORY_H
#define MEMORY_H

#include "boards.h"
#include "state.h"

enum { MIB = 1 << 20, ALLOCATION_UNIT = 2 * MIB };

struct range {
    uint64_t from, to;
};

uint64_t memory_size(const struct board *board);
/* A memory slice of a GPU; the last one has what does not divide. */
struct range slice_range(const struct board *board, uint32_t slice);
/* What the clients of a GPU instance, or of a whole GPU (NULL), can be given. */
struct range reach(const struct board *board, const struct gpu_instance *instance);
/* What NVML and CUDA call its memory: `reach`, and what the driver keeps of it. */
uint64_t memory_total(const struct board *board, const struct gpu_instance *instance);

/* Fill all of a GPU's memory with what it happens to hold after power-up. */
void randomise(const struct board *board, struct gpu *gpu, uint64_t seed);
/* False, with nothing written, where the GPU's list of stretches has no room. `pattern` is as it stands at addresses
 * that are multiples of 4. */
bool memory_write(const struct board *board, struct gpu *gpu, struct range range, uint32_t pattern, uint32_t writer);
void memory_read(const struct gpu *gpu, struct range range, uint8_t *bytes);
/* The stretch that holds an address: its number, and where it ends. */
uint32_t stretch_at(const struct board *board, const struct gpu *gpu, uint64_t address, uint64_t *end);

/* Hold the first free `size` bytes within the range, or the last for a context. NULL: there are none, or no room for
 * the note. */
struct allocation *allocate(struct gpu *gpu, struct range within, uint64_t size, uint32_t client, bool context);
/* The client's allocation that holds all of the range; NULL: none does. */
struct allocation *allocation_of(struct gpu *gpu, struct range range, uint32_t client);
/* Bytes of the range that nobody holds. */
uint64_t memory_free(const struct gpu *gpu, struct range within);

#endif
