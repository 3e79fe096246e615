/* How every function begins: the mapped state, the session, the handle, the faults that a test asked for. */
#ifndef FAKE_NVML_CALL_H
#define FAKE_NVML_CALL_H

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "state.h"

/* ---- Attaching ------------------------------------------------------------------------------- */

static struct state *_Atomic attached;
static _Atomic uint in_flight;
static pthread_mutex_t session_lock = PTHREAD_MUTEX_INITIALIZER;
static uint session_count;
static _Atomic uint64_t session_generation; /* 0: no session in this process */

static struct state *map_state(const char *path) {
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return NULL;
    struct stat status;
    void *memory = MAP_FAILED;
    if (!fstat(file, &status) && status.st_size == (off_t)sizeof(struct state))
        memory = mmap(NULL, sizeof(struct state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return NULL;
    struct state *state = memory;
    if (state->magic == MAGIC && state->bytes == sizeof *state) return state;
    munmap(memory, sizeof *state);
    return NULL;
}

/* Point this process at another state file (NULL: at none) and end its session. 1: mapped. */
int fake_nvml_attach(const char *path) {
    struct state *fresh = map_state(path);
    pthread_mutex_lock(&session_lock);
    struct state *old = atomic_exchange(&attached, fresh);
    session_count = 0;
    session_generation = 0;
    pthread_mutex_unlock(&session_lock);
    /* A thread may still be inside a call, perhaps one that hangs: then its mapping stays. */
    for (int i = 0; old && i < 100 && in_flight; i++) usleep(1000);
    if (old && !in_flight) munmap(old, sizeof *old);
    return fresh != NULL;
}

__attribute__((constructor)) static void attach_at_load(void) {
    attached = map_state(getenv("FAKE_NVML_STATE"));
}

size_t fake_nvml_state_size(void) { return sizeof(struct state); }

/* ---- The prologue of every function ---------------------------------------------------------- */

/* Each function leaves an entry in this linker section; its place there is the function's number. */
struct entry {
    const char *name;
};
#define ENTRY(function) \
    static struct entry entry __attribute__((section("fake_nvml_entries"), used)) = {#function}
#pragma GCC visibility push(hidden)
extern struct entry __start_fake_nvml_entries[], __stop_fake_nvml_entries[];
#pragma GCC visibility pop

const char *fake_nvml_function_name(int number) {
    struct entry *entry = __start_fake_nvml_entries + number;
    return number >= 0 && entry < __stop_fake_nvml_entries && number < FUNCTIONS ? entry->name : NULL;
}

/* A handle is an address in here: [gpu][0] the GPU itself, [gpu][1 + slot] a MIG device. */
static char handles[GPUS][MIGS + 1];
static nvmlDevice_t handle_of(int gpu, int mig) { return (nvmlDevice_t)(void *)&handles[gpu][mig + 1]; }

enum scope {
    LIBRARY,    /* answers without a session, as the guide's "System Queries" do for versions */
    SYSTEM,     /* needs a session */
    GPU_ONLY,   /* about a GPU; NVML_ERROR_NOT_SUPPORTED on a MIG device handle */
    GPU_OR_MIG, /* about a GPU or one of its MIG devices */
};

struct call {
    struct state *state;
    struct gpu *gpu;
    struct mig *mig;
    int gpu_slot, mig_slot;
    int64_t started;
};

static int64_t nanoseconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}
static uint64_t now_us(void) { return (uint64_t)(nanoseconds(CLOCK_REALTIME) / 1000); }

/* An unused number, and a slot that nobody uses, never answer. */
static int locate(struct call *call, nvmlDevice_t handle) {
    uintptr_t offset = (uintptr_t)handle - (uintptr_t)handles;
    if (offset >= sizeof handles) return 0;
    call->gpu_slot = (int)(offset / (MIGS + 1));
    call->mig_slot = (int)(offset % (MIGS + 1)) - 1;
    struct gpu *gpu = &call->state->gpus[call->gpu_slot];
    if (!gpu->used) return 0;
    call->gpu = gpu;
    if (call->mig_slot < 0) return 1;
    call->mig = &gpu->migs[call->mig_slot];
    return call->mig->used && gpu->mig_enabled == 1;
}

static void hang(struct state *state, struct rule *rule) {
    state->hangs++; /* counted once it hangs: who waits for that need not wait for a time */
    int64_t until = nanoseconds(CLOCK_MONOTONIC) + (int64_t)(rule->seconds * 1e9);
    /* In slices, so that recover() frees a hanging thread at once. */
    while (rule->action == HANG && nanoseconds(CLOCK_MONOTONIC) < until) usleep(2000);
}

static nvmlReturn_t apply_rules(struct call *call, int function) {
    nvmlReturn_t result = NVML_SUCCESS;
    for (uint i = 0; i < call->state->rule_count && i < RULES; i++) {
        struct rule *rule = &call->state->rules[i];
        uint action = rule->action;
        if (!action || rule->function != function || (rule->gpu >= 0 && rule->gpu != call->gpu_slot) ||
            (rule->mig >= -1 && rule->mig != call->mig_slot))
            continue;
        int times = rule->times;
        while (times > 0 && !atomic_compare_exchange_weak(&rule->times, &times, times - 1)) {}
        if (times == 0) continue;
        if (action == HANG) hang(call->state, rule);
        if (action == HIDE) return NVML_ERROR_FUNCTION_NOT_FOUND;
        if (action == FAIL && !result) result = rule->result;
    }
    return result;
}

static struct call begin(void) {
    in_flight++; /* before the state is read: see fake_nvml_attach */
    return (struct call){.state = attached, .gpu_slot = -1, .mig_slot = -1};
}

static nvmlReturn_t enter(struct call *call, struct entry *entry, enum scope scope, nvmlDevice_t handle) {
    struct state *state = call->state;
    if (!state) return scope == LIBRARY ? NVML_ERROR_DRIVER_NOT_LOADED : NVML_ERROR_UNINITIALIZED;
    if (state->time_calls) call->started = nanoseconds(CLOCK_MONOTONIC);
    int known = handle ? locate(call, handle) : 0;
    int function = (int)(entry - __start_fake_nvml_entries);
    if (function < FUNCTIONS) state->calls[function][call->gpu_slot < 0 ? GPUS : call->gpu_slot]++;
    nvmlReturn_t forced = state->rule_count ? apply_rules(call, function) : NVML_SUCCESS;
    if (forced) return forced;
    if (scope == LIBRARY) return NVML_SUCCESS;
    if (!session_generation) return NVML_ERROR_UNINITIALIZED;
    if (!state->driver_loaded) return NVML_ERROR_DRIVER_NOT_LOADED;
    if (session_generation != state->driver_generation) return NVML_ERROR_UNINITIALIZED;
    if (scope >= GPU_ONLY && !known) return NVML_ERROR_INVALID_ARGUMENT;
    if (call->gpu && call->gpu->lost) return NVML_ERROR_GPU_IS_LOST;
    if (scope == GPU_ONLY && call->mig) return NVML_ERROR_NOT_SUPPORTED;
    return NVML_SUCCESS;
}

static void leave(struct call *call) {
    if (call->started) call->state->nanoseconds += (uint64_t)(nanoseconds(CLOCK_MONOTONIC) - call->started);
    in_flight--;
}

/* `handle` is worked out after begin(), so that it may look things up in call.state. */
#define ENTER(function, scope, handle) \
    ENTRY(function); \
    __attribute__((cleanup(leave))) struct call call = begin(); \
    nvmlReturn_t entered = enter(&call, &entry, scope, handle); \
    if (entered) return entered; \
    struct state *state = call.state; \
    struct gpu *gpu = call.gpu; \
    struct mig *mig = call.mig; \
    (void)state, (void)gpu, (void)mig
#define REQUIRE(condition) \
    if (!(condition)) return NVML_ERROR_INVALID_ARGUMENT
#define SUPPORTED(condition) \
    if (!(condition)) return NVML_ERROR_NOT_SUPPORTED
#define HAS(number) SUPPORTED((number) != UNSUPPORTED)
#define VERSIONED(version, structure, number) \
    if ((version) != (sizeof(structure) | ((uint)(number) << 24))) return NVML_ERROR_ARGUMENT_VERSION_MISMATCH

/* A function that gives one number. */
#define NUMBER(function, type, field) \
    nvmlReturn_t function(nvmlDevice_t device, type *out) { \
        ENTER(function, GPU_ONLY, device); \
        REQUIRE(out); \
        HAS(gpu->field); \
        *out = (type)gpu->field; \
        return NVML_SUCCESS; \
    }
/* A function that gives two numbers. */
#define NUMBERS(function, type, first, second) \
    nvmlReturn_t function(nvmlDevice_t device, type *one, type *two) { \
        ENTER(function, GPU_ONLY, device); \
        REQUIRE(one && two); \
        HAS(gpu->first); \
        HAS(gpu->second); \
        *one = (type)gpu->first; \
        *two = (type)gpu->second; \
        return NVML_SUCCESS; \
    }
/* A function that gives the element `index` of a list. */
#define ELEMENT(function, type, list) \
    nvmlReturn_t function(nvmlDevice_t device, uint index, type *out) { \
        ENTER(function, GPU_ONLY, device); \
        REQUIRE(out && index < sizeof gpu->list / sizeof *gpu->list); \
        HAS(gpu->list[index]); \
        *out = (type)gpu->list[index]; \
        return NVML_SUCCESS; \
    }

static nvmlReturn_t give_text(const struct text *text, char *out, uint length) {
    REQUIRE(out);
    SUPPORTED(text->form != TEXT_ABSENT);
    uint bytes = text->length < sizeof text->bytes ? text->length : sizeof text->bytes;
    if (text->form == TEXT_UNTERMINATED) { /* a misbehaving driver: the whole buffer, and no NUL */
        for (uint i = 0; i < length && bytes; i++) out[i] = text->bytes[i % bytes];
        return NVML_SUCCESS;
    }
    if (bytes >= length) return NVML_ERROR_INSUFFICIENT_SIZE;
    memcpy(out, text->bytes, bytes);
    out[bytes] = 0;
    return NVML_SUCCESS;
}
static int text_is(const struct text *text, const char *other) {
    if (text->form == TEXT_ABSENT || strlen(other) != text->length) return 0;
    return !memcmp(text->bytes, other, text->length);
}
#define TEXT(function, field) \
    nvmlReturn_t function(nvmlDevice_t device, char *out, uint length) { \
        ENTER(function, GPU_ONLY, device); \
        return give_text(&gpu->field, out, length); \
    }

#endif
