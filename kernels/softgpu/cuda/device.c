/* Settings, counters, errors, devices and their properties. */
#include "softgpu.h"
#include <stdio.h>

static const char *counter_names[] = {
#define X(name) #name,
    COUNTERS(X)
#undef X
};
static long counters[COUNTER_COUNT];
void count(int which, long n) { __atomic_fetch_add(&counters[which], n, __ATOMIC_RELAXED); }
int softgpu_counters(const char **names, long *values) {
    for (int i = 0; i < COUNTER_COUNT; i++) {
        names[i] = counter_names[i];
        values[i] = counters[i];
    }
    return COUNTER_COUNT;
}

int device_count = 1, capability = 80;
size_t memory_bytes = (size_t)80 << 30;
void softgpu_configure(int devices, int compute_capability, size_t bytes) {
    device_count = devices;
    capability = compute_capability;
    memory_bytes = bytes;
}

static __thread cudaError_t last;
cudaError_t failed(cudaError_t error) { return last = error; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last; }

__thread int current;
static cudaError_t check_device(int d) {
    return d >= 0 && d < device_count ? cudaSuccess : failed(cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceCount(int *n) {
    *n = device_count;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *d) {
    *d = current;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) {
    cudaError_t error = check_device(d);
    if (!error) current = d;
    return error;
}
cudaError_t cudaInitDevice(int d, unsigned device_flags, unsigned flags) { return check_device(d); }
cudaError_t cudaDriverGetVersion(int *v) {
    *v = 13000;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *v) { return cudaDriverGetVersion(v); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *yes, int a, int b) {
    *yes = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int n, int d) {
    snprintf(id, n, "0000:%02x:00.0", d + 1);
    return cudaSuccess;
}

/* Bytes that a block may take, by compute capability: CUDA C++ Programming Guide, table of technical specifications. */
static int shared_memory(void) {
    if (capability >= 90 && capability < 120) return 232448;
    return capability == 80 || capability == 87 ? 166912 : 101376;
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
    switch ((int)a) {
    case cudaDevAttrComputeCapabilityMajor: *v = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *v = capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *v = 108; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = shared_memory(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *v = shared_memory() + 1024; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *v = 65536; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    default: *v = 1;
    }
    return check_device(d);
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "softgpu (no GPU)");
    p->totalGlobalMem = memory_bytes;
    p->major = capability / 10;
    p->minor = capability % 10;
    p->multiProcessorCount = 108;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->warpSize = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = shared_memory();
    p->sharedMemPerMultiprocessor = shared_memory() + 1024;
    p->l2CacheSize = 40 << 20;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxBlocksPerMultiProcessor = 32;
    p->unifiedAddressing = 1;
    p->pciBusID = d + 1;
    return check_device(d);
}
