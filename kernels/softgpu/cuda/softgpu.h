/* A CUDA runtime and driver without a GPU: device memory is host memory, and no kernel runs.
 *
 * Loaded with RTLD_GLOBAL before torch, the library's symbols take the place of libcudart's; under the name
 * libcuda.so.1 it is Triton's driver too. All work is done when the call returns, in the order of the calls: streams
 * and events order nothing. Kept as on a device: the current device belongs to a thread, memory has an owner and a
 * limit, host memory is pinned or not, and a stream under capture refuses what the driver refuses.
 *
 *   device.c   settings, counters, errors, devices and their properties
 *   capture.c  streams, events, graphs
 *   memory.c   allocation, pointers, copies
 *   kernels.c  launches, and the driver's interface
 */
#ifndef SOFTGPU_H
#define SOFTGPU_H
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Called from Python by name. */
typedef void (*on_wait_t)(const char *what);
typedef void (*on_captured_t)(long graph, const char *what, void *to, const void *from, size_t n, int value);
typedef int (*on_graph_t)(long graph, int what); /* 0: it failed */
enum { GRAPH_LAUNCHED, GRAPH_DESTROYED, CAPTURE_ENDED };

/* What the files share stays inside the library: its names must not reach torch's. */
#pragma GCC visibility push(hidden)

#define COUNTERS(X)                                                                                                  \
    X(kernels) X(triton) X(h2d) X(d2h) X(d2d) X(peer) X(h2d_bytes) X(d2h_bytes) X(pageable) X(memsets) X(waits)      \
    X(events) X(mallocs) X(frees) X(host_allocs) X(graph_launches) X(captures) X(refused) X(profiles)
enum {
#define X(name) C_##name,
    COUNTERS(X)
#undef X
    COUNTER_COUNT
};
void count(int which, long n);

#define MAX_DEVICES 64
extern int device_count, capability;
extern size_t memory_bytes;
extern __thread int current; /* this thread's device */
cudaError_t failed(cudaError_t error); /* remembers `error` for cudaGetLastError, and returns it */

/* The host waits for the device: counted, and told to Python. */
void waits(const char *what);
/* For a call that may wait, but not for one stream: refused while a capture forbids it. */
cudaError_t check_unsafe(void);
/* The graph that the stream is captured into is given one more node; nothing happens outside a capture. */
void captured(cudaStream_t stream, const char *what, void *to, const void *from, size_t n, int value);
void captured_launch(cudaStream_t stream);

#pragma GCC visibility pop
#endif
