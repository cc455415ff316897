/* See memory.h. */
#include "memory.h"

#include <stdlib.h>
#include <string.h>

enum {
    RESERVED_MIB = 450,         /* Of a GPU: what nvidia-smi calls reserved. */
    INSTANCE_RESERVED_MIB = 12, /* Of a GPU instance. */
};

/* --- ranges ------------------------------------------------------------------------------------------------------- */

uint64_t memory_size(const struct board *board)
{
    return (uint64_t)board->memory_mib * MIB;
}

static uint64_t slice_size(const struct board *board)
{
    return memory_size(board) / board->memory_slices / ALLOCATION_UNIT * ALLOCATION_UNIT;
}

struct range slice_range(const struct board *board, uint32_t slice)
{
    uint64_t from = slice * slice_size(board);
    return (struct range){from, slice + 1 == board->memory_slices ? memory_size(board) : from + slice_size(board)};
}

uint64_t memory_total(const struct board *board, const struct gpu_instance *instance)
{
    return instance == NULL ? memory_size(board) : (uint64_t)board->profiles[instance->profile].memory_mib * MIB;
}

struct range reach(const struct board *board, const struct gpu_instance *instance)
{
    uint64_t from = instance == NULL ? 0 : slice_range(board, instance->start).from;
    uint64_t reserved = (uint64_t)(instance == NULL ? RESERVED_MIB : INSTANCE_RESERVED_MIB) * MIB;
    uint64_t size = (memory_total(board, instance) - reserved) / ALLOCATION_UNIT * ALLOCATION_UNIT;
    return (struct range){from, from + size};
}

/* --- what stands there -------------------------------------------------------------------------------------------- */

void randomise(const struct board *board, struct gpu *gpu, uint64_t seed)
{
    gpu->stretch_count = board->memory_slices;
    for (uint32_t slice = 0; slice < board->memory_slices; slice++) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull; /* Knuth's MMIX generator. */
        uint32_t chance = (uint32_t)(seed >> 32);
        gpu->memory[slice] = (struct stretch){slice_range(board, slice).from, chance, WRITTEN_BY_NOBODY};
    }
}

uint32_t stretch_at(const struct board *board, const struct gpu *gpu, uint64_t address, uint64_t *end)
{
    uint32_t at = 0;
    while (at + 1 < gpu->stretch_count && gpu->memory[at + 1].from <= address)
        at++;
    *end = at + 1 < gpu->stretch_count ? gpu->memory[at + 1].from : memory_size(board);
    return at;
}

/* A list that is being made: equal neighbours become one. */
struct draft {
    uint32_t count;
    struct stretch stretches[MAX_STRETCHES + 2];
};

static void append(struct draft *draft, struct stretch next)
{
    struct stretch *last = draft->count ? &draft->stretches[draft->count - 1] : NULL;
    if (last == NULL || last->pattern != next.pattern || last->writer != next.writer)
        draft->stretches[draft->count++] = next;
}

bool memory_write(const struct board *board, struct gpu *gpu, struct range range, uint32_t pattern, uint32_t writer)
{
    if (range.from >= range.to)
        return true;
    struct draft draft = {0};
    uint32_t at = 0;
    for (; at < gpu->stretch_count && gpu->memory[at].from < range.from; at++)
        append(&draft, gpu->memory[at]);
    append(&draft, (struct stretch){range.from, pattern, writer});
    if (range.to < memory_size(board)) {
        uint64_t end;
        struct stretch rest = gpu->memory[stretch_at(board, gpu, range.to, &end)];
        rest.from = range.to;
        append(&draft, rest);
    }
    while (at < gpu->stretch_count && gpu->memory[at].from <= range.to)
        at++;
    for (; at < gpu->stretch_count; at++)
        append(&draft, gpu->memory[at]);
    if (draft.count > MAX_STRETCHES)
        return false;
    memcpy(gpu->memory, draft.stretches, draft.count * sizeof draft.stretches[0]);
    gpu->stretch_count = draft.count;
    return true;
}

void memory_read(const struct gpu *gpu, struct range range, uint8_t *bytes)
{
    uint32_t at = 0;
    for (uint64_t address = range.from; address < range.to;) {
        while (at + 1 < gpu->stretch_count && gpu->memory[at + 1].from <= address)
            at++;
        uint64_t end = at + 1 < gpu->stretch_count && gpu->memory[at + 1].from < range.to ? gpu->memory[at + 1].from
                                                                                         : range.to;
        for (; address < end; address++)
            *bytes++ = (uint8_t)(gpu->memory[at].pattern >> address % 4 * 8);
    }
}

/* --- what is allocated -------------------------------------------------------------------------------------------- */

static int by_address(const void *one, const void *other)
{
    const struct allocation *const *a = one, *const *b = other;
    return (*a)->from < (*b)->from ? -1 : (*a)->from > (*b)->from;
}

/* What is held within the range, ascending; how many. */
static uint32_t held_within(const struct gpu *gpu, struct range within, const struct allocation *held[MAX_ALLOCATIONS])
{
    uint32_t count = 0;
    for (uint32_t slot = 0; slot < MAX_ALLOCATIONS; slot++) {
        const struct allocation *one = &gpu->allocations[slot];
        if (one->client && one->from < within.to && one->to > within.from)
            held[count++] = one;
    }
    qsort(held, count, sizeof held[0], by_address);
    return count;
}

/* Where so many bytes are free: first, or last; `within.to` where they are nowhere. */
static uint64_t place(const struct gpu *gpu, struct range within, uint64_t size, bool last)
{
    const struct allocation *held[MAX_ALLOCATIONS];
    uint32_t count = held_within(gpu, within, held);
    uint64_t begin = within.from, found = within.to;
    for (uint32_t at = 0; at <= count; at++) {
        uint64_t end = at < count ? held[at]->from : within.to;
        if (end >= begin && end - begin >= size && (last || found == within.to))
            found = last ? end - size : begin;
        if (at < count && held[at]->to > begin)
            begin = held[at]->to;
    }
    return found;
}

struct allocation *allocate(struct gpu *gpu, struct range within, uint64_t size, uint32_t client, bool context)
{
    if (size == 0 || size > within.to - within.from)
        return NULL;
    size = (size + ALLOCATION_UNIT - 1) / ALLOCATION_UNIT * ALLOCATION_UNIT;
    uint64_t from = place(gpu, within, size, context);
    for (uint32_t slot = 0; from < within.to && slot < MAX_ALLOCATIONS; slot++)
        if (!gpu->allocations[slot].client) {
            gpu->allocations[slot] = (struct allocation){from, from + size, client, context};
            return &gpu->allocations[slot];
        }
    return NULL;
}

struct allocation *allocation_of(struct gpu *gpu, struct range range, uint32_t client)
{
    for (uint32_t slot = 0; slot < MAX_ALLOCATIONS; slot++) {
        struct allocation *one = &gpu->allocations[slot];
        if (one->client == client && !one->context && one->from <= range.from && range.to <= one->to)
            return one;
    }
    return NULL;
}

uint64_t memory_free(const struct gpu *gpu, struct range within)
{
    uint64_t bytes = within.to - within.from;
    for (uint32_t slot = 0; slot < MAX_ALLOCATIONS; slot++) {
        const struct allocation *one = &gpu->allocations[slot];
        if (one->client && one->from < within.to && one->to > within.from)
            bytes -= one->to - one->from;
    }
    return bytes;
}
