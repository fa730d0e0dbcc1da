/* Streams, events and graphs.
 *
 * The driver runs nothing during a capture. Here the work is done all the same, so that what follows in the program
 * finds sane values; Python keeps what it changes, puts it back when the capture ends, and does the work again at
 * each replay (graphs.py).
 */
#include "softgpu.h"
#include <time.h>

typedef struct Graph {
    long id, nodes;
} Graph;
struct Stream;
typedef struct Capture {
    Graph *graph;
    int mode, invalid, over;
    struct Stream *origin;
    pthread_t thread;
} Capture;
typedef struct Stream {
    int priority;
    Capture *capture;
} Stream;
typedef struct Event {
    double at; /* ms */
    int recorded, timing;
    Capture *capture;
} Event;

#define MAX_CAPTURES 16
static Stream defaults[MAX_DEVICES]; /* the legacy stream of each device */
static Capture *open_captures[MAX_CAPTURES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int thread_mode = cudaStreamCaptureModeGlobal;
static long ids;

static on_wait_t on_wait;
static on_captured_t on_captured;
static on_graph_t on_graph;
void softgpu_on_wait(on_wait_t f) { on_wait = f; }
void softgpu_on_graph(on_captured_t work, on_graph_t event) {
    on_captured = work;
    on_graph = event;
}

static int is_legacy(cudaStream_t s) { return (uintptr_t)s <= 2; } /* 0, cudaStreamLegacy, cudaStreamPerThread */
static Stream *stream_of(cudaStream_t s) { return is_legacy(s) ? &defaults[current] : (Stream *)s; }
static Capture *open_of(Capture *c) { return c && !c->over ? c : NULL; }
static Capture *capture_of(cudaStream_t s) { return open_of(stream_of(s)->capture); }

static cudaError_t invalidate(Capture *c, cudaError_t error) {
    c->invalid = 1;
    count(C_refused, 1);
    return failed(error);
}
cudaError_t check_unsafe(void) {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_CAPTURES; i++) {
        Capture *c = open_captures[i];
        if (!c || c->mode == cudaStreamCaptureModeRelaxed) continue;
        int global = c->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
        if (global || pthread_equal(c->thread, pthread_self()))
            error = invalidate(c, cudaErrorStreamCaptureUnsupported);
    }
    pthread_mutex_unlock(&lock);
    return error;
}
void waits(const char *what) {
    count(C_waits, 1);
    if (on_wait) on_wait(what);
}
void captured(cudaStream_t s, const char *what, void *to, const void *from, size_t n, int value) {
    Capture *c = capture_of(s);
    if (!c) return;
    c->graph->nodes++;
    if (on_captured) on_captured(c->graph->id, what, to, from, n, value);
}
void captured_launch(cudaStream_t s) {
    Capture *c = capture_of(s);
    if (c) c->graph->nodes++;
}
/* For what Python computes on stream `s` of `device`: the graph that it goes into, as one more node; 0 for none. */
long softgpu_capturing(void *s, int device) {
    Capture *c = open_of(is_legacy(s) ? defaults[device].capture : ((Stream *)s)->capture);
    if (!c) return 0;
    c->graph->nodes++;
    return c->graph->id;
}
int softgpu_captures_open(void) {
    for (int i = 0; i < MAX_CAPTURES; i++)
        if (open_captures[i]) return 1;
    return 0;
}

static cudaError_t begin(cudaStream_t s, enum cudaStreamCaptureMode mode, Graph *graph) {
    if (is_legacy(s)) return failed(cudaErrorStreamCaptureUnsupported);
    if (capture_of(s)) return failed(cudaErrorIllegalState);
    Capture *c = calloc(1, sizeof *c);
    c->graph = graph ? graph : calloc(1, sizeof *graph);
    if (!graph) c->graph->id = __atomic_add_fetch(&ids, 1, __ATOMIC_RELAXED);
    c->mode = mode;
    c->origin = stream_of(s);
    c->thread = pthread_self();
    int room = 0;
    pthread_mutex_lock(&lock);
    while (room < MAX_CAPTURES && open_captures[room]) room++;
    if (room < MAX_CAPTURES) open_captures[room] = c;
    pthread_mutex_unlock(&lock);
    if (room == MAX_CAPTURES) return failed(cudaErrorNotSupported);
    stream_of(s)->capture = c;
    count(C_captures, 1);
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) { return begin(s, mode, NULL); }
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t s, cudaGraph_t g, const cudaGraphNode_t *d,
                                          const cudaGraphEdgeData *e, size_t n, enum cudaStreamCaptureMode mode) {
    return begin(s, mode, (Graph *)g);
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
    Capture *c = capture_of(s);
    *g = NULL;
    if (!c || c->origin != stream_of(s)) return failed(cudaErrorIllegalState);
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_CAPTURES; i++)
        if (open_captures[i] == c) open_captures[i] = NULL;
    pthread_mutex_unlock(&lock);
    c->over = 1; /* not freed: streams and events that joined still point to it */
    stream_of(s)->capture = NULL;
    if (on_graph) on_graph(c->graph->id, CAPTURE_ENDED);
    if (c->invalid) {
        if (on_graph) on_graph(c->graph->id, GRAPH_DESTROYED);
        return failed(cudaErrorStreamCaptureInvalidated);
    }
    *g = (cudaGraph_t)c->graph;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    Capture *c = capture_of(s);
    *status = !c           ? cudaStreamCaptureStatusNone
              : c->invalid ? cudaStreamCaptureStatusInvalidated
                           : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *g, const cudaGraphNode_t **d, const cudaGraphEdgeData **e,
                                     size_t *n) {
    Capture *c = capture_of(s);
    if (c && id) *id = c->graph->id;
    if (c && g) *g = (cudaGraph_t)c->graph;
    if (d) *d = NULL;
    if (e) *e = NULL;
    if (n) *n = 0;
    return cudaStreamIsCapturing(s, status);
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t s, cudaGraphNode_t *d, const cudaGraphEdgeData *e,
                                                size_t n, unsigned flags) {
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    int before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long flags) {
    Graph *copy = malloc(sizeof *copy);
    *copy = *(Graph *)g;
    *x = (cudaGraphExec_t)copy;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *x, cudaGraph_t g, unsigned long long flags) {
    return cudaGraphInstantiate(x, g, flags);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t x, cudaStream_t s) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
    count(C_graph_launches, 1);
    if (on_graph && !on_graph(((Graph *)x)->id, GRAPH_LAUNCHED)) return failed(cudaErrorLaunchFailure);
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t g) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t x) {
    if (on_graph) on_graph(((Graph *)x)->id, GRAPH_DESTROYED);
    free(x);
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n) {
    if (!nodes) *n = ((Graph *)g)->nodes;
    return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t a, cudaGraphNode_t *b, cudaGraphEdgeData *c, size_t *n) {
    *n = 0;
    return cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t *o, void *p, cudaHostFn_t f, unsigned references, unsigned flags) {
    *o = (cudaUserObject_t)8;
    return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t o, unsigned n) { return cudaSuccess; }
cudaError_t cudaGraphRetainUserObject(cudaGraph_t g, cudaUserObject_t o, unsigned n, unsigned flags) {
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    Stream *made = calloc(1, sizeof *made);
    made->priority = priority;
    *s = (cudaStream_t)made;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) {
    return cudaStreamCreateWithPriority(s, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaSuccess; } /* events may still point to it */
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) {
    *priority = stream_of(s)->priority;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
    Capture *c = capture_of(s);
    return c ? invalidate(c, cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    Capture *c = capture_of(s);
    if (c) return invalidate(c, cudaErrorStreamCaptureUnsupported);
    waits("cudaStreamSynchronize");
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAX_CAPTURES; i++)
        if (open_captures[i]) error = invalidate(open_captures[i], cudaErrorStreamCaptureUnsupported);
    pthread_mutex_unlock(&lock);
    if (!error) waits("cudaDeviceSynchronize");
    return error;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
    Capture *c = open_of(((Event *)e)->capture);
    if (c && !capture_of(s)) stream_of(s)->capture = c; /* joins the capture */
    return cudaSuccess;
}
/* Host work within a stream: left out of captures, as nothing here needs it in a graph. */
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *data) {
    if (!capture_of(s)) f(data);
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void *data, unsigned flags) {
    Capture *c = capture_of(s);
    if (c) return invalidate(c, cudaErrorStreamCaptureUnsupported);
    f(s, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    Event *made = calloc(1, sizeof *made);
    made->timing = !(flags & cudaEventDisableTiming);
    *e = (cudaEvent_t)made;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t e) {
    free(e);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    Event *event = (Event *)e;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    count(C_events, 1);
    event->at = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    event->recorded = 1;
    event->capture = capture_of(s);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) { return cudaEventRecord(e, s); }
cudaError_t cudaEventQuery(cudaEvent_t e) {
    cudaError_t error = check_unsafe();
    if (!error && open_of(((Event *)e)->capture)) error = failed(cudaErrorCapturedEvent);
    return error;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    cudaError_t error = cudaEventQuery(e);
    if (!error) waits("cudaEventSynchronize");
    return error;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
    Event *from = (Event *)a, *to = (Event *)b;
    if (!from->recorded || !to->recorded || !from->timing || !to->timing)
        return failed(cudaErrorInvalidResourceHandle);
    *ms = to->at - from->at;
    return cudaSuccess;
}
