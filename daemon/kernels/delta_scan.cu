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
#include "delta_tiles.cuh"

#ifndef SCAN_WARPS
#define SCAN_WARPS 4  // per block; 16 columns of the state each
#endif
#ifndef DEPTH
#define DEPTH 2  // buffers of each operand; 1 where shared memory is short
#endif

static_assert(SCAN_WARPS <= 4, "a block reads one panel of values");
constexpr int THREADS = SCAN_WARPS * 32;
constexpr int WARP_COLUMNS = 16;
constexpr int BLOCK_COLUMNS = SCAN_WARPS * WARP_COLUMNS;
constexpr int KEY_DEPTH = 2;  // keys are needed from the start of a step to its end

struct Buffers {
    u8 keys[KEY_DEPTH][TILE_BYTES];
    u8 queries[DEPTH][TILE_BYTES];
    u8 values[DEPTH][PANEL_BYTES];
    u8 inverse[DEPTH][PANEL_BYTES];
    u8 scores[DEPTH][PANEL_BYTES];
    u8 decays[KEY_DEPTH][DECAY_BYTES];
};

__device__ __forceinline__ void copy_in(u8* target, const u8* source, int bytes) {
    const u32 shared = shared_address(target);
    for (int at = threadIdx.x * 16; at < bytes; at += THREADS * 16)
        copy_async_16(shared + at, source + at);
}

// Brings the operands of a block's chunks to shared memory. Each call is one group of copies, also
// past the last chunk, so that the number of pending groups is the same everywhere.
struct Loader {
    Workspace work;
    Buffers* buffers;
    int k_head, v_head, panel, end;

    __device__ void keys_and_decays(int chunk, int step) const {
        if (chunk < end) {
            copy_in(buffers->keys[step % KEY_DEPTH], work.keys(chunk, k_head), TILE_BYTES);
            copy_in(buffers->decays[step % KEY_DEPTH], work.decays(chunk, v_head), DECAY_BYTES);
        }
        copy_async_commit();
    }
    __device__ void queries(int chunk, int step) const {
        if (chunk < end)
            copy_in(buffers->queries[step % DEPTH], work.queries(chunk, k_head), TILE_BYTES);
        copy_async_commit();
    }
    __device__ void values_inverse_scores(int chunk, int step) const {
        if (chunk < end) {
            const u8* values = work.values(chunk, v_head) + panel * PANEL_BYTES;
            copy_in(buffers->values[step % DEPTH], values, PANEL_BYTES);
            copy_in(buffers->inverse[step % DEPTH], work.inverse(chunk, v_head), PANEL_BYTES);
            copy_in(buffers->scores[step % DEPTH], work.scores(chunk, v_head), PANEL_BYTES);
        }
        copy_async_commit();
    }
};

// A warp's 16 columns of one head's state, transposed: accumulators [16 v][128 k].
struct StateColumns {
    float m[16][4];

    // `at`: the lane's first column of the first row, of [128 k][128 v].
    __device__ void load(const float* at, int lane) {
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            const float* row = at + (n * 8 + (lane & 3) * 2) * HEAD_DIM;
            m[n][0] = row[0];
            m[n][1] = row[HEAD_DIM];
            m[n][2] = row[8];
            m[n][3] = row[HEAD_DIM + 8];
        }
    }

    __device__ void store(float* at, int lane) const {
#pragma unroll
        for (int n = 0; n < 16; ++n) {
            float* row = at + (n * 8 + (lane & 3) * 2) * HEAD_DIM;
            row[0] = m[n][0];
            row[HEAD_DIM] = m[n][1];
            row[8] = m[n][2];
            row[HEAD_DIM + 8] = m[n][3];
        }
    }

    __device__ __forceinline__ void operand(u32 (&a)[4], int step) const {
        a[0] = half_pair(m[step * 2][0], m[step * 2][1]);
        a[1] = half_pair(m[step * 2][2], m[step * 2][3]);
        a[2] = half_pair(m[step * 2 + 1][0], m[step * 2 + 1][1]);
        a[3] = half_pair(m[step * 2 + 1][2], m[step * 2 + 1][3]);
    }

    __device__ __forceinline__ void scale(float factor) {
#pragma unroll
        for (int n = 0; n < 16; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) m[n][i] *= factor;
    }
};

// Tokens along accumulator columns: c[8][4] is [16 v][64 tokens].
typedef float TokenColumns[8][4];

// by_keys = (K M)', by_queries = (Q M)'.
__device__ __forceinline__ void read_state(TokenColumns& by_keys, TokenColumns& by_queries,
                                           const StateColumns& state, u32 keys, u32 queries,
                                           const PanelLanes& lanes) {
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        const int panel = step / 4 * PANEL_BYTES;
        u32 a[4], b[4];
        state.operand(a, step);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            load_matrices(b, lanes.by_rows(keys + panel, pair, step % 4));
            multiply(by_keys[pair * 2], a, b[0], b[1]);
            multiply(by_keys[pair * 2 + 1], a, b[2], b[3]);
        }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            load_matrices(b, lanes.by_rows(queries + panel, pair, step % 4));
            multiply(by_queries[pair * 2], a, b[0], b[1]);
            multiply(by_queries[pair * 2 + 1], a, b[2], b[3]);
        }
    }
}

// y = (V - e^G K M)' as left operands of 16 tokens a step.
__device__ __forceinline__ void subtract_read(u32 (&y)[4][4], const TokenColumns& read, u32 values,
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
            const float2 top = from_half_pair(v[half * 2]), bottom = from_half_pair(v[half * 2 + 1]);
            y[step][half * 2] = half_pair(fmaf(-g.x, c[0], top.x), fmaf(-g.y, c[1], top.y));
            y[step][half * 2 + 1] =
                half_pair(fmaf(-g.x, c[2], bottom.x), fmaf(-g.y, c[3], bottom.y));
        }
    }
}

// c += (a lower)': `panel` is lower triangular with rows i; transposed if its rows are j.
template <bool transposed>
__device__ __forceinline__ void multiply_lower(TokenColumns& c, const u32 (&a)[4][4], u32 panel,
                                               const PanelLanes& lanes) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int pair = step; pair < 4; ++pair) {
            u32 b[4];
            if (transposed)
                load_matrices_transposed(b, lanes.by_columns(panel, pair, step));
            else
                load_matrices(b, lanes.by_rows(panel, pair, step));
            multiply(c[pair * 2], a[step], b[0], b[1]);
            multiply(c[pair * 2 + 1], a[step], b[2], b[3]);
        }
    }
}

__device__ __forceinline__ void to_operand(u32 (&a)[4][4], const TokenColumns& c) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        a[n / 2][n % 2 * 2] = half_pair(c[n][0], c[n][1]);
        a[n / 2][n % 2 * 2 + 1] = half_pair(c[n][2], c[n][3]);
    }
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

// M' += D' K, where `d` carries e^(G_end - G).
__device__ __forceinline__ void add_outer(StateColumns& state, const u32 (&d)[4][4], u32 keys,
                                          const PanelLanes& lanes) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) {
            u32 b[4];
            const u32 panel = keys + pair / 4 * PANEL_BYTES;
            load_matrices_transposed(b, lanes.by_columns(panel, pair % 4, step));
            multiply(state.m[pair * 2], d[step], b[0], b[1]);
            multiply(state.m[pair * 2 + 1], d[step], b[2], b[3]);
        }
    }
}

// Writes the warp's 16 columns of O over those of V in the workspace.
__device__ __forceinline__ void store_outputs(u8* panel, const TokenColumns& c, int warp,
                                              int lane) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const int token = n * 8 + (lane >> 2);
        u8* at = panel + (lane & 3) * 4;
        const u32 left = transpose_matrix(half_pair(c[n][0], c[n][1]));
        const u32 right = transpose_matrix(half_pair(c[n][2], c[n][3]));
        *reinterpret_cast<u32*>(at + panel_offset(token, warp * 2)) = left;
        *reinterpret_cast<u32*>(at + panel_offset(token, warp * 2 + 1)) = right;
    }
}

// The last rows of a chunk into a slot's convolution ring, `count` channels from `channel` on.
__device__ void store_ring(Activation* ring, const Activation* rows, int stride, int num_rows,
                           int conv_dim, int channel, int count) {
    for (int i = threadIdx.x; i < CONV_RING * count; i += THREADS) {
        const int row = num_rows - 1 - i / count, at = channel + i % count;
        if (row >= 0)
            ring[row % CONV_RING * conv_dim + at] = rows[static_cast<long long>(row) * stride + at];
    }
}

// Grid (v_heads * HEAD_DIM / BLOCK_COLUMNS, spans). Dynamic shared memory: Buffers.
extern "C" __global__ void __launch_bounds__(THREADS) delta_scan(
    const Activation* qkv,     // [rows, qkv_stride]: for the convolution rows that slots keep
    float* rules,              // [slots, rule_stride]: this layer's [v_heads, 128 k, 128 v]
    Activation* rings,         // [slots, ring_stride]: this layer's [CONV_RING, conv_dim]
    const ChunkEntry* chunks,  // [chunks]
    const SpanEntry* spans,    // [spans]
    u8* workspace,             // see Workspace
    int qkv_stride, long long rule_stride, long long ring_stride, int k_heads, int v_heads) {
    extern __shared__ __align__(128) u8 memory[];
    Buffers& buffers = *reinterpret_cast<Buffers*>(memory);
    constexpr int BLOCKS_PER_HEAD = HEAD_DIM / BLOCK_COLUMNS;
    const int v_head = blockIdx.x / BLOCKS_PER_HEAD, split = blockIdx.x % BLOCKS_PER_HEAD;
    const int k_head = v_head % k_heads;
    const int lane = threadIdx.x & 31;
    const int first_column = split * BLOCK_COLUMNS + (threadIdx.x >> 5) * WARP_COLUMNS;
    const int panel = first_column / CHUNK, warp = first_column % CHUNK / WARP_COLUMNS;
    const SpanEntry span = spans[blockIdx.y];
    if (span.num_chunks == 0) return;
    const Workspace work{workspace, k_heads, v_heads};
    const int first = span.first_chunk, end = first + span.num_chunks;
    const Loader load{work, &buffers, k_head, v_head, panel, end};
    const PanelLanes lanes(lane);
    const long long state_offset =
        static_cast<long long>(v_head) * HEAD_DIM * HEAD_DIM + first_column + (lane >> 2);

    load.keys_and_decays(first, 0);
    load.queries(first, 0);
    load.values_inverse_scores(first, 0);
    if (DEPTH == 2) load.queries(first + 1, 1);
    StateColumns state;
    state.load(rules + span.slot * rule_stride + state_offset, lane);

    for (int step = 0; step < span.num_chunks; ++step) {
        const int chunk = first + step;
        // Everything of this chunk but, at depth 1, nothing beyond; all warps are done with the
        // last step, so its keys' buffer takes the next chunk's.
        if (DEPTH == 2)
            copy_async_wait<1>();
        else
            copy_async_wait<0>();
        __syncthreads();
        load.keys_and_decays(chunk + 1, step + 1);
        if (DEPTH == 2) load.values_inverse_scores(chunk + 1, step + 1);

        const u32 keys = shared_address(buffers.keys[step % KEY_DEPTH]);
        const float* growth = reinterpret_cast<const float*>(buffers.decays[step % KEY_DEPTH]);
        const float* remaining = growth + CHUNK;
        TokenColumns by_keys = {}, out = {};
        read_state(by_keys, out, state, keys, shared_address(buffers.queries[step % DEPTH]), lanes);
        __syncthreads();
        load.queries(chunk + DEPTH, step + DEPTH);

        u32 y[4][4], d[4][4];
        subtract_read(y, by_keys, shared_address(buffers.values[step % DEPTH]), growth, warp, lane);
        TokenColumns fresh = {};
        multiply_lower<true>(fresh, y, shared_address(buffers.inverse[step % DEPTH]), lanes);
        scale_tokens(out, growth, lane);
        to_operand(d, fresh);
        multiply_lower<false>(out, d, shared_address(buffers.scores[step % DEPTH]), lanes);
        if (DEPTH == 1) {
            __syncthreads();
            load.values_inverse_scores(chunk + 1, step + 1);
        }
        store_outputs(work.values(chunk, v_head) + panel * PANEL_BYTES, out, warp, lane);
        scale_tokens(fresh, remaining, lane);
        to_operand(d, fresh);
        state.scale(growth[CHUNK - 1]);
        add_outer(state, d, keys, lanes);

        const ChunkEntry entry = chunks[chunk];
        const bool is_last = step + 1 == span.num_chunks;
        if (entry.capture < 0 && !is_last) continue;
#pragma unroll 1
        for (int copy = 0; copy < 2; ++copy) {
            const int slot = copy == 0 ? entry.capture : span.slot;
            if (slot < 0 || (copy == 1 && !is_last)) continue;
            state.store(rules + slot * rule_stride + state_offset, lane);
            Activation* ring = rings + slot * ring_stride;
            const Activation* rows = qkv + static_cast<long long>(entry.first_row) * qkv_stride;
            const int conv_dim = (2 * k_heads + v_heads) * HEAD_DIM;
            const int values = (2 * k_heads + v_head) * HEAD_DIM + split * BLOCK_COLUMNS;
            store_ring(ring, rows, qkv_stride, entry.num_rows, conv_dim, values, BLOCK_COLUMNS);
            if (v_head >= k_heads || split > 0) continue;
            const int query = k_head * HEAD_DIM, key = (k_heads + k_head) * HEAD_DIM;
            store_ring(ring, rows, qkv_stride, entry.num_rows, conv_dim, query, HEAD_DIM);
            store_ring(ring, rows, qkv_stride, entry.num_rows, conv_dim, key, HEAD_DIM);
        }
    }
    copy_async_wait<0>();
}
