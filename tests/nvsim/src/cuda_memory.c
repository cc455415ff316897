/* CUDA's calls about device memory. A pointer is the place in the GPU's memory plus a base of its device.
 *
 * What is copied to the device is kept as a pattern of 32 bits: its first four bytes, or fewer again and again, stand
 * for all of it.
 */
#include "clients.h"
#include "cuda_call.h"

static const cuda_pointer BASE = 0x700000000000ull;

enum { DEVICE_SHIFT = 40 };

static cuda_pointer pointer_to(const struct cuda_use *use, uint64_t address)
{
    return BASE + ((cuda_pointer)use->device << DEVICE_SHIFT) + address;
}

/* The range of so many bytes at a pointer, all of which the context must have allocated. */
static int locate(const struct cuda_use *use, cuda_pointer pointer, uint64_t bytes, struct range *range)
{
    uint64_t address = pointer - pointer_to(use, 0);
    if (address >> DEVICE_SHIFT || bytes >> DEVICE_SHIFT)
        return CUDA_ERROR_INVALID_VALUE;
    *range = (struct range){address, address + bytes};
    return allocation_of(use->gpu, *range, use->client) == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

/* How long so many bytes take: a GPU instance has its memory slices' share of the bandwidth. 0 MB/s: no time. */
static int64_t takes(const struct cuda_use *use, uint64_t bytes, uint32_t megabytes_s)
{
    uint64_t slices = use->board->memory_slices, own = slices;
    if (use->instance != NULL)
        own = use->board->profiles[use->instance->profile].memory_slices;
    return megabytes_s == 0 ? 0 : (int64_t)((unsigned __int128)bytes * 1000 * slices / own / megabytes_s);
}

/* --- allocation --------------------------------------------------------------------------------------------------- */

CUDA cuMemGetInfo_v2(size_t *unused, size_t *total)
{
    struct cuda_use use;
    int result = cuda_begin_use(__func__, true, &use);
    if (result != CUDA_SUCCESS)
        return result;
    bury_clients(use.node);
    *unused = memory_free(use.gpu, use.reach);
    *total = memory_total(use.board, use.instance);
    return cuda_end_use(&use, CUDA_SUCCESS);
}

CUDA cuMemAlloc_v2(cuda_pointer *pointer, size_t bytes)
{
    struct cuda_use use;
    int result = cuda_begin_use(__func__, true, &use);
    if (result != CUDA_SUCCESS)
        return result;
    bury_clients(use.node);
    const struct allocation *made = allocate(use.gpu, use.reach, bytes, use.client, false);
    if (made != NULL)
        *pointer = pointer_to(&use, made->from);
    result = bytes == 0 ? CUDA_ERROR_INVALID_VALUE : made == NULL ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
    return cuda_end_use(&use, result);
}

CUDA cuMemFree_v2(cuda_pointer pointer)
{
    struct cuda_use use;
    int result = cuda_begin_use(__func__, true, &use);
    if (result != CUDA_SUCCESS)
        return result;
    uint64_t address = pointer - pointer_to(&use, 0);
    struct allocation *held = allocation_of(use.gpu, (struct range){address, address}, use.client);
    if (pointer != 0 && (held == NULL || held->from != address))
        result = CUDA_ERROR_INVALID_VALUE;
    else if (pointer != 0)
        *held = (struct allocation){0};
    return cuda_end_use(&use, result);
}

/* --- contents ----------------------------------------------------------------------------------------------------- */

/* Write a pattern, after the time that it takes: whoever is killed meanwhile has written nothing. */
static int write(const char *symbol, cuda_pointer pointer, uint32_t pattern, uint64_t bytes, bool copied)
{
    struct cuda_use use;
    struct range range;
    int result = cuda_begin_use(symbol, false, &use);
    if (result != CUDA_SUCCESS)
        return result;
    result = locate(&use, pointer, bytes, &range);
    int64_t time = takes(&use, bytes, copied ? use.node->copy_mb_s : use.node->memset_mb_s);
    cuda_end_use(&use, result);
    if (result != CUDA_SUCCESS)
        return result;
    take_time(time);
    result = cuda_resume_use(true, &use);
    if (result != CUDA_SUCCESS)
        return result;
    result = locate(&use, pointer, bytes, &range);
    if (result == CUDA_SUCCESS && !memory_write(use.board, use.gpu, range, pattern, use.pid))
        result = CUDA_ERROR_UNKNOWN;
    return cuda_end_use(&use, result);
}

CUDA cuMemsetD8_v2(cuda_pointer pointer, unsigned char value, size_t count)
{
    return write(__func__, pointer, value * 0x01010101u, count, false);
}

CUDA cuMemsetD32_v2(cuda_pointer pointer, unsigned value, size_t count)
{
    if (pointer % sizeof value != 0 || count >> DEVICE_SHIFT)
        return CUDA_ERROR_INVALID_VALUE;
    return write(__func__, pointer, value, count * sizeof value, false);
}

CUDA cuMemcpyHtoD_v2(cuda_pointer pointer, const void *bytes, size_t count)
{
    uint32_t pattern = 0;
    for (uint32_t at = 0; count > 0 && at < sizeof pattern; at++)
        pattern |= (uint32_t)((const uint8_t *)bytes)[at % count] << (pointer + at) % 4 * 8;
    return write(__func__, pointer, pattern, count, true);
}

CUDA cuMemcpyDtoH_v2(void *bytes, cuda_pointer pointer, size_t count)
{
    struct cuda_use use;
    struct range range;
    int result = cuda_begin_use(__func__, false, &use);
    if (result != CUDA_SUCCESS)
        return result;
    result = locate(&use, pointer, count, &range);
    int64_t time = takes(&use, count, use.node->copy_mb_s);
    struct gpu seen = *use.gpu; /* Copied out without holding up others. */
    cuda_end_use(&use, result);
    if (result == CUDA_SUCCESS) {
        take_time(time);
        memory_read(&seen, range, bytes);
    }
    return result;
}
