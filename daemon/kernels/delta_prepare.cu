// Prefill of a gated delta net layer, first part: everything of a chunk of 64 tokens that does not
// depend on the state, for all chunks and key heads at once.
//
// Convolution, SiLU, l2 norms and gates give q, k, v, beta and G (the sum of g within the chunk).
// Then per value head, with L[i][j] = e^(G_i - G_j) for j <= i:
//     T  = (I + strictly_lower(beta_i (k_i.k_j) L_ij))^-1,   handed on as T_ij beta_j
//     S  = lower(q_i.k_j L_ij)
// q k' and k k' run on tensor cores from fp16 keys. The inverse is float32: 16 x 16 blocks by
// substitution, joined by products whose operands are split into two fp16 (11 + 11 bits).
// Source of the form: arXiv 2412.06464. Padding rows have q = k = v = beta = g = 0, which is exact.
//
// Bytes a token for 16 k / 48 v heads in fp16: 20.5 KB read, 32.9 KB written; bound by them.
// Block: one key head of one chunk, 4 warps of 16 tokens each.
#include "delta_tiles.cuh"

#ifndef MIN_BLOCKS
#define MIN_BLOCKS 3
#endif

constexpr int WARPS = 4;
constexpr int ROWS = CHUNK / WARPS;  // tokens of a warp
constexpr int GRAM_STRIDE = CHUNK + 4;
constexpr int BLOCK_STRIDE = 20;              // floats, row of a diagonal block
constexpr int BLOCK_SIZE = 16 * BLOCK_STRIDE + 16;  // floats; 16 apart so that two are no conflict
constexpr int SCRATCH_BYTES = 2 * TILE_BYTES / WARPS;
static_assert(4 * BLOCK_SIZE * 4 <= SCRATCH_BYTES, "a warp's diagonal blocks");

struct Shared {
    u8 keys[TILE_BYTES];  // later, with the queries: scratch of the warps
    u8 queries[TILE_BYTES];
    float gram[CHUNK * GRAM_STRIDE];  // k k'
};

// A warp's 16 tokens of one head: raw rows with their history, 4 channels a lane.
struct HeadRows {
    Projection4 raw[ROWS + CONV_WIDTH - 1];

    // `column` is the lane's first channel; `ring` holds the rows before the chunk, or is null.
    __device__ void load(const Projection* rows, int stride, int column, int first, int num_rows,
                         const float* ring, int conv_dim) {
#pragma unroll
        for (int i = 0; i < ROWS + CONV_WIDTH - 1; ++i) {
            const int row = first + i - (CONV_WIDTH - 1);
            if (row < 0 && ring != nullptr)
                raw[i] = load4_kept(ring + (row + CONV_RING) * conv_dim + column);
            else if (row < num_rows)
                raw[i] = load4(rows + static_cast<long long>(row) * stride + column);
            else
                raw[i] = Projection4{};
        }
    }

    __device__ __forceinline__ float4 mixed(int i, const float4 (&taps)[4]) const {
        const float4 a = to_float4(raw[i]), b = to_float4(raw[i + 1]), c = to_float4(raw[i + 2]),
                     d = to_float4(raw[i + 3]);
        return make_float4(silu(convolve(taps[0], a.x, b.x, c.x, d.x)),
                           silu(convolve(taps[1], a.y, b.y, c.y, d.y)),
                           silu(convolve(taps[2], a.z, b.z, c.z, d.z)),
                           silu(convolve(taps[3], a.w, b.w, c.w, d.w)));
    }
};

// Where a lane's 4 channels of a token lie in a tile of two panels.
__device__ __forceinline__ int tile_offset(int row, int lane) {
    return (lane >> 4) * PANEL_BYTES + panel_offset(row, (lane & 15) >> 1) + (lane & 1) * 8;
}

// Convolves a head's rows and writes them, scaled to `length` if that is positive, as fp16.
__device__ void write_head(u8* tile, const HeadRows& rows, const float4* taps, int first,
                           int num_rows, float length, int lane) {
    const float4 tap[4] = {taps[0], taps[1], taps[2], taps[3]};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        float4 x = rows.mixed(i, tap);
        float scale = 1.0f;
        if (length > 0.0f) scale = reciprocal_root_approx(warp_sum(dot4(x, x)) + L2_EPS) * length;
        if (first + i >= num_rows) scale = 0.0f;
        const uint2 packed = make_uint2(half2_saturated(x.x * scale, x.y * scale),
                                        half2_saturated(x.z * scale, x.w * scale));
        *reinterpret_cast<uint2*>(tile + tile_offset(first + i, lane)) = packed;
    }
}

// A warp's copy of 16 bytes a lane, consecutive.
__device__ __forceinline__ void copy_out(u8* target, const u8* source, int bytes, int lane) {
    for (int at = lane * 16; at < bytes; at += 512)
        *reinterpret_cast<uint4*>(target + at) = *reinterpret_cast<const uint4*>(source + at);
}

// Inclusive sums of 64 values, two consecutive ones a lane.
__device__ __forceinline__ float2 running_sums(float first, float second, int lane) {
    float total = first + second;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const float before = __shfl_up_sync(0xffffffffu, total, offset);
        if (lane >= offset) total += before;
    }
    return make_float2(total - second, total);
}

// Gates of a value head by one warp: beta and G to shared memory, decays to the workspace.
__device__ void write_gates(float* beta, float* sums, u8* decays, const Projection* gates,
                            int stride, int head, int v_heads, int num_rows, float rate, float bias,
                            int lane) {
    float b[2] = {0.0f, 0.0f}, g[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = lane * 2 + i;
        if (row >= num_rows) continue;
        const Projection* gate = gates + static_cast<long long>(row) * stride;
        b[i] = sigmoid(to_float(gate[head]));
        g[i] = log_decay(to_float(gate[v_heads + head]), bias, rate);
    }
    const float2 sum = running_sums(g[0], g[1], lane);
    const float end = __shfl_sync(0xffffffffu, sum.y, 31);
    reinterpret_cast<float2*>(beta)[lane] = make_float2(b[0], b[1]);
    reinterpret_cast<float2*>(sums)[lane] = sum;
    reinterpret_cast<float2*>(decays)[lane] = make_float2(exp_approx(sum.x), exp_approx(sum.y));
    reinterpret_cast<float2*>(decays)[32 + lane] =
        make_float2(exp_approx(end - sum.x), exp_approx(end - sum.y));
}

// The warp's 16 rows of k k' and of q k'.
__device__ __forceinline__ void products_with_keys(float (&kk)[8][4], float (&qk)[8][4], u32 keys,
                                                   u32 queries, int warp, int lane) {
    const PanelLanes lanes(lane);
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        const int panel = step / 4 * PANEL_BYTES;
        const int own = panel + (warp * 16 + lanes.row_k) * 128 +
                        (((step % 4 * 2 + lanes.unit_k) ^ lanes.lane7) << 4);
        u32 k[4], q[4], b[4][4];
        load_matrices(k, keys + own);
        load_matrices(q, queries + own);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair)
            load_matrices(b[pair], lanes.by_rows(keys + panel, pair, step % 4));
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            mma_m16n8k16(kk[n], k, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            mma_m16n8k16(qk[n], q, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }
}

// The warp's 16 rows of S, by way of its own 2 KiB of shared memory.
__device__ void write_scores(u8* scores, u8* scratch, const float (&qk)[8][4], const float* sums,
                             int warp, int lane) {
    const int row = lane >> 2, pair = lane & 3;
    const float top = sums[warp * 16 + row], bottom = sums[warp * 16 + row + 8];
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const int j = n * 8 + pair * 2, i = warp * 16 + row;
        const float2 g = *reinterpret_cast<const float2*>(sums + j);
        // Above the diagonal the difference is positive and may overflow: choose before exp.
        const float c0 = j <= i ? qk[n][0] * exp_approx(top - g.x) : 0.0f;
        const float c1 = j + 1 <= i ? qk[n][1] * exp_approx(top - g.y) : 0.0f;
        const float c2 = j <= i + 8 ? qk[n][2] * exp_approx(bottom - g.x) : 0.0f;
        const float c3 = j + 1 <= i + 8 ? qk[n][3] * exp_approx(bottom - g.y) : 0.0f;
        *reinterpret_cast<u32*>(scratch + panel_offset(row, n) + pair * 4) =
            half2_saturated(c0, c1);
        *reinterpret_cast<u32*>(scratch + panel_offset(row + 8, n) + pair * 4) =
            half2_saturated(c2, c3);
    }
    __syncwarp();
    copy_out(scores + warp * 16 * 128, scratch, 16 * 128, lane);
    __syncwarp();
}

// An operand of a product in two fp16 parts, whose sum has 22 bits of it.
struct SplitA {
    u32 high[4], low[4];

    __device__ __forceinline__ void set(int i, float x, float y) {
        high[i] = half2_saturated(x, y);
        const float2 rounded = half2_to_floats(high[i]);
        low[i] = half2_saturated(x - rounded.x, y - rounded.y);
    }
};

struct SplitB {
    u32 high[2], low[2];

    __device__ __forceinline__ void set(int i, float x, float y) {
        high[i] = half2_saturated(x, y);
        const float2 rounded = half2_to_floats(high[i]);
        low[i] = half2_saturated(x - rounded.x, y - rounded.y);
    }
};

__device__ __forceinline__ void multiply_split(float (&c)[4], const SplitA& a, const SplitB& b) {
    mma_m16n8k16(c, a.low, b.high[0], b.high[1]);
    mma_m16n8k16(c, a.high, b.low[0], b.low[1]);
    mma_m16n8k16(c, a.high, b.high[0], b.high[1]);
}

// One warp inverts I + A of a value head; A_ij = beta_i e^(G_i - G_j) gram_ij below the diagonal.
struct Inversion {
    const float *gram, *beta, *sums;
    float* blocks;  // [4][16][BLOCK_STRIDE]: diagonal blocks of A, then of the inverse
    u8* panel;      // result, in global memory, transposed: rows j, columns i, T_ij beta_j
    int lane;

    __device__ __forceinline__ float entry(int i, int j) const {
        return beta[i] * exp_approx(sums[i] - sums[j]) * gram[i * GRAM_STRIDE + j];
    }

    __device__ void invert_diagonal() const {
#pragma unroll 4
        for (int index = lane; index < 4 * 256; index += 32) {
            const int block = index >> 8, i = index >> 4 & 15, j = index & 15;
            const float value = j < i ? entry(block * 16 + i, block * 16 + j) : 0.0f;
            blocks[block * BLOCK_SIZE + i * BLOCK_STRIDE + j] = value;
        }
        __syncwarp();
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass)
            substitute(blocks + (pass * 2 + (lane >> 4)) * BLOCK_SIZE, lane & 15);
    }

    // Column `column` of a block's inverse: t_i = (i == column) - sum_{m<i} A_im t_m.
    __device__ void substitute(float* block, int column) const {
        float t[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float even = i == column ? 1.0f : 0.0f, odd = 0.0f;
#pragma unroll
            for (int m = 0; m < i; m += 4) {
                const float4 a = *reinterpret_cast<const float4*>(block + i * BLOCK_STRIDE + m);
                even = fmaf(-a.x, t[m], even);
                if (m + 1 < i) odd = fmaf(-a.y, t[m + 1], odd);
                if (m + 2 < i) even = fmaf(-a.z, t[m + 2], even);
                if (m + 3 < i) odd = fmaf(-a.w, t[m + 3], odd);
            }
            t[i] = even + odd;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; ++i) block[i * BLOCK_STRIDE + column] = t[i];
        __syncwarp();
    }

    // b[m][i] = A_im of the 16 x 16 block at (16 row, 16 col), for columns i of tile n.
    __device__ __forceinline__ SplitB coefficients(int row, int col, int n) const {
        const int i = row * 16 + n * 8 + (lane >> 2);
        SplitB b;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int m = col * 16 + half * 8 + (lane & 3) * 2;
            b.set(half, entry(i, m), entry(i, m + 1));
        }
        return b;
    }

    // b[k][i] = T_ik of diagonal block `block`, negated.
    __device__ __forceinline__ SplitB negated_diagonal(int block, int n) const {
        const float* row = blocks + block * BLOCK_SIZE + (n * 8 + (lane >> 2)) * BLOCK_STRIDE;
        SplitB b;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int k = half * 8 + (lane & 3) * 2;
            b.set(half, -row[k], -row[k + 1]);
        }
        return b;
    }

    // Transposed diagonal block as accumulators: [row j][column i], tiles n of 8 columns.
    __device__ __forceinline__ void load_diagonal(float (&c)[2][4], int block) const {
        const float* at = blocks + block * BLOCK_SIZE + (lane >> 2);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int i = n * 8 + (lane & 3) * 2;
            c[n][0] = at[i * BLOCK_STRIDE];
            c[n][1] = at[(i + 1) * BLOCK_STRIDE];
            c[n][2] = at[i * BLOCK_STRIDE + 8];
            c[n][3] = at[(i + 1) * BLOCK_STRIDE + 8];
        }
    }

    __device__ __forceinline__ SplitA as_operand(const float (&c)[2][4]) const {
        SplitA a;
        a.set(0, c[0][0], c[0][1]);
        a.set(1, c[0][2], c[0][3]);
        a.set(2, c[1][0], c[1][1]);
        a.set(3, c[1][2], c[1][3]);
        return a;
    }

    __device__ __forceinline__ void store(const float (&c)[2][4], int row, int col) const {
        const int j = col * 16 + (lane >> 2);
        const float top = beta[j], bottom = beta[j + 8];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            u8* at = panel + (lane & 3) * 4;
            const int unit = row * 2 + n;
            *reinterpret_cast<u32*>(at + panel_offset(j, unit)) =
                half2_saturated(c[n][0] * top, c[n][1] * top);
            *reinterpret_cast<u32*>(at + panel_offset(j + 8, unit)) =
                half2_saturated(c[n][2] * bottom, c[n][3] * bottom);
        }
    }

    // Zeros where i lies in an earlier block than j.
    __device__ __forceinline__ void clear_above() const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int j = half * 32 + lane;
            for (int unit = 0; unit < j / 16 * 2; ++unit)
                *reinterpret_cast<uint4*>(panel + panel_offset(j, unit)) = make_uint4(0, 0, 0, 0);
        }
    }

    // Blocks below the diagonal, row by row: T_ij = -T_ii sum_m A_im T_mj, all transposed, so that
    // each result is the left operand of the next product as it lies in registers.
    __device__ void join() const {
        SplitA done[3][3];
        float c[2][4];
        clear_above();
#pragma unroll
        for (int row = 0; row < 4; ++row) {
            load_diagonal(c, row);
            store(c, row, row);
            if (row < 3) done[row][row] = as_operand(c);
            if (row == 0) continue;
            float sums_of_products[3][2][4] = {};
#pragma unroll
            for (int m = 0; m < row; ++m) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const SplitB a = coefficients(row, m, n);
#pragma unroll
                    for (int col = 0; col <= m; ++col)
                        multiply_split(sums_of_products[col][n], done[m][col], a);
                }
            }
            const SplitB diagonal[2] = {negated_diagonal(row, 0), negated_diagonal(row, 1)};
#pragma unroll
            for (int col = 0; col < row; ++col) {
                const SplitA left = as_operand(sums_of_products[col]);
                float result[2][4] = {};
                multiply_split(result[0], left, diagonal[0]);
                multiply_split(result[1], left, diagonal[1]);
                store(result, row, col);
                if (row < 3) done[row][col] = as_operand(result);
            }
        }
    }
};

// Grid (k_heads, chunks), 128 threads. Dynamic shared memory: Shared, then beta and G of each of
// the v_heads / k_heads value heads that share the key head: value head = k_head + i * k_heads.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) delta_prepare(
    const Projection* qkv,      // [rows, qkv_stride]: q heads, k heads, v heads
    const Projection* gates,          // [rows, gates_stride]: beta per v head, alpha per v head
    const float4* taps,         // [conv_dim] of 4 taps, oldest first
    const float* rates,         // [v_heads]: -exp(A_log)
    const float* dt_bias,       // [v_heads]
    const float* rings,    // [slots, ring_stride]: this layer's [CONV_RING, conv_dim]
    const ChunkEntry* chunks,   // [chunks]
    u8* workspace,              // see Workspace
    int qkv_stride, int gates_stride, long long ring_stride, int k_heads, int v_heads) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    float* betas = reinterpret_cast<float*>(memory + sizeof(Shared));
    const int k_head = blockIdx.x, chunk = blockIdx.y;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int group = v_heads / k_heads;
    float* sums = betas + group * CHUNK;
    const ChunkEntry entry = chunks[chunk];
    wait_for_previous_kernel();
    allow_next_kernel();
    if (entry.num_rows == 0) return;
    const Workspace work{workspace, k_heads, v_heads};
    const int conv_dim = (2 * k_heads + v_heads) * HEAD_DIM;
    const Projection* rows = qkv + static_cast<long long>(entry.first_row) * qkv_stride;
    const Projection* gate_rows = gates + static_cast<long long>(entry.first_row) * gates_stride;
    const float* ring = entry.history < 0 ? nullptr : rings + entry.history * ring_stride;
    const int first = warp * ROWS;

    const int key = (k_heads + k_head) * HEAD_DIM + lane * 4, query = k_head * HEAD_DIM + lane * 4;
    {
        HeadRows key_rows, query_rows;
        key_rows.load(rows, qkv_stride, key, first, entry.num_rows, ring, conv_dim);
        query_rows.load(rows, qkv_stride, query, first, entry.num_rows, ring, conv_dim);
        write_head(shared.keys, key_rows, taps + key, first, entry.num_rows, 1.0f, lane);
        write_head(shared.queries, query_rows, taps + query, first, entry.num_rows, QUERY_SCALE,
                   lane);
    }
    for (int i = warp; i < group; i += WARPS) {
        const int head = k_head + i * k_heads;
        write_gates(betas + i * CHUNK, sums + i * CHUNK, work.decays(chunk, head), gate_rows,
                    gates_stride, head, v_heads, entry.num_rows, rates[head], dt_bias[head], lane);
    }
    __syncthreads();

    float qk[8][4] = {};
    {
        float kk[8][4] = {};
        products_with_keys(kk, qk, shared_address(shared.keys), shared_address(shared.queries),
                           warp, lane);
        float* gram = shared.gram + (first + (lane >> 2)) * GRAM_STRIDE + (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            *reinterpret_cast<float2*>(gram + n * 8) = make_float2(kk[n][0], kk[n][1]);
            *reinterpret_cast<float2*>(gram + 8 * GRAM_STRIDE + n * 8) =
                make_float2(kk[n][2], kk[n][3]);
        }
    }
    copy_out(work.keys(chunk, k_head) + warp * (2 * TILE_BYTES / WARPS),
             shared.keys + warp * (2 * TILE_BYTES / WARPS), 2 * TILE_BYTES / WARPS, lane);
    __syncthreads();

    u8* scratch = shared.keys + warp * SCRATCH_BYTES;
    for (int i = 0; i < group; ++i)
        write_scores(work.scores(chunk, k_head + i * k_heads), scratch, qk, sums + i * CHUNK, warp,
                     lane);
    HeadRows value_rows, next_rows;
    const int value = (2 * k_heads + k_head) * HEAD_DIM + lane * 4, apart = k_heads * HEAD_DIM;
    value_rows.load(rows, qkv_stride, value, first, entry.num_rows, ring, conv_dim);
    for (int i = 0; i < group; ++i) {
        const int column = value + i * apart;
        if (i + 1 < group)
            next_rows.load(rows, qkv_stride, column + apart, first, entry.num_rows, ring, conv_dim);
        write_head(work.values(chunk, k_head + i * k_heads), value_rows, taps + column, first,
                   entry.num_rows, 0.0f, lane);
        value_rows = next_rows;
    }
    for (int i = warp; i < group; i += WARPS) {
        const Inversion inversion{shared.gram,
                                  betas + i * CHUNK,
                                  sums + i * CHUNK,
                                  reinterpret_cast<float*>(scratch),
                                  work.inverse(chunk, k_head + i * k_heads),
                                  lane};
        inversion.invert_diagonal();
        inversion.join();
        __syncwarp();
    }
}
