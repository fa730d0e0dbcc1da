/* Launches, which are counted, and the driver's interface as far as torch and Triton need it. */
#include "softgpu.h"
#include <dlfcn.h>

static int refuse_kernels;
/* From here on a launch of one of torch's own kernels, which nothing runs, is an error. */
void softgpu_refuse_kernels(int yes) { refuse_kernels = yes; }

static cudaError_t launch(cudaStream_t s) {
    count(C_kernels, 1);
    if (refuse_kernels) return failed(cudaErrorNoKernelImageForDevice);
    captured_launch(s);
    return cudaSuccess;
}
/* For an operator of cuBLAS or cuDNN that Python leaves out: it would be one launch at least. */
void softgpu_count_kernel(void *s) { launch((cudaStream_t)s); }
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return launch(s); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) { return launch(c->stream); }
cudaError_t __cudaLaunchKernel(void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return launch(s); }
cudaError_t __cudaLaunchKernel_ptsz(void *f, dim3 g, dim3 b, void **a, size_t n, cudaStream_t s) { return launch(s); }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute a, int v) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int block, size_t shared,
                                                                   unsigned flags) {
    *n = 8;
    return cudaSuccess;
}
cudaError_t cudaProfilerStart(void) {
    count(C_profiles, 1);
    return cudaSuccess;
}
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *f = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *v) { return (CUresult)cudaDriverGetVersion(v); }
CUresult cuDeviceGetCount(int *n) { return (CUresult)cudaGetDeviceCount(n); }
CUresult cuDeviceGet(CUdevice *d, int n) {
    *d = n;
    return n < device_count ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetName(char *name, int n, CUdevice d) {
    strncpy(name, "softgpu (no GPU)", n);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { /* the runtime's numbers are the driver's */
    return (CUresult)cudaDeviceGetAttribute(v, (enum cudaDeviceAttr)a, d);
}
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { /* a context is its device's number, from 1 */
    *c = (CUcontext)(uintptr_t)(d + 1);
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *c) { return cuDevicePrimaryCtxRetain(c, current); }
CUresult cuCtxSetCurrent(CUcontext c) {
    if (c) current = (int)(uintptr_t)c - 1;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice *d) {
    *d = current;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *v, CUlimit l) {
    *v = 1024;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult e, const char **text) {
    *text = "softgpu refused this";
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult e, const char **text) {
    *text = "CUDA_ERROR";
    return CUDA_SUCCESS;
}
/* Left out on purpose: cuModuleLoad, by which Inductor's launcher would start kernels that nothing executes. */
CUresult cuModuleLoadData(CUmodule *m, const void *image) {
    *m = (CUmodule)1;
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule m) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
    *f = (CUfunction)1;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
    *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
    *n = 1;
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream s) { return (CUresult)cudaStreamSynchronize((cudaStream_t)s); }

static CUresult driver_launch(CUstream s) {
    count(C_triton, 1);
    captured_launch((cudaStream_t)s);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **extra) {
    return driver_launch(c->hStream);
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **p, void **extra) {
    return driver_launch(s);
}
