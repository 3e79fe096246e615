/* What the library knows: the structure in the shared file, mirrored field for field in __init__.py. */
#ifndef FAKE_NVML_STATE_H
#define FAKE_NVML_STATE_H

#include <stdatomic.h>
#include <stdint.h>

typedef unsigned int uint;
typedef unsigned long long ull;
typedef struct handle *nvmlDevice_t;
typedef uint nvmlReturn_t;

/* Guide: "Device Enums", nvmlReturn_t. */
#define RETURNS(X) \
    X(NVML_SUCCESS, 0, "Success") X(NVML_ERROR_UNINITIALIZED, 1, "Uninitialized") \
    X(NVML_ERROR_INVALID_ARGUMENT, 2, "Invalid Argument") X(NVML_ERROR_NOT_SUPPORTED, 3, "Not Supported") \
    X(NVML_ERROR_NO_PERMISSION, 4, "Insufficient Permissions") \
    X(NVML_ERROR_ALREADY_INITIALIZED, 5, "Already Initialized") X(NVML_ERROR_NOT_FOUND, 6, "Not Found") \
    X(NVML_ERROR_INSUFFICIENT_SIZE, 7, "Insufficient Size") \
    X(NVML_ERROR_INSUFFICIENT_POWER, 8, "Insufficient External Power") \
    X(NVML_ERROR_DRIVER_NOT_LOADED, 9, "Driver Not Loaded") X(NVML_ERROR_TIMEOUT, 10, "Timeout") \
    X(NVML_ERROR_IRQ_ISSUE, 11, "Interrupt Request Issue") \
    X(NVML_ERROR_LIBRARY_NOT_FOUND, 12, "NVML Shared Library Not Found") \
    X(NVML_ERROR_FUNCTION_NOT_FOUND, 13, "Function Not Found") \
    X(NVML_ERROR_CORRUPTED_INFOROM, 14, "Corrupted infoROM") X(NVML_ERROR_GPU_IS_LOST, 15, "GPU is lost") \
    X(NVML_ERROR_RESET_REQUIRED, 16, "GPU requires reset") \
    X(NVML_ERROR_OPERATING_SYSTEM, 17, "GPU access blocked by the operating system") \
    X(NVML_ERROR_LIB_RM_VERSION_MISMATCH, 18, "Driver/library version mismatch") \
    X(NVML_ERROR_IN_USE, 19, "In use by another client") X(NVML_ERROR_MEMORY, 20, "Insufficient Memory") \
    X(NVML_ERROR_NO_DATA, 21, "No data") \
    X(NVML_ERROR_VGPU_ECC_NOT_SUPPORTED, 22, "vGPU operation not supported with ECC enabled") \
    X(NVML_ERROR_INSUFFICIENT_RESOURCES, 23, "Insufficient resources") \
    X(NVML_ERROR_FREQ_NOT_SUPPORTED, 24, "Frequency not supported") \
    X(NVML_ERROR_ARGUMENT_VERSION_MISMATCH, 25, "Argument version mismatch") \
    X(NVML_ERROR_DEPRECATED, 26, "Deprecated") X(NVML_ERROR_NOT_READY, 27, "Not ready") \
    X(NVML_ERROR_GPU_NOT_FOUND, 28, "GPU not found") X(NVML_ERROR_INVALID_STATE, 29, "Invalid state") \
    X(NVML_ERROR_RESET_TYPE_NOT_SUPPORTED, 30, "Reset type not supported") \
    X(NVML_ERROR_UNKNOWN, 999, "Unknown Error")
#define AS_ENUM(name, value, text) name = value,
enum { RETURNS(AS_ENUM) };

enum {
    MAGIC = 0x4c4d5646,
    GPUS = 16,
    MIGS = 8,
    PROCESSES = 256,
    SAMPLE_KINDS = 10,
    SAMPLES = 128,
    FIELDS = 64,
    GPM_VALUES = 32,
    RETIRED_PAGES = 64,
    NVLINKS = 18,
    FANS = 4,
    RULES = 64,
    FUNCTIONS = 160,
    FIELD_ID_END = 308, /* NVML_FI_MAX of the 13.615 bindings */
};
#define UNSUPPORTED INT64_MIN /* a number that this board does not have: NVML_ERROR_NOT_SUPPORTED */
#define NO_INSTANCE 0xFFFFFFFFu

enum text_form { TEXT_ABSENT, TEXT_NORMAL, TEXT_UNTERMINATED };
struct text {
    uint32_t form, length;
    char bytes[120];
};

#define GPU_NUMBERS(X) \
    X(minor_number) X(architecture) X(brand) X(compute_major) X(compute_minor) X(core_count) \
    X(memory_bus_width) X(pci_device_id) X(pci_subsystem_id) X(memory_total) X(memory_reserved) \
    X(memory_used) X(bar1_total) X(bar1_used) X(gpu_utilization) X(memory_utilization) \
    X(encoder_utilization) X(decoder_utilization) X(jpeg_utilization) X(ofa_utilization) \
    X(utilization_period_us) X(temperature) X(hotspot_temperature) X(memory_temperature) X(power_mw) \
    X(power_average_mw) X(power_limit_mw) X(power_enforced_limit_mw) X(power_min_limit_mw) \
    X(power_max_limit_mw) X(power_default_limit_mw) X(energy_mj) X(performance_state) X(pcie_generation) \
    X(pcie_width) X(pcie_max_generation) X(pcie_max_width) X(pcie_tx_kib_s) X(pcie_rx_kib_s) \
    X(pcie_replays) X(clocks_event_reasons) X(supported_event_reasons) X(ecc_enabled) X(ecc_pending) \
    X(remapped_correctable) X(remapped_uncorrectable) X(remapped_pending) X(remapped_failure) \
    X(retired_pending) X(persistence_mode) X(compute_mode) X(display_mode) X(display_active) \
    X(mig_enabled) X(mig_pending) X(mig_slots) X(nvlink_count) X(nvlink_version) X(gpm_supported)
#define MIG_NUMBERS(X) \
    X(gpu_instance_id) X(compute_instance_id) X(memory_total) X(memory_reserved) X(memory_used) \
    X(bar1_total) X(bar1_used) X(multiprocessors) X(copy_engines) X(decoders) X(encoders) X(jpegs) X(ofas) \
    X(gpu_instance_slices) X(compute_instance_slices)
#define AS_FIELD(name) int64_t name;

struct field {
    uint32_t used, id, any_scope, scope, type, result;
    uint64_t value; /* the bits of nvmlValue_t */
};
struct gpm_value {
    uint32_t used, id;
    double value;
};
struct ring {
    uint64_t written; /* samples ever written: the next one goes to written % SAMPLES */
    struct {
        uint64_t time_us, value;
    } samples[SAMPLES];
};
struct mig {
    uint32_t used, reserved;
    struct text name, uuid;
    MIG_NUMBERS(AS_FIELD)
    struct gpm_value gpm[GPM_VALUES];
};
struct gpu {
    uint32_t used, lost;
    struct text name, uuid, serial, vbios, pci_bus_id;
    GPU_NUMBERS(AS_FIELD)
    int64_t clock[4], max_clock[4], threshold[8], fan_speed[FANS];
    int64_t ecc[2][2][8]; /* error type, counter type, location */
    int64_t nvlink_active[NVLINKS], nvlink_errors[NVLINKS][5];
    struct {
        uint64_t used, cause, address, time_us;
    } retired[RETIRED_PAGES];
    struct field fields[FIELDS];
    struct gpm_value gpm[GPM_VALUES];
    struct ring rings[SAMPLE_KINDS];
    struct mig migs[MIGS];
};

enum presence { ABSENT, PRESENT, AFTER_SIZING, UNTIL_SIZING };
enum kind { COMPUTE = 1, GRAPHICS = 2, MPS = 4 };
struct process {
    _Atomic uint32_t presence;
    int32_t gpu, mig;
    uint32_t pid, kind, gpu_instance, compute_instance;
    uint32_t sm, memory_utilization, encoder, decoder, jpeg, ofa, reserved;
    uint64_t memory, protected_memory, time_us; /* time_us 0: sampled just now, whenever asked */
    struct text name;
};

enum action { FAIL = 1, HIDE = 2, HANG = 3 };
struct rule {
    _Atomic uint32_t action;    /* 0: free; written last, cleared first */
    int32_t function, gpu, mig; /* gpu -1: all; mig -2: all, -1: the GPU's own handle */
    uint32_t result;
    _Atomic int32_t times; /* -1: for good */
    double seconds;
};

struct state {
    uint32_t magic, bytes;
    uint32_t driver_loaded, process_struct_bytes_v3;
    uint64_t driver_generation; /* changes with every unload, which ends the sessions begun before */
    int64_t cuda_version;
    struct text driver_version, nvml_version;
    uint32_t time_calls, rule_count;
    _Atomic uint64_t nanoseconds, hangs;
    _Atomic uint64_t calls[FUNCTIONS][GPUS + 1]; /* the last column: calls about no GPU */
    struct rule rules[RULES];
    struct process processes[PROCESSES];
    struct gpu gpus[GPUS];
};

#endif
