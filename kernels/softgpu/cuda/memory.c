/* Allocation, pointers, copies. */
#include "softgpu.h"

enum { PINNED = -1, UNKNOWN = -2 }; /* in place of a device */
typedef struct Block {
    char *at;
    size_t size;
    int device;
} Block;
static Block *blocks;
static int block_count, block_room;
static size_t used[MAX_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Block *find(const void *p) { /* with the lock held */
    for (int i = block_count; i--;)
        if ((char *)p >= blocks[i].at && (char *)p < blocks[i].at + blocks[i].size) return &blocks[i];
    return NULL;
}
static int owner(const void *p) {
    pthread_mutex_lock(&lock);
    Block *b = find(p);
    int device = b ? b->device : UNKNOWN;
    pthread_mutex_unlock(&lock);
    return device;
}
static void enter(void *p, size_t n, int device) {
    pthread_mutex_lock(&lock);
    if (block_count == block_room) {
        block_room = 2 * block_room + 64;
        blocks = realloc(blocks, block_room * sizeof *blocks);
    }
    blocks[block_count++] = (Block){p, n, device};
    if (device >= 0) used[device] += n;
    pthread_mutex_unlock(&lock);
}
static int leave(void *p) {
    pthread_mutex_lock(&lock);
    Block *b = find(p);
    int ours = b && b->at == p;
    if (ours) {
        if (b->device >= 0) used[b->device] -= b->size;
        *b = blocks[--block_count];
    }
    pthread_mutex_unlock(&lock);
    return ours;
}

cudaError_t cudaMalloc(void **p, size_t n) {
    *p = NULL;
    cudaError_t error = check_unsafe();
    if (error) return error;
    count(C_mallocs, 1);
    if (!n) return cudaSuccess;
    if (used[current] + n > memory_bytes || posix_memalign(p, 512, n)) return failed(cudaErrorMemoryAllocation);
    memset(*p, 0xff, n); /* NaN in every floating type: what nobody wrote shows */
    enter(*p, n, current);
    return cudaSuccess;
}
cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    cudaError_t error = check_unsafe();
    if (error) return error;
    count(C_frees, 1);
    if (!leave(p)) return failed(cudaErrorInvalidValue);
    free(p);
    return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) { return cudaMalloc(p, n); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) {
    cudaError_t error = check_unsafe();
    if (error) return error;
    if (!n) n = 1;
    count(C_host_allocs, 1);
    if (posix_memalign(p, 4096, n)) return failed(cudaErrorMemoryAllocation);
    enter(*p, n, PINNED);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **p, size_t n) { return cudaHostAlloc(p, n, 0); }
cudaError_t cudaFreeHost(void *p) {
    if (!p) return cudaSuccess;
    if (!leave(p)) return failed(cudaErrorInvalidValue);
    free(p);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *p, size_t n, unsigned flags) {
    enter(p, n, PINNED);
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *p) {
    return leave(p) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaHostGetDevicePointer(void **d, void *h, unsigned flags) {
    *d = h;
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *total) {
    *total = memory_bytes;
    *left = memory_bytes - used[current];
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    int device = owner(p);
    memset(a, 0, sizeof *a);
    a->type = device >= 0        ? cudaMemoryTypeDevice
              : device == PINNED ? cudaMemoryTypeHost
                                 : cudaMemoryTypeUnregistered;
    a->device = device >= 0 ? device : current;
    a->devicePointer = device == UNKNOWN ? NULL : (void *)p;
    a->hostPointer = device == PINNED ? (void *)p : NULL;
    return cudaSuccess;
}
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) {
    if (owner((void *)p) == UNKNOWN) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)v = p;
    return CUDA_SUCCESS;
}

/* Counts a copy by where its ends really are. The host waits for a copy into memory that is not pinned. */
static cudaError_t copy(void *d, const void *s, size_t n, cudaStream_t stream) {
    if (!n) return cudaSuccess;
    int to = owner(d), from = owner(s);
    if (to >= 0 && from >= 0) {
        count(to == from ? C_d2d : C_peer, 1);
    } else if (to >= 0) {
        count(C_h2d, 1);
        count(C_h2d_bytes, n);
    } else if (from >= 0) {
        count(C_d2h, 1);
        count(C_d2h_bytes, n);
    }
    if ((to >= 0 && from == UNKNOWN) || (from >= 0 && to == UNKNOWN)) count(C_pageable, 1);
    if (from >= 0 && to == UNKNOWN) waits("copy into pageable memory");
    captured(stream, "copy", d, s, n, 0);
    memmove(d, s, n);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(d, s, n, stream);
}
cudaError_t cudaMemcpyPeerAsync(void *d, int to, const void *s, int from, size_t n, cudaStream_t stream) {
    return copy(d, s, n, stream);
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind kind) {
    cudaError_t error = check_unsafe();
    if (error) return error;
    waits("cudaMemcpy");
    return copy(d, s, n, 0);
}
cudaError_t cudaMemsetAsync(void *d, int value, size_t n, cudaStream_t stream) {
    count(C_memsets, 1);
    captured(stream, "memset", d, NULL, n, value);
    memset(d, value, n);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *d, int value, size_t n) {
    cudaError_t error = check_unsafe();
    return error ? error : cudaMemsetAsync(d, value, n, 0);
}
