/* Readings that differ: where FAKE_NVML_READINGS names a file (see readings.py), every answer about a
 * video clock is a number of its own, counted over all processes, and the file says who asked, and when. */
#ifndef FAKE_NVML_READINGS_H
#define FAKE_NVML_READINGS_H

#include "call.h"

struct reading {
    _Atomic uint32_t pid; /* written last: 0 while the rest is not there */
    int32_t gpu;
    int64_t real_ns, monotonic_ns; /* by the clocks of the process that asked */
};
struct readings {
    uint32_t magic, room;
    _Atomic uint64_t count; /* the number given last: the first reading is number 1 */
    struct reading list[];
};
static struct readings *readings;

__attribute__((constructor)) static void map_readings(void) {
    const char *path = getenv("FAKE_NVML_READINGS");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    struct stat status;
    void *memory = MAP_FAILED;
    if (!fstat(file, &status) && status.st_size >= (off_t)sizeof(struct readings))
        memory = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory != MAP_FAILED) readings = memory;
}

/* Through the memory, not by write(): neither a full disk nor a limit of the process can keep an entry out. */
static void number_reading(int gpu, uint *out) {
    if (!readings || readings->magic != MAGIC) return;
    uint64_t number = atomic_fetch_add(&readings->count, 1) + 1;
    if (number > readings->room) return;
    struct reading *reading = &readings->list[number - 1];
    reading->gpu = gpu;
    reading->real_ns = nanoseconds(CLOCK_REALTIME);
    reading->monotonic_ns = nanoseconds(CLOCK_MONOTONIC);
    reading->pid = (uint32_t)getpid();
    *out = (uint)number;
}

#endif
