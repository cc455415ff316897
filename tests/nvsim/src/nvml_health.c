/* NVML's calls about how a GPU is and how it is driven: errors, power, energy, temperature, clocks, modes. */
#include "nvml_call.h"
#include "clients.h"
#include "life.h"

#include <string.h>

/* --- errors ------------------------------------------------------------------------------------------------------ */

NVML nvmlDeviceGetEccMode(nvml_handle device, uint32_t *current, uint32_t *pending)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    *current = *pending = 1;
    return done(&target, NVML_SUCCESS);
}

static int ecc(const char *symbol, nvml_handle device, uint32_t type, uint32_t counter, uint64_t *count)
{
    struct target target;
    int result = look(symbol, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (type > 1 || counter > 1)
        return done(&target, NVML_INVALID_ARGUMENT);
    const struct ecc *found = counter == 0 ? &target.gpu->ecc_volatile : &target.gpu->ecc_aggregate;
    *count = type == 0 ? found->corrected : found->uncorrected;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetTotalEccErrors(nvml_handle device, uint32_t type, uint32_t counter, uint64_t *count)
{
    return ecc(__func__, device, type, counter, count);
}

NVML nvmlDeviceGetMemoryErrorCounter(nvml_handle device, uint32_t type, uint32_t counter, uint32_t location,
                                     uint64_t *count)
{
    int result = ecc(__func__, device, type, counter, count);
    if (result == NVML_SUCCESS && location != 2) /* All of them are in device memory. */
        *count = 0;
    return result;
}

NVML nvmlDeviceGetSramEccErrorStatus(nvml_handle device, struct nvml_sram_ecc *status)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (!privileged(target.node))
        return done(&target, NVML_NO_PERMISSION);
    if (status->version != NVML_VERSION(struct nvml_sram_ecc, 1))
        return done(&target, NVML_ARGUMENT_VERSION_MISMATCH);
    *status = (struct nvml_sram_ecc){.version = status->version};
    return done(&target, NVML_SUCCESS);
}

static bool has_instances(const struct gpu *gpu)
{
    for (uint32_t slot = 0; slot < MAX_GPU_INSTANCES; slot++)
        if (gpu->instances[slot].used)
            return true;
    return false;
}

NVML nvmlDeviceGetRemappedRows(nvml_handle device, uint32_t *corrected, uint32_t *uncorrected, uint32_t *pending,
                               uint32_t *failed)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (has_instances(target.gpu))
        return done(&target, NVML_NOT_SUPPORTED);
    *corrected = target.gpu->remapped_corrected;
    *uncorrected = target.gpu->remapped_uncorrected;
    *pending = target.gpu->remap_pending;
    *failed = target.gpu->remap_failed;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetRowRemapperHistogram(nvml_handle device, struct nvml_remap_histogram *histogram)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (has_instances(target.gpu))
        return done(&target, NVML_NOT_SUPPORTED);
    uint32_t remapped = target.gpu->remapped_corrected + target.gpu->remapped_uncorrected;
    *histogram = (struct nvml_remap_histogram){.max = 640 - remapped, .high = remapped};
    return done(&target, NVML_SUCCESS);
}

/* These GPUs remap rows; they retire no pages. */
static int no_retired_pages(const char *symbol, nvml_handle device)
{
    struct target target;
    int result = look(symbol, device, GPU, &target);
    return result == NVML_SUCCESS ? done(&target, NVML_NOT_SUPPORTED) : result;
}

NVML nvmlDeviceGetRetiredPages(nvml_handle device, uint32_t cause, uint32_t *count, uint64_t *addresses)
{
    (void)cause, (void)count, (void)addresses;
    return no_retired_pages(__func__, device);
}

NVML nvmlDeviceGetRetiredPages_v2(nvml_handle device, uint32_t cause, uint32_t *count, uint64_t *addresses,
                                  uint64_t *times)
{
    (void)cause, (void)count, (void)addresses, (void)times;
    return no_retired_pages(__func__, device);
}

NVML nvmlDeviceGetRetiredPagesPendingStatus(nvml_handle device, uint32_t *pending)
{
    (void)pending;
    return no_retired_pages(__func__, device);
}

/* --- power, energy, temperature ---------------------------------------------------------------------------------- */

ANSWER(nvmlDeviceGetPowerUsage, GPU, uint32_t, drawn_mw(target.gpu))

ANSWER(nvmlDeviceGetTotalEnergyConsumption, GPU, uint64_t, energy_uj(target.node, target.gpu) / 1000)

ANSWER(nvmlDeviceGetPowerManagementLimit, GPU, uint32_t, target.gpu->limit_mw)

ANSWER(nvmlDeviceGetEnforcedPowerLimit, GPU, uint32_t, target.gpu->limit_mw)

ANSWER(nvmlDeviceGetPowerManagementDefaultLimit, GPU, uint32_t, target.board->default_mw)

NVML nvmlDeviceGetPowerManagementLimitConstraints(nvml_handle device, uint32_t *least, uint32_t *most)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    *least = target.board->least_mw;
    *most = target.board->most_mw;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceSetPowerManagementLimit(nvml_handle device, uint32_t milliwatts)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (milliwatts < target.board->least_mw || milliwatts > target.board->most_mw)
        return done(&target, NVML_INVALID_ARGUMENT);
    meter(target.node, target.gpu);
    target.gpu->limit_mw = milliwatts;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetTemperature(nvml_handle device, uint32_t sensor, uint32_t *celsius)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (sensor != 0)
        return done(&target, NVML_INVALID_ARGUMENT);
    *celsius = (uint32_t)target.gpu->celsius;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetTemperatureV(nvml_handle device, struct nvml_temperature *temperature)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (temperature->version != NVML_VERSION(struct nvml_temperature, 1))
        return done(&target, NVML_ARGUMENT_VERSION_MISMATCH);
    if (temperature->sensor != 0)
        return done(&target, NVML_INVALID_ARGUMENT);
    temperature->celsius = target.gpu->celsius;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetTemperatureThreshold(nvml_handle device, uint32_t threshold, uint32_t *celsius)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    const uint32_t thresholds[] = {target.board->shutdown_celsius, target.board->slowdown_celsius,
                                   target.board->most_memory_celsius, target.board->most_celsius};
    if (threshold >= sizeof thresholds / sizeof thresholds[0])
        return done(&target, NVML_NOT_SUPPORTED);
    *celsius = thresholds[threshold];
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetUtilizationRates(nvml_handle device, struct nvml_utilization *rates)
{
    struct target target;
    int result = look(__func__, device, GPU | MIG_DEVICE, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (target.gpu->mig_current)
        return done(&target, NVML_NOT_SUPPORTED);
    *rates = (struct nvml_utilization){target.gpu->utilization, target.gpu->memory_utilization};
    return done(&target, NVML_SUCCESS);
}

/* --- clocks and modes -------------------------------------------------------------------------------------------- */

enum { CLOCK_GRAPHICS, CLOCK_SM, CLOCK_MEMORY, CLOCK_VIDEO };

NVML nvmlDeviceGetClockInfo(nvml_handle device, uint32_t clock, uint32_t *mhz)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (clock > CLOCK_VIDEO)
        return done(&target, NVML_INVALID_ARGUMENT);
    uint32_t locked = clock == CLOCK_MEMORY ? target.gpu->memory_locked_max : target.gpu->locked_max;
    uint32_t free_running = clock == CLOCK_MEMORY ? target.board->memory_mhz : target.board->least_mhz;
    if (clock != CLOCK_MEMORY && drawn_mw(target.gpu) > target.board->idle_mw)
        free_running = target.board->most_mhz;
    *mhz = locked ? locked : free_running;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetMaxClockInfo(nvml_handle device, uint32_t clock, uint32_t *mhz)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (clock > CLOCK_VIDEO)
        return done(&target, NVML_INVALID_ARGUMENT);
    *mhz = clock == CLOCK_MEMORY ? target.board->memory_mhz : target.board->most_mhz;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceSetGpuLockedClocks(nvml_handle device, uint32_t least, uint32_t most)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (least > most || least < target.board->least_mhz || most > target.board->most_mhz)
        return done(&target, NVML_INVALID_ARGUMENT);
    target.gpu->locked_min = least;
    target.gpu->locked_max = most;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceResetGpuLockedClocks(nvml_handle device)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    target.gpu->locked_min = target.gpu->locked_max = 0;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceSetMemoryLockedClocks(nvml_handle device, uint32_t least, uint32_t most)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (least > most || most > target.board->memory_mhz)
        return done(&target, NVML_INVALID_ARGUMENT);
    target.gpu->memory_locked_min = least;
    target.gpu->memory_locked_max = most;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceResetMemoryLockedClocks(nvml_handle device)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    target.gpu->memory_locked_min = target.gpu->memory_locked_max = 0;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetApplicationsClock(nvml_handle device, uint32_t clock, uint32_t *mhz)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    uint32_t graphics = target.gpu->application_clock ? target.gpu->application_clock : target.board->default_mhz;
    *mhz = clock == CLOCK_MEMORY ? target.board->memory_mhz : graphics;
    return done(&target, clock > CLOCK_VIDEO ? NVML_INVALID_ARGUMENT : NVML_SUCCESS);
}

NVML nvmlDeviceGetDefaultApplicationsClock(nvml_handle device, uint32_t clock, uint32_t *mhz)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    *mhz = clock == CLOCK_MEMORY ? target.board->memory_mhz : target.board->default_mhz;
    return done(&target, clock > CLOCK_VIDEO ? NVML_INVALID_ARGUMENT : NVML_SUCCESS);
}

NVML nvmlDeviceSetApplicationsClocks(nvml_handle device, uint32_t memory, uint32_t graphics)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    if (memory != target.board->memory_mhz || graphics < target.board->least_mhz || graphics > target.board->most_mhz)
        return done(&target, NVML_INVALID_ARGUMENT);
    target.gpu->application_clock = graphics;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceResetApplicationsClocks(nvml_handle device)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    target.gpu->application_clock = 0;
    return done(&target, NVML_SUCCESS);
}

enum { REASON_IDLE = 0x1, REASON_POWER_CAP = 0x4 };

static int reasons(const char *symbol, nvml_handle device, uint64_t *bits)
{
    struct target target;
    int result = look(symbol, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    *bits = target.gpu->power_mw > target.gpu->limit_mw ? REASON_POWER_CAP : 0;
    if (target.gpu->power_mw <= target.board->idle_mw)
        *bits |= REASON_IDLE;
    return done(&target, NVML_SUCCESS);
}

NVML nvmlDeviceGetCurrentClocksEventReasons(nvml_handle device, uint64_t *bits)
{
    return reasons(__func__, device, bits);
}

NVML nvmlDeviceGetCurrentClocksThrottleReasons(nvml_handle device, uint64_t *bits)
{
    return reasons(__func__, device, bits);
}

ANSWER(nvmlDeviceGetPerformanceState, GPU, uint32_t, 0) /* An A100 has no other. */

ANSWER(nvmlDeviceGetPersistenceMode, GPU, uint32_t, target.gpu->persistence)

NVML nvmlDeviceSetPersistenceMode(nvml_handle device, uint32_t mode)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    target.gpu->persistence = mode;
    return done(&target, mode > 1 ? NVML_INVALID_ARGUMENT : NVML_SUCCESS);
}

ANSWER(nvmlDeviceGetComputeMode, GPU, uint32_t, target.gpu->compute_mode)

NVML nvmlDeviceSetComputeMode(nvml_handle device, uint32_t mode)
{
    struct target target;
    int result = change(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    target.gpu->compute_mode = mode;
    return done(&target, mode > 3 ? NVML_INVALID_ARGUMENT : NVML_SUCCESS);
}

/* --- field values ------------------------------------------------------------------------------------------------ */

enum {
    FIELD_MEMORY_TEMPERATURE = 82,
    FIELD_ENERGY = 83,
    FIELD_REMAPPED_CORRECTED = 142,
    FIELD_REMAPPED_UNCORRECTED = 143,
    FIELD_REMAP_PENDING = 144,
    FIELD_REMAP_FAILED = 145,
    FIELD_RESETLESS_MIG = 184,
    FIELD_POWER_AVERAGE = 185,
    FIELD_POWER_INSTANT = 186,
    FIELD_MIG_INDEPENDENT_QUERY = 199,
    FIELD_RECOVERY_ACTION = 230,
};

static void fill(const struct target *target, struct nvml_field *field)
{
    const struct gpu *gpu = target->gpu;
    bool remap = field->id >= FIELD_REMAPPED_CORRECTED && field->id <= FIELD_REMAP_FAILED;
    field->value_type = NVML_VALUE_UINT;
    field->status = remap && has_instances(gpu) ? NVML_NOT_SUPPORTED : NVML_SUCCESS;
    field->value.u64 = 0;
    switch (field->id) {
    case FIELD_MEMORY_TEMPERATURE: field->value.u32 = (uint32_t)gpu->memory_celsius; break;
    case FIELD_ENERGY:
        field->value_type = NVML_VALUE_ULONGLONG;
        field->value.u64 = energy_uj(target->node, gpu) / 1000;
        break;
    case FIELD_REMAPPED_CORRECTED: field->value.u32 = gpu->remapped_corrected; break;
    case FIELD_REMAPPED_UNCORRECTED: field->value.u32 = gpu->remapped_uncorrected; break;
    case FIELD_REMAP_PENDING: field->value.u32 = gpu->remap_pending; break;
    case FIELD_REMAP_FAILED: field->value.u32 = gpu->remap_failed; break;
    case FIELD_RESETLESS_MIG: field->value.u32 = !target->board->mig_needs_reset; break;
    case FIELD_POWER_AVERAGE:
    case FIELD_POWER_INSTANT: field->value.u32 = drawn_mw(gpu); break;
    case FIELD_MIG_INDEPENDENT_QUERY: field->value.u32 = !target->board->mig_needs_reset; break;
    case FIELD_RECOVERY_ACTION: field->value.u32 = gpu->recovery_action; break;
    default: field->status = NVML_NOT_SUPPORTED;
    }
}

NVML nvmlDeviceGetFieldValues(nvml_handle device, int count, struct nvml_field *fields)
{
    struct target target;
    int result = look(__func__, device, GPU, &target);
    if (result != NVML_SUCCESS)
        return result;
    for (int at = 0; at < count; at++)
        fill(&target, &fields[at]);
    return done(&target, NVML_SUCCESS);
}

/* --- drain ------------------------------------------------------------------------------------------------------- */

NVML nvmlDeviceModifyDrainState(struct nvml_pci *pci, uint32_t drain)
{
    const struct node *node;
    int result = look_at_node(__func__, &node);
    if (result != NVML_SUCCESS)
        return result;
    bool may = privileged(node);
    state_done();
    if (!may)
        return NVML_NO_PERMISSION;
    struct node *changed = state_change();
    result = NVML_NOT_FOUND;
    for (uint32_t index = 0; index < changed->gpu_count; index++) {
        struct gpu *gpu = &changed->gpus[index];
        if (gpu->bus != pci->bus)
            continue;
        result = gpu_in_use(changed, index) || gpu->persistence ? NVML_IN_USE : NVML_SUCCESS;
        if (result == NVML_SUCCESS)
            gpu->draining = drain;
    }
    if (result == NVML_SUCCESS)
        state_commit();
    state_done();
    return result;
}
