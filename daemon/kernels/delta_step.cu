// One decoded token of each sequence through a gated delta net layer, from projections to the gated
// norm, in one launch: convolution, SiLU, l2 norms, gates, recurrence, RMS norm, SiLU(z).
//
// Per value head, with state M [128 k][128 v], k and q of length one, q scaled by 1/sqrt(128):
//     d = beta (v - e^g M'k);  M <- e^g M + k d';  o = e^g M'q + d (k.q)        (M before the step)
// which reads M once. Blocks: SPLITS per head, a cluster, each with HEAD_DIM / SPLITS columns of M
// in registers; the blocks of a head exchange the sum of squares for the norm.
//
// Bound: bytes. 128 KiB a head and token (state read and written); 6.3 MB a layer for 48 heads.
// Row invariance: nothing crosses sequences; all sums have one order.
#include "delta_math.cuh"
#include "warp.cuh"

#ifndef SPLITS
#define SPLITS 4
#endif
#ifndef ROWS_PER_THREAD
#define ROWS_PER_THREAD 8
#endif

constexpr int COLUMNS = HEAD_DIM / SPLITS;           // of the state, in this block
constexpr int COLUMN_GROUPS = COLUMNS / 4;           // threads side by side
constexpr int ROW_GROUPS = HEAD_DIM / ROWS_PER_THREAD;
constexpr int THREADS = COLUMN_GROUPS * ROW_GROUPS;
constexpr int WARPS = THREADS / 32;
constexpr int CHANNELS = 2 * HEAD_DIM + COLUMNS;  // q, k, and this block's part of v
constexpr int CHANNELS_PER_THREAD = (CHANNELS + THREADS - 1) / THREADS;
static_assert(COLUMN_GROUPS <= 32 && THREADS % 32 == 0 && THREADS <= 1024, "block shape");

struct StepSizes {
    int k_heads, v_heads;
};

// Where the block's c-th channel lies in a projected row (q heads, k heads, v heads).
__device__ __forceinline__ int channel_index(StepSizes sizes, int head, int split, int c) {
    const int k_head = head % sizes.k_heads;
    if (c < HEAD_DIM) return k_head * HEAD_DIM + c;
    if (c < 2 * HEAD_DIM) return (sizes.k_heads + k_head) * HEAD_DIM + c - HEAD_DIM;
    return (2 * sizes.k_heads + head) * HEAD_DIM + split * COLUMNS + c - 2 * HEAD_DIM;
}

#if SPLITS > 1
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Puts `value` into `slot` of block `rank` of this cluster.
__device__ __forceinline__ void store_to_block(float* slot, unsigned rank, float value) {
    unsigned remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(remote)
        : "r"(shared_address(slot)), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}
#endif

// Sum of a head's squares over the blocks of its cluster; every thread gets it.
__device__ __forceinline__ float sum_over_splits(float* parts, float own, int split) {
#if SPLITS > 1
    cluster_wait();  // every block of the cluster runs, so its shared memory may be written
    if (threadIdx.x < SPLITS) store_to_block(parts + split, threadIdx.x, own);
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    float total = parts[0];
#pragma unroll
    for (int i = 1; i < SPLITS; ++i) total += parts[i];
    return total;
#else
    return own;
#endif
}

__device__ __forceinline__ float4 fused_scale_add(float4 a, float s, float4 b, float t) {
    return make_float4(fmaf(a.x, s, b.x * t), fmaf(a.y, s, b.y * t), fmaf(a.z, s, b.z * t),
                       fmaf(a.w, s, b.w * t));
}

__device__ __forceinline__ void accumulate(float4& sum, float4 a, float s) {
    sum.x = fmaf(a.x, s, sum.x);
    sum.y = fmaf(a.y, s, sum.y);
    sum.z = fmaf(a.z, s, sum.z);
    sum.w = fmaf(a.w, s, sum.w);
}

__device__ __forceinline__ float4 sum_over_lanes(float4 x) {
#pragma unroll
    for (int offset = 16; offset >= COLUMN_GROUPS; offset >>= 1) {
        x.x += __shfl_xor_sync(0xffffffffu, x.x, offset);
        x.y += __shfl_xor_sync(0xffffffffu, x.y, offset);
        x.z += __shfl_xor_sync(0xffffffffu, x.z, offset);
        x.w += __shfl_xor_sync(0xffffffffu, x.w, offset);
    }
    return x;
}

// Grid (SPLITS, v_heads, sequences), cluster (SPLITS, 1, 1). `slots` and `positions` must have been
// written at least two launches before; a sequence with slot -1 is padding and is left out.
extern "C" __global__ void __launch_bounds__(THREADS) delta_step(
    const Activation* qkv,   // [sequences, qkv_stride]: q heads, k heads, v heads
    const Activation* z,     // [sequences, z_stride]: v heads
    const Gate* gates,       // [sequences, gates_stride]: beta per v head, alpha per v head
    const float4* taps,      // [conv_dim] of 4 taps, oldest first
    const float* rates,      // [v_heads]: -exp(A_log)
    const float* dt_bias,    // [v_heads]
    const float* norm,       // [HEAD_DIM]
    float* rules,            // [slots, rule_stride]: this layer's [v_heads, 128 k, 128 v]
    Activation* rings,       // [slots, ring_stride]: this layer's [CONV_RING, conv_dim]
    const int* slots,        // [sequences]
    const int* captures,     // [sequences]: slot that gets a copy of the new state, or -1
    const int* positions,    // [sequences]: of the token
    Output* out,             // [sequences, v_heads * 128]
    int qkv_stride, int z_stride, int gates_stride, long long rule_stride, long long ring_stride,
    int k_heads, int v_heads, float norm_eps) {
    __shared__ __align__(16) float channels[CHANNELS];
    __shared__ float4 partials[2][WARPS][COLUMN_GROUPS];
    __shared__ float squares[SPLITS];
    const StepSizes sizes{k_heads, v_heads};
    const int split = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int column = thread % COLUMN_GROUPS * 4, row = thread / COLUMN_GROUPS;
    const int slot = slots[sequence];
    if (slot < 0) return;
#if SPLITS > 1
    cluster_arrive();
#endif
    const int conv_dim = (2 * k_heads + v_heads) * HEAD_DIM;
    const int newest = positions[sequence] % CONV_RING;
    const long long head_offset =
        static_cast<long long>(head) * HEAD_DIM * HEAD_DIM + split * COLUMNS + column;
    float* rule = rules + slot * rule_stride + head_offset;
    Activation* ring = rings + slot * ring_stride;

    // Before the wait: what earlier kernels of this step do not write.
    float4 state[ROWS_PER_THREAD];
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i)
        state[i] = *reinterpret_cast<const float4*>(rule + (i * ROW_GROUPS + row) * HEAD_DIM);
    float4 tap[CHANNELS_PER_THREAD];
    Activation past[CHANNELS_PER_THREAD][CONV_WIDTH - 1];
#pragma unroll
    for (int i = 0; i < CHANNELS_PER_THREAD; ++i) {
        const int c = thread + i * THREADS;
        if (c >= CHANNELS) break;
        const int at = channel_index(sizes, head, split, c);
        tap[i] = taps[at];
#pragma unroll
        for (int j = 0; j < CONV_WIDTH - 1; ++j)
            past[i][j] = ring[(newest + 1 + j) % CONV_RING * conv_dim + at];
    }
    const float rate = rates[head], bias = dt_bias[head];
    const float4 weight = *reinterpret_cast<const float4*>(norm + split * COLUMNS + column);
    const int capture = captures[sequence];

    wait_for_previous_kernel();
    allow_next_kernel();
    const Gate* gate = gates + static_cast<long long>(sequence) * gates_stride;
    const float beta_in = to_float(gate[head]), alpha = to_float(gate[v_heads + head]);
    const Activation4 z4 = load4(z + static_cast<long long>(sequence) * z_stride +
                                 head * HEAD_DIM + split * COLUMNS + column);
    const Activation* input = qkv + static_cast<long long>(sequence) * qkv_stride;
#pragma unroll
    for (int i = 0; i < CHANNELS_PER_THREAD; ++i) {
        const int c = thread + i * THREADS;
        if (c >= CHANNELS) break;
        const int at = channel_index(sizes, head, split, c);
        const Activation now = input[at];
        channels[c] = silu(convolve(tap[i], to_float(past[i][0]), to_float(past[i][1]),
                                    to_float(past[i][2]), to_float(now)));
        // The overwritten row is older than any tap, so other blocks may still read the ring.
        const bool is_mine = c >= 2 * HEAD_DIM || (head < k_heads && split == 0);
        if (is_mine) ring[newest * conv_dim + at] = now;
        if (is_mine && capture >= 0) {
            Activation* copy = rings + capture * ring_stride + at;
            copy[newest * conv_dim] = now;
#pragma unroll
            for (int j = 0; j < CONV_WIDTH - 1; ++j)
                copy[(newest + 1 + j) % CONV_RING * conv_dim] = past[i][j];
        }
    }
    const float beta = sigmoid(beta_in);
    const float decay = exp_approx(log_decay(alpha, bias, rate));
    __syncthreads();

    const float4 q4 = reinterpret_cast<const float4*>(channels)[lane];
    const float4 k4 = reinterpret_cast<const float4*>(channels + HEAD_DIM)[lane];
    const float q_scale = rsqrtf(warp_sum(dot4(q4, q4)) + L2_EPS) * QUERY_SCALE;
    const float k_scale = rsqrtf(warp_sum(dot4(k4, k4)) + L2_EPS);
    const float kq = warp_sum(dot4(k4, q4)) * k_scale * q_scale;

    float4 by_k = make_float4(0, 0, 0, 0), by_q = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        const int k = i * ROW_GROUPS + row;
        accumulate(by_k, state[i], channels[HEAD_DIM + k]);
        accumulate(by_q, state[i], channels[k]);
    }
    by_k = sum_over_lanes(by_k);
    by_q = sum_over_lanes(by_q);
    if (lane < COLUMN_GROUPS) {
        partials[0][warp][lane] = by_k;
        partials[1][warp][lane] = by_q;
    }
    __syncthreads();
    const int group = thread % COLUMN_GROUPS;
    by_k = partials[0][0][group];
    by_q = partials[1][0][group];
#pragma unroll
    for (int i = 1; i < WARPS; ++i) {
        accumulate(by_k, partials[0][i][group], 1.0f);
        accumulate(by_q, partials[1][i][group], 1.0f);
    }

    const float4 v4 = *reinterpret_cast<const float4*>(channels + 2 * HEAD_DIM + column);
    const float4 error = fused_scale_add(v4, beta, by_k, -beta * decay * k_scale);
    float* copied = rules + capture * rule_stride + head_offset;
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        const int k = i * ROW_GROUPS + row;
        const float4 next =
            fused_scale_add(error, channels[HEAD_DIM + k] * k_scale, state[i], decay);
        *reinterpret_cast<float4*>(rule + k * HEAD_DIM) = next;
        if (capture >= 0) *reinterpret_cast<float4*>(copied + k * HEAD_DIM) = next;
    }

    const float4 o = fused_scale_add(error, kq, by_q, decay * q_scale);
    float square = dot4(o, o);
#pragma unroll
    for (int offset = COLUMN_GROUPS / 2; offset > 0; offset >>= 1)
        square += __shfl_xor_sync(0xffffffffu, square, offset);
    const float mean = sum_over_splits(squares, square, split) / HEAD_DIM;
    if (thread >= COLUMN_GROUPS) return;
    const float scale = rsqrtf(mean + norm_eps);
    const float4 y = gated(o, scale, weight, to_float4(z4));
    const long long at = (static_cast<long long>(sequence) * v_heads + head) * HEAD_DIM;
    store4(out + at + split * COLUMNS + column, y);
}
