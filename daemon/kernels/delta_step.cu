// One decoded token of each sequence through a gated delta net layer, from projections to the gated
// norm, in one launch: convolution, SiLU, l2 norms, gates, recurrence, RMS norm, SiLU(z).
//
// Per value head, with state M [128 k][128 v], k and q of length one, q scaled by 1/sqrt(128):
//     d = beta (v - e^g M'k);  M <- e^g M + k d';  o = e^g M'q + d (k.q)        (M before the step)
// which reads M once, into registers. A block takes one head of one sequence: a head's norm needs
// all its columns, and blocks that share a head through a cluster measured slower.
//
// Bound: bytes. 128 KiB a head and token (state read and written); 6.3 MB a layer for 48 heads.
// Row invariance: nothing crosses sequences; all sums have one order.
#include "delta_math.cuh"
#include "operand.cuh"
#include "warp.cuh"

constexpr int ROWS = 16;                     // of the state, a thread
constexpr int COLUMN_GROUPS = HEAD_DIM / 4;  // of four columns: a warp spans a row
constexpr int WARPS = HEAD_DIM / ROWS;
constexpr int THREADS = WARPS * 32;
constexpr int CHANNELS = 3 * HEAD_DIM;  // q, k and v
constexpr int CHANNELS_PER_THREAD = (CHANNELS + THREADS - 1) / THREADS;
static_assert(COLUMN_GROUPS == 32, "a warp's lanes span the columns");

// What a thread's channels need of the convolution, but the current row.
struct ThreadChannels {
    int index[CHANNELS_PER_THREAD];  // in a projected row (q heads, k heads, v heads)
    float4 taps[CHANNELS_PER_THREAD];
    float past[CHANNELS_PER_THREAD][CONV_WIDTH - 1];

    __device__ __forceinline__ void load(const float4* all_taps, const float* ring, int newest,
                                         int head, int k_heads, int v_heads) {
        const int conv_dim = (2 * k_heads + v_heads) * HEAD_DIM;
        const int first_head[3] = {head % k_heads, k_heads + head % k_heads, 2 * k_heads + head};
#pragma unroll
        for (int i = 0; i < CHANNELS_PER_THREAD; ++i) {
            const int c = threadIdx.x + i * THREADS;
            if (c >= CHANNELS) break;
            const int part = c / HEAD_DIM;
            const int start = part == 0 ? first_head[0] : part == 1 ? first_head[1] : first_head[2];
            index[i] = start * HEAD_DIM + c % HEAD_DIM;
            taps[i] = all_taps[index[i]];
#pragma unroll
            for (int j = 0; j < CONV_WIDTH - 1; ++j)
                past[i][j] = ring[(newest + 1 + j) % CONV_RING * conv_dim + index[i]];
        }
    }

    // Channels after convolution and SiLU to `mixed`; the current row to the rings of the slot and,
    // with the rows before it, of a capture. q and k are kept by the first head that uses them.
    __device__ __forceinline__ void mix(float* mixed, const Projection* row, float* ring,
                                        float* capture, int newest, int conv_dim,
                                        bool keeps_keys) const {
#pragma unroll
        for (int i = 0; i < CHANNELS_PER_THREAD; ++i) {
            const int c = threadIdx.x + i * THREADS;
            if (c >= CHANNELS) break;
            const float now = to_float(row[index[i]]);
            mixed[c] = silu(convolve(taps[i], past[i][0], past[i][1], past[i][2], now));
            if (c < 2 * HEAD_DIM && !keeps_keys) continue;
            // The overwritten row is older than any tap, so other blocks may still read the ring.
            ring[newest * conv_dim + index[i]] = now;
            if (capture == nullptr) continue;
            capture[newest * conv_dim + index[i]] = now;
#pragma unroll
            for (int j = 0; j < CONV_WIDTH - 1; ++j)
                capture[(newest + 1 + j) % CONV_RING * conv_dim + index[i]] = past[i][j];
        }
    }
};

__device__ __forceinline__ void accumulate(float4& sum, float4 a, float s) {
    sum.x = fmaf(a.x, s, sum.x);
    sum.y = fmaf(a.y, s, sum.y);
    sum.z = fmaf(a.z, s, sum.z);
    sum.w = fmaf(a.w, s, sum.w);
}

// a s + b t
__device__ __forceinline__ float4 combine(float4 a, float s, float4 b, float t) {
    return make_float4(fmaf(a.x, s, b.x * t), fmaf(a.y, s, b.y * t), fmaf(a.z, s, b.z * t),
                       fmaf(a.w, s, b.w * t));
}

// Sums of M'k and M'q over the rows of all warps, of the lane's four columns.
struct Reads {
    float4 by_k, by_q;

    __device__ __forceinline__ Reads(const float4 (&state)[ROWS], const float* mixed,
                                     float4 (&partials)[2][WARPS][32], int warp, int lane) {
        by_k = by_q = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            accumulate(by_k, state[i], mixed[HEAD_DIM + i * WARPS + warp]);
            accumulate(by_q, state[i], mixed[i * WARPS + warp]);
        }
        partials[0][warp][lane] = by_k;
        partials[1][warp][lane] = by_q;
        __syncthreads();
        by_k = partials[0][0][lane];
        by_q = partials[1][0][lane];
#pragma unroll
        for (int i = 1; i < WARPS; ++i) {
            accumulate(by_k, partials[0][i][lane], 1.0f);
            accumulate(by_q, partials[1][i][lane], 1.0f);
        }
    }
};

// Grid (v_heads, sequences). Slots, captures and positions must have been written at least two
// launches before; a sequence with slot -1 is padding and is left out.
extern "C" __global__ void __launch_bounds__(THREADS, 2) delta_step(
    const Projection* qkv,   // [sequences, qkv_stride]: q heads, k heads, v heads
    const Projection* z,     // [sequences, z_stride]: v heads
    const Projection* gates, // [sequences, gates_stride]: beta per v head, alpha per v head
    const float4* taps,      // [conv_dim] of 4 taps, oldest first
    const float* rates,      // [v_heads]: -exp(A_log)
    const float* dt_bias,    // [v_heads]
    const float4* norm,      // [HEAD_DIM / 4]
    float* rules,            // [slots, rule_stride]: this layer's [v_heads, 128 k, 128 v]
    float* rings,            // [slots, ring_stride]: this layer's [CONV_RING, conv_dim]
    const int* slots,        // [sequences]
    const int* captures,     // [sequences]: slot that gets a copy of the new state, or -1
    const int* positions,    // [sequences]: of the token
    void* out,               // [sequences, v_heads * 128], or panels
    int qkv_stride, int z_stride, int gates_stride, long long rule_stride, long long ring_stride,
    int k_heads, int v_heads, float norm_eps) {
    __shared__ __align__(16) float mixed[CHANNELS];
    __shared__ float4 partials[2][WARPS][32];
    const int head = blockIdx.x;
    const long long sequence = blockIdx.y;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int slot = slots[sequence], capture = captures[sequence];
    if (slot < 0) return;
    const int newest = positions[sequence] % CONV_RING;
    const long long first = (static_cast<long long>(head) * HEAD_DIM + warp) * HEAD_DIM + lane * 4;
    float* rule = rules + slot * rule_stride + first;
    float* ring = rings + slot * ring_stride;

    // Before the wait: what earlier kernels of this step do not write. The state is next needed
    // after all other layers have passed through the L2 cache, so it should not stay there.
    float4 state[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
        state[i] = __ldcs(reinterpret_cast<const float4*>(rule + i * WARPS * HEAD_DIM));
    ThreadChannels channels;
    channels.load(taps, ring, newest, head, k_heads, v_heads);
    const float rate = rates[head], bias = dt_bias[head];
    const float4 weight = norm[lane];

    wait_for_previous_kernel();
    allow_next_kernel();
    const Projection* gate = gates + sequence * gates_stride + head;
    const float beta_in = to_float(gate[0]), alpha = to_float(gate[v_heads]);
    const Projection4 z4 = load4(z + sequence * z_stride + head * HEAD_DIM + lane * 4);
    channels.mix(mixed, qkv + sequence * qkv_stride, ring,
                 capture < 0 ? nullptr : rings + capture * ring_stride, newest,
                 (2 * k_heads + v_heads) * HEAD_DIM, head < k_heads);
    const float beta = sigmoid(beta_in), decay = exp_approx(log_decay(alpha, bias, rate));
    __syncthreads();

    const float4 q4 = reinterpret_cast<const float4*>(mixed)[lane];
    const float4 k4 = reinterpret_cast<const float4*>(mixed + HEAD_DIM)[lane];
    const float4 v4 = reinterpret_cast<const float4*>(mixed + 2 * HEAD_DIM)[lane];
    const float q_scale = reciprocal_root_approx(warp_sum(dot4(q4, q4)) + L2_EPS) * QUERY_SCALE;
    const float k_scale = reciprocal_root_approx(warp_sum(dot4(k4, k4)) + L2_EPS);
    const float kq = warp_sum(dot4(k4, q4)) * k_scale * q_scale;
    const Reads reads(state, mixed, partials, warp, lane);
    const float4 error = combine(v4, beta, reads.by_k, -beta * decay * k_scale);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        state[i] = combine(error, mixed[HEAD_DIM + i * WARPS + warp] * k_scale, state[i], decay);
        __stcs(reinterpret_cast<float4*>(rule + i * WARPS * HEAD_DIM), state[i]);
    }
    if (capture >= 0) {
        float* copy = rules + capture * rule_stride + first;
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            *reinterpret_cast<float4*>(copy + i * WARPS * HEAD_DIM) = state[i];
    }
    if (warp != 0) return;
    const float4 o = combine(error, kq, reads.by_q, decay * q_scale);
    const float scale = reciprocal_root_approx(warp_sum(dot4(o, o)) / HEAD_DIM + norm_eps);
    const float4 y = gated(o, scale, weight, to_float4(z4));
#if OUTPUT
    *(uint2*)panel_place(out, sequence, head * HEAD_DIM + lane * 4, v_heads * HEAD_DIM) =
        make_uint2(operand_pair(y.x, y.y), operand_pair(y.z, y.w));
#else
    static_cast<float4*>(out)[(sequence * v_heads + head) * (HEAD_DIM / 4) + lane] = y;
#endif
}
