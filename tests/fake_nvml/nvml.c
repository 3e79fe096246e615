/* A fake of NVIDIA's management library: the C side.
 *
 * Semantics follow the NVML API Reference Guide; the section names in the comments are the guide's.
 * Everything the library says is read from one structure in a file mapped by every process that
 * takes part (environment: FAKE_NVML_STATE), so a test changes a value and the next call, in
 * whichever process, sees it. state.h is that structure and call.h the prologue that
 * every function here begins with.
 */
#define _GNU_SOURCE
#include "call.h"
#include "readings.h"

/* ---- Guide: "Initialization and Cleanup", "Error reporting" ---------------------------------- */

static nvmlReturn_t initialise(struct entry *entry) {
    if (!attached) { /* the state may have appeared since the library was loaded */
        struct state *none = NULL, *fresh = map_state(getenv("FAKE_NVML_STATE"));
        if (fresh && !atomic_compare_exchange_strong(&attached, &none, fresh)) munmap(fresh, sizeof *fresh);
    }
    __attribute__((cleanup(leave))) struct call call = begin();
    nvmlReturn_t entered = enter(&call, entry, LIBRARY, NULL);
    if (entered) return entered;
    if (!call.state->driver_loaded) return NVML_ERROR_DRIVER_NOT_LOADED;
    pthread_mutex_lock(&session_lock);
    if (session_generation != call.state->driver_generation) session_count = 0;
    session_generation = call.state->driver_generation;
    session_count++;
    pthread_mutex_unlock(&session_lock);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlInitWithFlags(uint flags) {
    ENTRY(nvmlInitWithFlags);
    return flags > 3 ? NVML_ERROR_INVALID_ARGUMENT : initialise(&entry); /* NO_GPUS | NO_ATTACH */
}
nvmlReturn_t nvmlInit_v2(void) {
    ENTRY(nvmlInit_v2);
    return initialise(&entry);
}
nvmlReturn_t nvmlInit(void) {
    ENTRY(nvmlInit);
    return initialise(&entry);
}
nvmlReturn_t nvmlShutdown(void) {
    ENTER(nvmlShutdown, SYSTEM, NULL);
    pthread_mutex_lock(&session_lock);
    if (session_count && !--session_count) session_generation = 0;
    pthread_mutex_unlock(&session_lock);
    return NVML_SUCCESS;
}
const char *nvmlErrorString(nvmlReturn_t result) {
    switch (result) {
#define AS_CASE(name, value, text) \
    case value: return text;
        RETURNS(AS_CASE)
    }
    return "Unknown Error";
}

/* ---- Guide: "System Queries" ----------------------------------------------------------------- */

nvmlReturn_t nvmlSystemGetDriverVersion(char *out, uint length) {
    ENTER(nvmlSystemGetDriverVersion, SYSTEM, NULL);
    return give_text(&state->driver_version, out, length);
}
nvmlReturn_t nvmlSystemGetNVMLVersion(char *out, uint length) {
    ENTER(nvmlSystemGetNVMLVersion, LIBRARY, NULL);
    return give_text(&state->nvml_version, out, length);
}
#define CUDA_VERSION(function, missing) \
    nvmlReturn_t function(int *out) { \
        ENTER(function, LIBRARY, NULL); \
        REQUIRE(out); \
        if (state->cuda_version == UNSUPPORTED) return missing; \
        *out = (int)state->cuda_version; \
        return NVML_SUCCESS; \
    }
CUDA_VERSION(nvmlSystemGetCudaDriverVersion, NVML_ERROR_UNKNOWN)
CUDA_VERSION(nvmlSystemGetCudaDriverVersion_v2, NVML_ERROR_LIBRARY_NOT_FOUND)

nvmlReturn_t nvmlSystemGetProcessName(uint pid, char *out, uint length) {
    ENTER(nvmlSystemGetProcessName, SYSTEM, NULL);
    REQUIRE(out && length);
    for (int i = 0; i < PROCESSES; i++) {
        struct process *process = &state->processes[i];
        if (!process->presence || process->pid != pid || process->name.form == TEXT_ABSENT) continue;
        if (process->name.form == TEXT_NORMAL && process->name.length >= length) { /* cropped, says the guide */
            memcpy(out, process->name.bytes, length - 1);
            out[length - 1] = 0;
            return NVML_SUCCESS;
        }
        return give_text(&process->name, out, length);
    }
    return NVML_ERROR_NOT_FOUND;
}

/* ---- Guide: "Device Queries": finding devices ------------------------------------------------ */

/* Indices skip slots that nobody uses. */
static uint gpus_before(const struct state *state, int end) {
    uint count = 0;
    for (int slot = 0; slot < end; slot++) count += state->gpus[slot].used != 0;
    return count;
}
static nvmlDevice_t find_index(const struct state *state, uint index) {
    for (int slot = 0; state && slot < GPUS; slot++)
        if (state->gpus[slot].used && !index--) return handle_of(slot, -1);
    return NULL;
}
static int parse_bus_id(const char *text, size_t length, uint *domain, uint *bus, uint *device) {
    char copy[128] = {0};
    uint function;
    memcpy(copy, text, length < sizeof copy ? length : sizeof copy - 1);
    if (sscanf(copy, "%x:%x:%x.%x", domain, bus, device, &function) == 4) return 1;
    *domain = 0; /* the guide lets the domain be left out */
    return sscanf(copy, "%x:%x.%x", bus, device, &function) == 3;
}

#define COUNT(function) \
    nvmlReturn_t function(uint *out) { \
        ENTER(function, SYSTEM, NULL); \
        REQUIRE(out); \
        *out = gpus_before(state, GPUS); \
        return NVML_SUCCESS; \
    }
COUNT(nvmlDeviceGetCount_v2)
COUNT(nvmlDeviceGetCount)

/* The handle goes into the prologue, so that a failure can be forced for one GPU and a lost one says so. */
#define BY_INDEX(function) \
    nvmlReturn_t function(uint index, nvmlDevice_t *out) { \
        ENTER(function, SYSTEM, find_index(call.state, index)); \
        REQUIRE(out && gpu); \
        *out = handle_of(call.gpu_slot, -1); \
        return NVML_SUCCESS; \
    }
BY_INDEX(nvmlDeviceGetHandleByIndex_v2)
BY_INDEX(nvmlDeviceGetHandleByIndex)

static nvmlDevice_t find_uuid(const struct state *state, const char *uuid) {
    for (int slot = 0; state && uuid && slot < GPUS; slot++) {
        const struct gpu *gpu = &state->gpus[slot];
        if (!gpu->used) continue;
        if (text_is(&gpu->uuid, uuid)) return handle_of(slot, -1);
        for (int i = 0; gpu->mig_enabled == 1 && i < MIGS; i++)
            if (gpu->migs[i].used && text_is(&gpu->migs[i].uuid, uuid)) return handle_of(slot, i);
    }
    return NULL;
}
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *out) {
    ENTER(nvmlDeviceGetHandleByUUID, SYSTEM, find_uuid(call.state, uuid));
    REQUIRE(uuid && out);
    if (!gpu) return NVML_ERROR_NOT_FOUND;
    *out = handle_of(call.gpu_slot, call.mig_slot);
    return NVML_SUCCESS;
}

static nvmlDevice_t find_bus_id(struct state *state, const char *text) {
    uint want[3], have[3];
    if (!state || !text || !parse_bus_id(text, strlen(text), &want[0], &want[1], &want[2])) return NULL;
    for (int slot = 0; slot < GPUS; slot++) {
        struct text *own = &state->gpus[slot].pci_bus_id;
        if (state->gpus[slot].used && parse_bus_id(own->bytes, own->length, &have[0], &have[1], &have[2]) &&
            !memcmp(want, have, sizeof want))
            return handle_of(slot, -1);
    }
    return NULL;
}
#define BY_BUS_ID(function) \
    nvmlReturn_t function(const char *text, nvmlDevice_t *out) { \
        ENTER(function, SYSTEM, find_bus_id(call.state, text)); \
        uint ignored; \
        REQUIRE(text && out && parse_bus_id(text, strlen(text), &ignored, &ignored, &ignored)); \
        if (!gpu) return NVML_ERROR_NOT_FOUND; \
        *out = handle_of(call.gpu_slot, -1); \
        return NVML_SUCCESS; \
    }
BY_BUS_ID(nvmlDeviceGetHandleByPciBusId_v2)
BY_BUS_ID(nvmlDeviceGetHandleByPciBusId)

/* ---- Guide: "Device Queries": what a device is ----------------------------------------------- */

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *out, uint length) {
    ENTER(nvmlDeviceGetName, GPU_OR_MIG, device);
    return give_text(mig ? &mig->name : &gpu->name, out, length);
}
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *out, uint length) {
    ENTER(nvmlDeviceGetUUID, GPU_OR_MIG, device);
    return give_text(mig ? &mig->uuid : &gpu->uuid, out, length);
}
/* On a MIG device handle: the index that nvmlDeviceGetMigDeviceHandleByIndex takes. */
nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, uint *out) {
    ENTER(nvmlDeviceGetIndex, GPU_OR_MIG, device);
    REQUIRE(out);
    *out = mig ? (uint)call.mig_slot : gpus_before(state, call.gpu_slot);
    return NVML_SUCCESS;
}
TEXT(nvmlDeviceGetSerial, serial)
TEXT(nvmlDeviceGetVbiosVersion, vbios)
NUMBER(nvmlDeviceGetMinorNumber, uint, minor_number)
NUMBER(nvmlDeviceGetArchitecture, uint, architecture)
NUMBER(nvmlDeviceGetBrand, uint, brand)
NUMBER(nvmlDeviceGetNumGpuCores, uint, core_count)
NUMBER(nvmlDeviceGetMemoryBusWidth, uint, memory_bus_width)
NUMBERS(nvmlDeviceGetCudaComputeCapability, int, compute_major, compute_minor)
NUMBER(nvmlDeviceGetPersistenceMode, uint, persistence_mode)
NUMBER(nvmlDeviceGetComputeMode, uint, compute_mode)
NUMBER(nvmlDeviceGetDisplayMode, uint, display_mode)
NUMBER(nvmlDeviceGetDisplayActive, uint, display_active)

struct pci_info {
    char legacy[16];
    uint domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};
static nvmlReturn_t pci_info(const struct gpu *gpu, struct pci_info *out) {
    REQUIRE(out);
    SUPPORTED(gpu->pci_bus_id.form != TEXT_ABSENT);
    struct pci_info info = {.device_id = (uint)gpu->pci_device_id, .subsystem_id = (uint)gpu->pci_subsystem_id};
    const struct text *text = &gpu->pci_bus_id;
    uint domain, bus, slot;
    if (text->form == TEXT_NORMAL && parse_bus_id(text->bytes, text->length, &domain, &bus, &slot)) {
        info.domain = domain;
        info.bus = bus &= 0xff;
        info.device = slot &= 0xff;
        snprintf(info.bus_id, sizeof info.bus_id, "%08X:%02X:%02X.0", domain, bus, slot);
        snprintf(info.legacy, sizeof info.legacy, "%04X:%02X:%02X.0", domain & 0xffff, bus, slot);
    } else { /* whatever bytes a test put there */
        memset(info.bus_id, 0, sizeof info.bus_id);
        memcpy(info.bus_id, text->bytes, text->length < 32 ? text->length : 32);
        memcpy(info.legacy, info.bus_id, sizeof info.legacy);
    }
    *out = info;
    return NVML_SUCCESS;
}
#define PCI_INFO(function) \
    nvmlReturn_t function(nvmlDevice_t device, struct pci_info *out) { \
        ENTER(function, GPU_ONLY, device); \
        return pci_info(gpu, out); \
    }
PCI_INFO(nvmlDeviceGetPciInfo_v3)
PCI_INFO(nvmlDeviceGetPciInfo_v2)

/* ---- Guide: "Device Queries": memory --------------------------------------------------------- */

struct memory_v1 {
    ull total, free, used;
};
struct memory_v2 {
    uint version;
    ull total, reserved, free, used;
};
static nvmlReturn_t memory_info(const struct call *call, struct memory_v2 *out) {
    const struct mig *mig = call->mig;
    int64_t total = mig ? mig->memory_total : call->gpu->memory_total;
    int64_t reserved = mig ? mig->memory_reserved : call->gpu->memory_reserved;
    int64_t used = mig ? mig->memory_used : call->gpu->memory_used;
    HAS(total);
    HAS(used);
    if (reserved == UNSUPPORTED) reserved = 0;
    int64_t left = total - reserved - used;
    out->total = (ull)total;
    out->reserved = (ull)reserved;
    out->used = (ull)used;
    out->free = left > 0 ? (ull)left : 0;
    return NVML_SUCCESS;
}
/* nvmlMemory_t counts what the driver reserves as used; nvmlMemory_v2_t has it apart. */
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, struct memory_v1 *out) {
    ENTER(nvmlDeviceGetMemoryInfo, GPU_OR_MIG, device);
    REQUIRE(out);
    struct memory_v2 memory;
    nvmlReturn_t result = memory_info(&call, &memory);
    if (!result) *out = (struct memory_v1){memory.total, memory.free, memory.used + memory.reserved};
    return result;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, struct memory_v2 *out) {
    ENTER(nvmlDeviceGetMemoryInfo_v2, GPU_OR_MIG, device);
    REQUIRE(out);
    VERSIONED(out->version, struct memory_v2, 2);
    return memory_info(&call, out);
}
nvmlReturn_t nvmlDeviceGetBAR1MemoryInfo(nvmlDevice_t device, struct memory_v1 *out) {
    ENTER(nvmlDeviceGetBAR1MemoryInfo, GPU_OR_MIG, device);
    REQUIRE(out);
    int64_t total = mig ? mig->bar1_total : gpu->bar1_total, used = mig ? mig->bar1_used : gpu->bar1_used;
    HAS(total);
    HAS(used);
    *out = (struct memory_v1){(ull)total, (ull)(total - used), (ull)used};
    return NVML_SUCCESS;
}

/* ---- Guide: "Device Queries": utilization. Not supported on MIG-enabled GPUs, it says -------- */

#define NOT_IN_MIG_MODE() SUPPORTED(gpu->mig_enabled != 1)
struct utilization {
    uint gpu, memory;
};
nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, struct utilization *out) {
    ENTER(nvmlDeviceGetUtilizationRates, GPU_ONLY, device);
    REQUIRE(out);
    NOT_IN_MIG_MODE();
    HAS(gpu->gpu_utilization);
    HAS(gpu->memory_utilization);
    *out = (struct utilization){(uint)gpu->gpu_utilization, (uint)gpu->memory_utilization};
    return NVML_SUCCESS;
}
#define ENGINE(function, field) \
    nvmlReturn_t function(nvmlDevice_t device, uint *out, uint *period_us) { \
        ENTER(function, GPU_ONLY, device); \
        REQUIRE(out && period_us); \
        NOT_IN_MIG_MODE(); \
        HAS(gpu->field); \
        *out = (uint)gpu->field; \
        *period_us = (uint)gpu->utilization_period_us; \
        return NVML_SUCCESS; \
    }
ENGINE(nvmlDeviceGetEncoderUtilization, encoder_utilization)
ENGINE(nvmlDeviceGetDecoderUtilization, decoder_utilization)
ENGINE(nvmlDeviceGetJpgUtilization, jpeg_utilization)
ENGINE(nvmlDeviceGetOfaUtilization, ofa_utilization)

union value {
    double real;
    uint small;
    ull large;
};
struct sample {
    ull time_us;
    union value value;
};
nvmlReturn_t nvmlDeviceGetSamples(nvmlDevice_t device, uint kind, ull last_seen_us, uint *type, uint *count,
                                  struct sample *out) {
    ENTER(nvmlDeviceGetSamples, GPU_ONLY, device);
    REQUIRE(kind < SAMPLE_KINDS && type && count && (!out || *count));
    SUPPORTED(gpu->mig_enabled != 1 || kind < 1 || kind > 4); /* the four utilizations that the guide lists */
    struct ring *ring = &gpu->rings[kind];
    uint64_t end = ring->written, start = end > SAMPLES ? end - SAMPLES : 0;
    while (start < end && ring->samples[start % SAMPLES].time_us <= last_seen_us) start++;
    if (start == end) return NVML_ERROR_NOT_FOUND;
    uint found = (uint)(end - start);
    *type = 1; /* NVML_VALUE_TYPE_UNSIGNED_INT */
    if (out && found > *count) found = *count;
    for (uint i = 0; out && i < found; i++) {
        out[i].time_us = ring->samples[(start + i) % SAMPLES].time_us;
        out[i].value.large = ring->samples[(start + i) % SAMPLES].value;
    }
    *count = found;
    return NVML_SUCCESS;
}

/* ---- Guide: "Device Queries": temperature, power, clocks, fans, PCIe ------------------------- */

static nvmlReturn_t temperature(const struct gpu *gpu, uint sensor, int *out) {
    REQUIRE(out && sensor < 2);
    int64_t value = sensor ? gpu->hotspot_temperature : gpu->temperature;
    HAS(value);
    *out = (int)value;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, uint sensor, int *out) {
    ENTER(nvmlDeviceGetTemperature, GPU_ONLY, device);
    return temperature(gpu, sensor, out);
}
struct temperature_v1 {
    uint version, sensor;
    int temperature;
};
nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, struct temperature_v1 *out) {
    ENTER(nvmlDeviceGetTemperatureV, GPU_ONLY, device);
    REQUIRE(out);
    VERSIONED(out->version, struct temperature_v1, 1);
    return temperature(gpu, out->sensor, &out->temperature);
}
ELEMENT(nvmlDeviceGetTemperatureThreshold, uint, threshold)
NUMBER(nvmlDeviceGetPowerUsage, uint, power_mw)
NUMBER(nvmlDeviceGetPowerManagementLimit, uint, power_limit_mw)
NUMBER(nvmlDeviceGetPowerManagementDefaultLimit, uint, power_default_limit_mw)
NUMBERS(nvmlDeviceGetPowerManagementLimitConstraints, uint, power_min_limit_mw, power_max_limit_mw)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, uint, power_enforced_limit_mw)
NUMBER(nvmlDeviceGetTotalEnergyConsumption, ull, energy_mj)
nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, uint index, uint *out) {
    ENTER(nvmlDeviceGetClockInfo, GPU_ONLY, device);
    REQUIRE(out && index < sizeof gpu->clock / sizeof *gpu->clock);
    HAS(gpu->clock[index]);
    *out = (uint)gpu->clock[index];
    if (index == 3) number_reading(call.gpu_slot, out); /* NVML_CLOCK_VIDEO */
    return NVML_SUCCESS;
}
ELEMENT(nvmlDeviceGetMaxClockInfo, uint, max_clock)
NUMBER(nvmlDeviceGetPerformanceState, uint, performance_state)
NUMBER(nvmlDeviceGetPowerState, uint, performance_state)
NUMBER(nvmlDeviceGetCurrentClocksEventReasons, ull, clocks_event_reasons)
NUMBER(nvmlDeviceGetCurrentClocksThrottleReasons, ull, clocks_event_reasons)
NUMBER(nvmlDeviceGetSupportedClocksEventReasons, ull, supported_event_reasons)
NUMBER(nvmlDeviceGetSupportedClocksThrottleReasons, ull, supported_event_reasons)

static uint fan_count(const struct gpu *gpu) {
    uint count = 0;
    while (count < FANS && gpu->fan_speed[count] != UNSUPPORTED) count++;
    return count;
}
NUMBER(nvmlDeviceGetFanSpeed, uint, fan_speed[0])
nvmlReturn_t nvmlDeviceGetFanSpeed_v2(nvmlDevice_t device, uint fan, uint *out) {
    ENTER(nvmlDeviceGetFanSpeed_v2, GPU_ONLY, device);
    SUPPORTED(fan_count(gpu));
    REQUIRE(out && fan < fan_count(gpu));
    *out = (uint)gpu->fan_speed[fan];
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetNumFans(nvmlDevice_t device, uint *out) {
    ENTER(nvmlDeviceGetNumFans, GPU_ONLY, device);
    REQUIRE(out);
    SUPPORTED(fan_count(gpu));
    *out = fan_count(gpu);
    return NVML_SUCCESS;
}
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, uint, pcie_generation)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, uint, pcie_width)
NUMBER(nvmlDeviceGetMaxPcieLinkGeneration, uint, pcie_max_generation)
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, uint, pcie_max_width)
NUMBER(nvmlDeviceGetPcieReplayCounter, uint, pcie_replays)
nvmlReturn_t nvmlDeviceGetPcieThroughput(nvmlDevice_t device, uint counter, uint *out) {
    ENTER(nvmlDeviceGetPcieThroughput, GPU_ONLY, device);
    REQUIRE(out && counter < 2);
    int64_t value = counter ? gpu->pcie_rx_kib_s : gpu->pcie_tx_kib_s;
    HAS(value);
    *out = (uint)value;
    return NVML_SUCCESS;
}

/* ---- Guide: "Device Queries": ECC, row remapping, page retirement ---------------------------- */

NUMBERS(nvmlDeviceGetEccMode, uint, ecc_enabled, ecc_pending)
static int64_t ecc_total(const struct gpu *gpu, uint type, uint counter) {
    if (gpu->ecc_enabled != 1) return UNSUPPORTED;
    int64_t total = 0;
    for (int location = 0; location < 8; location++)
        if (gpu->ecc[type][counter][location] != UNSUPPORTED) total += gpu->ecc[type][counter][location];
    return total;
}
nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, uint type, uint counter, ull *out) {
    ENTER(nvmlDeviceGetTotalEccErrors, GPU_ONLY, device);
    REQUIRE(out && type < 2 && counter < 2);
    HAS(ecc_total(gpu, type, counter));
    *out = (ull)ecc_total(gpu, type, counter);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t device, uint type, uint counter, uint location,
                                             ull *out) {
    ENTER(nvmlDeviceGetMemoryErrorCounter, GPU_ONLY, device);
    REQUIRE(out && type < 2 && counter < 2 && location < 8);
    SUPPORTED(gpu->ecc_enabled == 1);
    SUPPORTED(counter || gpu->mig_enabled != 1); /* no volatile errors by device handle in MIG mode */
    HAS(gpu->ecc[type][counter][location]);
    *out = (ull)gpu->ecc[type][counter][location];
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, uint *correctable, uint *uncorrectable,
                                       uint *pending, uint *failure) {
    ENTER(nvmlDeviceGetRemappedRows, GPU_ONLY, device);
    REQUIRE(correctable && uncorrectable && pending && failure);
    NOT_IN_MIG_MODE();
    HAS(gpu->remapped_correctable);
    *correctable = (uint)gpu->remapped_correctable;
    *uncorrectable = (uint)gpu->remapped_uncorrectable;
    *pending = (uint)gpu->remapped_pending;
    *failure = (uint)gpu->remapped_failure;
    return NVML_SUCCESS;
}
static nvmlReturn_t retired_pages(const struct gpu *gpu, uint cause, uint *count, ull *addresses, ull *times,
                                  int timed) {
    REQUIRE(count && cause < 2 && (addresses || !*count));
    HAS(gpu->retired_pending);
    uint needed = 0, room = *count;
    for (int i = 0; i < RETIRED_PAGES; i++) needed += gpu->retired[i].used && gpu->retired[i].cause == cause;
    *count = needed;
    if (room < needed) return NVML_ERROR_INSUFFICIENT_SIZE;
    /* pynvml's sizing call leaves `times` out of the argument list: not to be looked at before here. */
    for (uint i = 0, n = 0; room && i < RETIRED_PAGES && n < needed; i++) {
        if (!gpu->retired[i].used || gpu->retired[i].cause != cause) continue;
        addresses[n] = gpu->retired[i].address;
        if (timed && times) times[n] = gpu->retired[i].time_us;
        n++;
    }
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetRetiredPages(nvmlDevice_t device, uint cause, uint *count, ull *addresses) {
    ENTER(nvmlDeviceGetRetiredPages, GPU_ONLY, device);
    return retired_pages(gpu, cause, count, addresses, NULL, 0);
}
nvmlReturn_t nvmlDeviceGetRetiredPages_v2(nvmlDevice_t device, uint cause, uint *count, ull *addresses,
                                          ull *times) {
    ENTER(nvmlDeviceGetRetiredPages_v2, GPU_ONLY, device);
    return retired_pages(gpu, cause, count, addresses, times, 1);
}
NUMBER(nvmlDeviceGetRetiredPagesPendingStatus, uint, retired_pending)

/* ---- Guide: "NvLink Methods" ----------------------------------------------------------------- */

#define LINK(function, type, ok, value, ...) \
    nvmlReturn_t function(nvmlDevice_t device, uint link, ##__VA_ARGS__, type *out) { \
        ENTER(function, GPU_ONLY, device); \
        SUPPORTED(gpu->nvlink_count > 0); \
        REQUIRE(out && link < NVLINKS && link < gpu->nvlink_count && (ok)); \
        HAS(value); \
        *out = (type)(value); \
        return NVML_SUCCESS; \
    }
LINK(nvmlDeviceGetNvLinkState, uint, 1, gpu->nvlink_active[link])
LINK(nvmlDeviceGetNvLinkVersion, uint, 1, gpu->nvlink_version)
LINK(nvmlDeviceGetNvLinkErrorCounter, ull, counter < 5, gpu->nvlink_errors[link][counter], uint counter)

/* ---- Guide: "Field Value Queries" ------------------------------------------------------------ */

struct field_value {
    uint32_t id, scope;
    int64_t time_us, latency_us;
    uint type;
    nvmlReturn_t result;
    union value value;
};
enum { UNSIGNED_INT = 1, UNSIGNED_LONG_LONG = 3 }; /* nvmlValueType_t */

/* Fields that say the same as a function does, so that a test need not set them twice. */
static int64_t built_in_field(const struct gpu *gpu, uint32_t id, uint *type) {
    *type = UNSIGNED_INT;
    switch (id) {
    case 1: return gpu->ecc_enabled;
    case 2: return gpu->ecc_pending;
    case 82: return gpu->memory_temperature;
    case 91: return gpu->nvlink_count;
    case 142: return gpu->remapped_correctable;
    case 143: return gpu->remapped_uncorrectable;
    case 144: return gpu->remapped_pending;
    case 145: return gpu->remapped_failure;
    case 185: return gpu->power_average_mw;
    case 186: return gpu->power_mw;
    case 187: return gpu->power_min_limit_mw;
    case 188: return gpu->power_max_limit_mw;
    case 189: return gpu->power_default_limit_mw;
    case 190: return gpu->power_enforced_limit_mw;
    case 192: return gpu->power_limit_mw;
    }
    *type = UNSIGNED_LONG_LONG;
    if (id >= 3 && id <= 6) return ecc_total(gpu, (id - 3) % 2, (id - 3) / 2);
    return id == 83 || id == 191 ? gpu->energy_mj : UNSUPPORTED;
}
nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, struct field_value *out) {
    ENTER(nvmlDeviceGetFieldValues, GPU_ONLY, device);
    REQUIRE(out && count > 0);
    for (int i = 0; i < count; i++) {
        const struct field *set = NULL;
        for (int j = 0; j < FIELDS && !set; j++) {
            const struct field *field = &gpu->fields[j];
            int in_scope = field->any_scope || field->scope == out[i].scope;
            if (field->used && field->id == out[i].id && in_scope) set = field;
        }
        int64_t value = built_in_field(gpu, out[i].id, &out[i].type);
        out[i].time_us = (int64_t)now_us();
        out[i].latency_us = 1;
        out[i].value.large = 0;
        if (set) {
            out[i].type = set->type;
            out[i].result = set->result;
            out[i].value.large = set->value;
        } else if (!out[i].id || out[i].id >= FIELD_ID_END) {
            out[i].result = NVML_ERROR_INVALID_ARGUMENT;
        } else {
            out[i].result = value == UNSUPPORTED ? NVML_ERROR_NOT_SUPPORTED : NVML_SUCCESS;
            if (value != UNSUPPORTED) out[i].value.large = (ull)value;
        }
    }
    return NVML_SUCCESS;
}

/* ---- Guide: "Device Queries": processes ------------------------------------------------------ */

/* Every version of nvmlProcessInfo_t is a prefix of this: 16 bytes (v1), 24 (v2, v3), 32 (535.43 to .86). */
struct process_info {
    uint pid;
    ull memory;
    uint gpu_instance, compute_instance;
    ull protected_memory;
};
static uint collect(struct call *call, uint kinds, struct process *found[PROCESSES]) {
    uint count = 0;
    for (int i = 0; i < PROCESSES; i++) {
        struct process *process = &call->state->processes[i];
        uint presence = process->presence;
        if ((presence == PRESENT || presence == UNTIL_SIZING) && (process->kind & kinds) &&
            process->gpu == call->gpu_slot && (!call->mig || process->mig == call->mig_slot))
            found[count++] = process;
    }
    return count;
}
/* Between a client's two calls processes come and go. */
static void sized(struct call *call, uint kinds) {
    for (int i = 0; i < PROCESSES; i++) {
        struct process *process = &call->state->processes[i];
        if (process->gpu != call->gpu_slot || !(process->kind & kinds)) continue;
        if (process->presence == AFTER_SIZING) process->presence = PRESENT;
        else if (process->presence == UNTIL_SIZING) process->presence = ABSENT;
    }
}
static nvmlReturn_t running(struct call *call, uint kinds, uint *count, void *out, size_t bytes) {
    REQUIRE(count && (out || !*count));
    struct process *found[PROCESSES];
    uint room = *count, needed = collect(call, kinds, found);
    *count = needed;
    if (!room) sized(call, kinds);
    if (room < needed) return NVML_ERROR_INSUFFICIENT_SIZE;
    for (uint i = 0; i < needed; i++) {
        struct process_info info = {0};
        info.pid = found[i]->pid;
        info.memory = found[i]->memory;
        info.gpu_instance = found[i]->gpu_instance;
        info.compute_instance = found[i]->compute_instance;
        info.protected_memory = found[i]->protected_memory;
        memcpy((char *)out + i * bytes, &info, bytes);
    }
    return NVML_SUCCESS;
}
#define RUNNING(function, kinds, bytes) \
    nvmlReturn_t function(nvmlDevice_t device, uint *count, void *out) { \
        ENTER(function, GPU_OR_MIG, device); \
        return running(&call, kinds, count, out, bytes); \
    }
RUNNING(nvmlDeviceGetComputeRunningProcesses, COMPUTE, 16)
RUNNING(nvmlDeviceGetComputeRunningProcesses_v2, COMPUTE, 24)
RUNNING(nvmlDeviceGetComputeRunningProcesses_v3, COMPUTE, state->process_struct_bytes_v3)
RUNNING(nvmlDeviceGetGraphicsRunningProcesses, GRAPHICS, 16)
RUNNING(nvmlDeviceGetGraphicsRunningProcesses_v2, GRAPHICS, 24)
RUNNING(nvmlDeviceGetGraphicsRunningProcesses_v3, GRAPHICS, state->process_struct_bytes_v3)
RUNNING(nvmlDeviceGetMPSComputeRunningProcesses, MPS, 16)
RUNNING(nvmlDeviceGetMPSComputeRunningProcesses_v2, MPS, 24)
RUNNING(nvmlDeviceGetMPSComputeRunningProcesses_v3, MPS, state->process_struct_bytes_v3)

struct process_list {
    uint version, mode, count;
    struct process_info *processes;
};
nvmlReturn_t nvmlDeviceGetRunningProcessDetailList(nvmlDevice_t device, struct process_list *list) {
    ENTER(nvmlDeviceGetRunningProcessDetailList, GPU_OR_MIG, device);
    REQUIRE(list);
    VERSIONED(list->version, struct process_list, 1);
    REQUIRE(list->mode < 4);
    static const uint kinds[] = {COMPUTE, GRAPHICS, MPS, COMPUTE | GRAPHICS | MPS};
    return running(&call, kinds[list->mode], &list->count, list->processes, sizeof *list->processes);
}

/* "One utilization sample structure is returned per process running, that had some non-zero
 * utilization during the last sample period." */
static uint busy(struct call *call, ull last_seen_us, struct process *found[PROCESSES]) {
    uint all = collect(call, COMPUTE | GRAPHICS | MPS, found), count = 0;
    for (uint i = 0; i < all; i++) {
        struct process *p = found[i];
        int again = !(p->sm | p->memory_utilization | p->encoder | p->decoder | p->jpeg | p->ofa) ||
                    (p->time_us && p->time_us <= last_seen_us);
        for (uint j = 0; j < count; j++) again |= found[j]->pid == p->pid;
        if (!again) found[count++] = p;
    }
    return count;
}
struct process_sample {
    uint pid;
    ull time_us;
    uint sm, memory, encoder, decoder;
};
nvmlReturn_t nvmlDeviceGetProcessUtilization(nvmlDevice_t device, struct process_sample *out, uint *count,
                                             ull last_seen_us) {
    ENTER(nvmlDeviceGetProcessUtilization, GPU_ONLY, device);
    REQUIRE(count);
    NOT_IN_MIG_MODE();
    struct process *found[PROCESSES];
    uint room = *count, needed = busy(&call, last_seen_us, found);
    if (!needed) return NVML_ERROR_NOT_FOUND;
    *count = needed;
    if (!out || room < needed) return NVML_ERROR_INSUFFICIENT_SIZE;
    for (uint i = 0; i < needed; i++) {
        struct process *p = found[i];
        ull time_us = p->time_us ? p->time_us : now_us();
        out[i] = (struct process_sample){p->pid, time_us, p->sm, p->memory_utilization, p->encoder, p->decoder};
    }
    return NVML_SUCCESS;
}
struct process_utilization {
    ull time_us;
    uint pid, sm, memory, encoder, decoder, jpeg, ofa;
};
struct process_utilization_list {
    uint version, count;
    ull last_seen_us;
    struct process_utilization *processes;
};
nvmlReturn_t nvmlDeviceGetProcessesUtilizationInfo(nvmlDevice_t device, struct process_utilization_list *list) {
    ENTER(nvmlDeviceGetProcessesUtilizationInfo, GPU_ONLY, device);
    REQUIRE(list);
    VERSIONED(list->version, struct process_utilization_list, 1);
    NOT_IN_MIG_MODE();
    struct process *found[PROCESSES];
    uint room = list->count, needed = busy(&call, list->last_seen_us, found);
    if (!needed) return NVML_ERROR_NOT_FOUND;
    list->count = needed;
    if (!list->processes || room < needed) return NVML_ERROR_INSUFFICIENT_SIZE;
    for (uint i = 0; i < needed; i++) {
        struct process *p = found[i];
        list->processes[i] = (struct process_utilization){
            p->time_us ? p->time_us : now_us(), p->pid, p->sm, p->memory_utilization, p->encoder, p->decoder,
            p->jpeg, p->ofa,
        };
    }
    return NVML_SUCCESS;
}

/* ---- Guide: "Multi Instance GPU Management" -------------------------------------------------- */

NUMBERS(nvmlDeviceGetMigMode, uint, mig_enabled, mig_pending)
nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t device, uint *out) {
    ENTER(nvmlDeviceGetMaxMigDeviceCount, GPU_ONLY, device);
    REQUIRE(out);
    *out = gpu->mig_enabled == 1 ? (uint)gpu->mig_slots : 0; /* "zero if MIG is not supported or enabled" */
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t device, uint index, nvmlDevice_t *out) {
    ENTER(nvmlDeviceGetMigDeviceHandleByIndex, GPU_ONLY, device);
    REQUIRE(out);
    SUPPORTED(gpu->mig_enabled == 1);
    REQUIRE(index < MIGS && index < gpu->mig_slots);
    if (!gpu->migs[index].used) return NVML_ERROR_NOT_FOUND;
    *out = handle_of(call.gpu_slot, (int)index);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceIsMigDeviceHandle(nvmlDevice_t device, uint *out) {
    ENTER(nvmlDeviceIsMigDeviceHandle, GPU_OR_MIG, device);
    REQUIRE(out);
    *out = mig != NULL;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvmlDevice_t device, nvmlDevice_t *out) {
    ENTER(nvmlDeviceGetDeviceHandleFromMigDeviceHandle, GPU_OR_MIG, device);
    REQUIRE(mig && out);
    *out = handle_of(call.gpu_slot, -1);
    return NVML_SUCCESS;
}
#define MIG_NUMBER(function, field) \
    nvmlReturn_t function(nvmlDevice_t device, uint *out) { \
        ENTER(function, GPU_OR_MIG, device); \
        REQUIRE(out); \
        SUPPORTED(mig); \
        *out = (uint)mig->field; \
        return NVML_SUCCESS; \
    }
MIG_NUMBER(nvmlDeviceGetGpuInstanceId, gpu_instance_id)
MIG_NUMBER(nvmlDeviceGetComputeInstanceId, compute_instance_id)
struct attributes {
    uint multiprocessors, copy_engines, decoders, encoders, jpegs, ofas, gpu_slices, compute_slices;
    ull memory_mib;
};
nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t device, struct attributes *out) {
    ENTER(nvmlDeviceGetAttributes_v2, GPU_OR_MIG, device);
    REQUIRE(out);
    SUPPORTED(mig);
    *out = (struct attributes){
        (uint)mig->multiprocessors, (uint)mig->copy_engines, (uint)mig->decoders, (uint)mig->encoders,
        (uint)mig->jpegs, (uint)mig->ofas, (uint)mig->gpu_instance_slices, (uint)mig->compute_instance_slices,
        (ull)mig->memory_total >> 20,
    };
    return NVML_SUCCESS;
}

/* ---- Guide: "GPM Functions" ------------------------------------------------------------------ */

struct gpm_sample {
    int gpu, mig; /* gpu -1: nothing sampled yet */
    struct gpm_value values[GPM_VALUES];
};
struct gpm_support {
    uint version, supported;
};
struct gpm_metric {
    uint id;
    nvmlReturn_t result;
    double value;
    const char *short_name, *long_name, *unit;
};
struct gpm_metrics {
    uint version, count;
    struct gpm_sample *first, *second;
    struct gpm_metric metrics[];
};
nvmlReturn_t nvmlGpmQueryDeviceSupport(nvmlDevice_t device, struct gpm_support *out) {
    ENTER(nvmlGpmQueryDeviceSupport, GPU_OR_MIG, device);
    REQUIRE(out);
    if (out->version != 1) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    out->supported = gpu->gpm_supported == 1;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlGpmSampleAlloc(struct gpm_sample **out) {
    ENTER(nvmlGpmSampleAlloc, SYSTEM, NULL);
    REQUIRE(out);
    *out = calloc(1, sizeof **out);
    if (!*out) return NVML_ERROR_MEMORY;
    (*out)->gpu = -1;
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlGpmSampleFree(struct gpm_sample *sample) {
    ENTER(nvmlGpmSampleFree, SYSTEM, NULL);
    REQUIRE(sample);
    free(sample);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlGpmSampleGet(nvmlDevice_t device, struct gpm_sample *sample) {
    ENTER(nvmlGpmSampleGet, GPU_ONLY, device);
    REQUIRE(sample);
    SUPPORTED(gpu->gpm_supported == 1);
    sample->gpu = call.gpu_slot;
    sample->mig = -1;
    memcpy(sample->values, gpu->gpm, sizeof sample->values);
    return NVML_SUCCESS;
}
nvmlReturn_t nvmlGpmMigSampleGet(nvmlDevice_t device, uint gpu_instance, struct gpm_sample *sample) {
    ENTER(nvmlGpmMigSampleGet, GPU_ONLY, device);
    REQUIRE(sample);
    SUPPORTED(gpu->gpm_supported == 1 && gpu->mig_enabled == 1);
    for (int i = 0; i < MIGS; i++) {
        if (!gpu->migs[i].used || gpu->migs[i].gpu_instance_id != gpu_instance) continue;
        sample->gpu = call.gpu_slot;
        sample->mig = i;
        memcpy(sample->values, gpu->migs[i].gpm, sizeof sample->values);
        return NVML_SUCCESS;
    }
    return NVML_ERROR_INVALID_ARGUMENT;
}
/* A metric is what happened between two samples of the same device; here: what the second one says. */
nvmlReturn_t nvmlGpmMetricsGet(struct gpm_metrics *out) {
    ENTER(nvmlGpmMetricsGet, SYSTEM, NULL);
    REQUIRE(out);
    if (out->version != 1) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    REQUIRE(out->first && out->second && out->second->gpu >= 0 && out->first->gpu == out->second->gpu &&
            out->first->mig == out->second->mig && out->count < 477);
    for (uint i = 0; i < out->count; i++) {
        struct gpm_metric *metric = &out->metrics[i];
        metric->result = NVML_ERROR_NOT_SUPPORTED;
        metric->value = 0;
        metric->short_name = metric->long_name = metric->unit = "";
        for (int j = 0; j < GPM_VALUES; j++) {
            const struct gpm_value *value = &out->second->values[j];
            if (!value->used || value->id != metric->id) continue;
            metric->value = value->value;
            metric->result = NVML_SUCCESS;
        }
    }
    return NVML_SUCCESS;
}
