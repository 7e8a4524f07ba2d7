// Prefill of a gated delta net layer, second part: the scan over the chunks of each sequence.
//
// Per value head, with K, Q, V, T beta, S and G of a chunk from delta_prepare and the state M:
//     Y = V - e^G K M;  D = T beta Y;  O = e^G Q M + S D;  M <- e^(G_end) M + (e^(G_end - G) K)' D
// Everything is held transposed, so that a warp owns 16 columns of M (float32, in registers), and
// every left operand is the warp's previous result as it lies in its registers. Right operands come
// from shared memory; warps meet only where panels are exchanged. O takes the place of V.
//
// Bound: the chain of products of one chunk after another; 7.3 MFLOP and 57 KB a step and block of
// 64 columns. Row invariance: nothing crosses sequences, heads or columns; chunks go in order.
#include "delta_products.cuh"

#ifndef SCAN_WARPS
#define SCAN_WARPS 4  // per block; 16 columns of the state each
#endif
#ifndef DEPTH
#define DEPTH 3  // chunks whose operands are in shared memory; 1 where that is short
#endif

static_assert(SCAN_WARPS <= 4, "a block reads one panel of values");
constexpr int THREADS = SCAN_WARPS * 32;
constexpr int WARP_COLUMNS = 16;
constexpr int BLOCK_COLUMNS = SCAN_WARPS * WARP_COLUMNS;
constexpr int KEY_DEPTH = DEPTH > 2 ? DEPTH : 2;  // keys are needed throughout a step
constexpr int AHEAD = DEPTH > 1 ? DEPTH - 1 : 1;  // chunks that are loaded before their step

struct Buffers {
    u8 keys[KEY_DEPTH][TILE_BYTES];
    u8 queries[DEPTH][TILE_BYTES];
    u8 values[DEPTH][PANEL_BYTES];
    u8 inverse[DEPTH][PANEL_BYTES];
    u8 scores[DEPTH][PANEL_BYTES];
    u8 decays[KEY_DEPTH][DECAY_BYTES];
};

template <int bytes>
__device__ __forceinline__ void copy_in(u8* target, const u8* source) {
    constexpr int STEP = THREADS * 16;
    const u32 shared = shared_address(target) + threadIdx.x * 16;
    const u8* global = source + threadIdx.x * 16;
#pragma unroll
    for (int at = 0; at + STEP <= bytes; at += STEP) copy_async_16(shared + at, global + at);
    if (bytes % STEP != 0 && threadIdx.x * 16 < bytes % STEP)
        copy_async_16(shared + bytes / STEP * STEP, global + bytes / STEP * STEP);
}

// Brings the operands of a block's chunks to shared memory.
struct Loader {
    Workspace work;
    Buffers* buffers;
    int k_head, v_head, panel, first, end;  // chunks of the span

    __device__ __forceinline__ void keys_and_decays(int step) const {
        const int chunk = first + step;
        if (chunk >= end) return;
        copy_in<TILE_BYTES>(buffers->keys[step % KEY_DEPTH], work.keys(chunk, k_head));
        copy_in<DECAY_BYTES>(buffers->decays[step % KEY_DEPTH], work.decays(chunk, v_head));
    }
    __device__ __forceinline__ void queries(int step) const {
        const int chunk = first + step;
        if (chunk >= end) return;
        copy_in<TILE_BYTES>(buffers->queries[step % DEPTH], work.queries(chunk, k_head));
    }
    __device__ __forceinline__ void values_inverse_scores(int step) const {
        const int chunk = first + step;
        if (chunk >= end) return;
        copy_in<PANEL_BYTES>(buffers->values[step % DEPTH], values(step));
        copy_in<PANEL_BYTES>(buffers->inverse[step % DEPTH], work.inverse(chunk, v_head));
        copy_in<PANEL_BYTES>(buffers->scores[step % DEPTH], work.scores(chunk, v_head));
    }
    // One group of copies, also past the last chunk, so that their number is the same everywhere.
    __device__ __forceinline__ void all(int step) const {
        keys_and_decays(step);
        queries(step);
        values_inverse_scores(step);
        copy_async_commit();
    }
    // The panel of values in the workspace, which outputs replace.
    __device__ __forceinline__ u8* values(int step) const {
        return work.values(first + step, v_head) + panel * PANEL_BYTES;
    }
};

// A warp's 16 columns of one head's state, transposed: `at` is the lane's first column of the first
// row of [128 k][128 v].
__device__ void load_state(KeyColumns& m, const float* at, int lane) {
#pragma unroll
    for (int n = 0; n < 16; ++n) {
        const float* row = at + (n * 8 + (lane & 3) * 2) * HEAD_DIM;
        m[n][0] = row[0];
        m[n][1] = row[HEAD_DIM];
        m[n][2] = row[8];
        m[n][3] = row[HEAD_DIM + 8];
    }
}

__device__ void store_state(float* at, const KeyColumns& m, int lane) {
#pragma unroll
    for (int n = 0; n < 16; ++n) {
        float* row = at + (n * 8 + (lane & 3) * 2) * HEAD_DIM;
        row[0] = m[n][0];
        row[HEAD_DIM] = m[n][1];
        row[8] = m[n][2];
        row[HEAD_DIM + 8] = m[n][3];
    }
}

// Accumulators as the left operand of the next product.
template <int entries>
__device__ __forceinline__ void to_operand(u32 (&a)[entries][4], const float (&c)[entries * 2][4]) {
#pragma unroll
    for (int n = 0; n < entries * 2; ++n) {
        a[n / 2][n % 2 * 2] = half2_saturated(c[n][0], c[n][1]);
        a[n / 2][n % 2 * 2 + 1] = half2_saturated(c[n][2], c[n][3]);
    }
}

__device__ __forceinline__ void scale_state(KeyColumns& m, float factor) {
#pragma unroll
    for (int n = 0; n < 16; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) m[n][i] *= factor;
}

// Multiplies every token's column by its factor.
__device__ __forceinline__ void scale_tokens(TokenColumns& c, const float* factors, int lane) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const float2 f = *reinterpret_cast<const float2*>(factors + n * 8 + (lane & 3) * 2);
        c[n][0] *= f.x;
        c[n][1] *= f.y;
        c[n][2] *= f.x;
        c[n][3] *= f.y;
    }
}

// y = (V - e^G K M)', given (K M)'.
__device__ __forceinline__ void subtract_read(TokenOperand& y, const TokenColumns& read, u32 values,
                                              const float* growth, int warp, int lane) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        u32 v[4];
        const int token = step * 16 + (lane & 7) + (lane >> 4) * 8;
        load_matrices_transposed(v, values + panel_offset(token, warp * 2 + (lane >> 3 & 1)));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* c = read[step * 2 + half];
            const float2 g =
                *reinterpret_cast<const float2*>(growth + (step * 2 + half) * 8 + (lane & 3) * 2);
            const float2 top = half2_to_floats(v[half * 2]);
            const float2 bottom = half2_to_floats(v[half * 2 + 1]);
            y[step][half * 2] = half2_saturated(fmaf(-g.x, c[0], top.x), fmaf(-g.y, c[1], top.y));
            y[step][half * 2 + 1] =
                half2_saturated(fmaf(-g.x, c[2], bottom.x), fmaf(-g.y, c[3], bottom.y));
        }
    }
}

// Writes the warp's 16 columns of O over those of V in the workspace.
__device__ __forceinline__ void store_outputs(u8* panel, const TokenOperand& o, int warp,
                                              int lane) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const int token = n * 8 + (lane >> 2);
        u8* at = panel + (lane & 3) * 4;
        const u32 left = transpose_matrix(o[n / 2][n % 2 * 2]);
        const u32 right = transpose_matrix(o[n / 2][n % 2 * 2 + 1]);
        *reinterpret_cast<u32*>(at + panel_offset(token, warp * 2)) = left;
        *reinterpret_cast<u32*>(at + panel_offset(token, warp * 2 + 1)) = right;
    }
}

// Where the block's head and columns lie in the slots, and the rows that a convolution ring keeps.
struct SlotColumns {
    const Projection* qkv;
    float* rules;
    float* rings;
    long long rule_stride, ring_stride;
    int qkv_stride, k_heads, v_heads, v_head, split;

    // The lane's first column of the first row of the warp's part of the state.
    __device__ __forceinline__ float* rule(int slot, int lane) const {
        const int column = split * BLOCK_COLUMNS + (threadIdx.x >> 5) * WARP_COLUMNS + (lane >> 2);
        return rules + slot * rule_stride + static_cast<long long>(v_head) * HEAD_DIM * HEAD_DIM +
               column;
    }

    // `count` channels from `channel` on, of the last rows up to a chunk's end. Rows before a
    // span's first chunk are in the ring already.
    __device__ void keep_rows(int slot, ChunkEntry entry, int channel, int count) const {
        const int conv_dim = (2 * k_heads + v_heads) * HEAD_DIM;
        float* ring = rings + slot * ring_stride;
        for (int i = threadIdx.x; i < CONV_RING * count; i += THREADS) {
            const int row = entry.num_rows - 1 - i / count, at = channel + i % count;
            if (row >= 0 || entry.history < 0)
                ring[(row + CHUNK) % CONV_RING * conv_dim + at] =
                    to_float(qkv[static_cast<long long>(entry.first_row + row) * qkv_stride + at]);
        }
    }

    // The state at a chunk's end. q and k are kept by the first head that uses them.
    __device__ void keep(int slot, ChunkEntry entry, const KeyColumns& state, int lane) const {
        store_state(rule(slot, lane), state, lane);
        const int value = (2 * k_heads + v_head) * HEAD_DIM + split * BLOCK_COLUMNS;
        keep_rows(slot, entry, value, BLOCK_COLUMNS);
        if (v_head >= k_heads || split > 0) return;
        keep_rows(slot, entry, v_head * HEAD_DIM, HEAD_DIM);
        keep_rows(slot, entry, (k_heads + v_head) * HEAD_DIM, HEAD_DIM);
    }
};

// One chunk: the state moves to its end. `outputs` are the last chunk's on entry, which are stored
// while the tensor cores work, and this one's on return.
__device__ __forceinline__ void advance(KeyColumns& state, TokenOperand& outputs,
                                        const Loader& load, int step, int warp, int lane) {
    // This chunk's operands are here, and all warps are done with the last step's buffers.
    copy_async_wait<AHEAD - 1>();
    publish_panels();
    __syncthreads();
    if (DEPTH > 1)
        load.all(step + AHEAD);
    else
        load.keys_and_decays(step + 1);

    Buffers& buffers = *load.buffers;
    const PanelLanes lanes(lane);
    const u32 keys = shared_address(buffers.keys[step % KEY_DEPTH]);
    const float* growth = reinterpret_cast<const float*>(buffers.decays[step % KEY_DEPTH]);
    const float* remaining = growth + CHUNK;
    KeyOperand m;
    TokenColumns by_keys, out, fresh;
    to_operand(m, state);
    scale_state(state, growth[CHUNK - 1]);
    hold(state);
    products_begin();
    read_tile(by_keys, m, keys, lanes);
    products_commit();
    read_tile(out, m, shared_address(buffers.queries[step % DEPTH]), lanes);
    products_commit();
    if (step > 0) store_outputs(load.values(step - 1), outputs, warp, lane);
    products_wait<1>();
    hold(by_keys);

    TokenOperand y, d;
    subtract_read(y, by_keys, shared_address(buffers.values[step % DEPTH]), growth, warp, lane);
    products_begin();
    multiply_lower_transposed(fresh, y, shared_address(buffers.inverse[step % DEPTH]), lanes);
    products_commit();
    products_wait<1>();
    hold(out);
    scale_tokens(out, growth, lane);
    hold(out);
    if (DEPTH == 1) {
        __syncthreads();
        load.queries(step + 1);
    }
    products_wait<0>();
    hold(fresh);

    to_operand(y, fresh);
    scale_tokens(fresh, remaining, lane);
    to_operand(d, fresh);
    products_begin();
    add_outer(state, d, keys, lanes);
    add_lower(out, y, shared_address(buffers.scores[step % DEPTH]), lanes);
    products_commit();
    products_wait<0>();
    hold(state);
    hold(out);
    to_operand(outputs, out);
    if (DEPTH == 1) {
        __syncthreads();
        load.values_inverse_scores(step + 1);
        copy_async_commit();
    }
}

// Grid (v_heads * HEAD_DIM / BLOCK_COLUMNS, spans). Dynamic shared memory: Buffers.
extern "C" __global__ void __launch_bounds__(THREADS) delta_scan(
    const Projection* qkv,     // [rows, qkv_stride]: for the convolution rows that slots keep
    float* rules,              // [slots, rule_stride]: this layer's [v_heads, 128 k, 128 v]
    float* rings,              // [slots, ring_stride]: this layer's [CONV_RING, conv_dim]
    const ChunkEntry* chunks,  // [chunks]
    const SpanEntry* spans,    // [spans]
    u8* workspace,             // see Workspace
    int qkv_stride, long long rule_stride, long long ring_stride, int k_heads, int v_heads) {
    extern __shared__ __align__(1024) u8 memory[];  // the swizzle needs it
    Buffers& buffers = *reinterpret_cast<Buffers*>(memory);
    constexpr int BLOCKS_PER_HEAD = HEAD_DIM / BLOCK_COLUMNS;
    const int v_head = blockIdx.x / BLOCKS_PER_HEAD, split = blockIdx.x % BLOCKS_PER_HEAD;
    const int lane = threadIdx.x & 31;
    const int first_column = split * BLOCK_COLUMNS + (threadIdx.x >> 5) * WARP_COLUMNS;
    const int panel = first_column / CHUNK, warp = first_column % CHUNK / WARP_COLUMNS;
    const SpanEntry span = spans[blockIdx.y];
    if (span.num_chunks == 0) return;
    const Workspace work{workspace, k_heads, v_heads};
    const int end = span.first_chunk + span.num_chunks;
    const Loader load{work, &buffers, v_head % k_heads, v_head, panel, span.first_chunk, end};
    const SlotColumns slots{qkv,        rules,   rings,   rule_stride, ring_stride,
                            qkv_stride, k_heads, v_heads, v_head,      split};

    KeyColumns state;
    wait_for_previous_kernel();
    allow_next_kernel();
    load_state(state, slots.rule(span.slot, lane), lane);
#pragma unroll
    for (int step = 0; step < AHEAD; ++step) load.all(step);
    TokenOperand outputs;

    for (int step = 0; step < span.num_chunks; ++step) {
        advance(state, outputs, load, step, warp, lane);
        const ChunkEntry entry = chunks[span.first_chunk + step];
        const bool is_last = step + 1 == span.num_chunks;
        if (entry.capture < 0 && !is_last) continue;
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            const int target = i == 0 ? entry.capture : is_last ? span.slot : -1;
            if (target >= 0) slots.keep(target, entry, state, lane);
        }
    }
    store_outputs(load.values(span.num_chunks - 1), outputs, warp, lane);
    copy_async_wait<0>();
}
