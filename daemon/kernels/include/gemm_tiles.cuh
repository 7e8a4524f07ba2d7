// Many rows times quantized matrices: the pipeline that quant_gemm and moe_gemm have in common.
//
// Weights are dequantized from their packed tiles into registers and multiplied as the A operand;
// tokens are the columns. On sm_90a: two consumer warpgroups of 64 rows x COLUMNS tokens by wgmma,
// and a producer warp that keeps rings of weight units and activation chunks full by bulk copies.
// Elsewhere: 4 warps of 16 rows x COLUMNS tokens by mma.sync, with cp.async. Every sum runs over k
// in order in one chain, so a token's bits depend neither on COLUMNS nor on the other tokens.
// Which tiles there are is the kernel's `Work`: find(index, tile) gives the index-th, or false past
// the last; stripe(tile, i) gives the i-th 64 of its rows, of which there are TILE_STRIPES.
//
// Macros: TYPES (bit mask of QuantTypes), COLUMNS (64, 128, 256), UNIT_BYTES (the largest unit),
// WEIGHT_STAGES, CHUNK_STAGES, EPILOGUE (0 store, 1 add to a residual, 2 SwiGLU of paired rows,
// 3 SiLU, times the rows that were stored before, 4 store in fp16).
#pragma once
#include "mma.cuh"
#include "operand.cuh"
#include "quant_sums.cuh"
#include "warp.cuh"

constexpr int CHUNK_BYTES = COLUMNS * 128;  // 64 columns of W for all tokens of a tile

// 64 rows of a matrix.
struct Stripe {
    const u8* units;
    int type, tile_bytes;
    int row, num_rows;  // of the output; num_rows 0 to 4 tile heights
};

// Some stripes times COLUMNS tokens.
struct Tile {
    int group, row_tile;            // which stripes, for the kernel's Work
    int token, end, padded_end;     // its first token; where the tokens end, and what may be read
    int num_blocks;                 // 256 columns of W each
};

// Where the sums go. rows: float32 [tokens, stride], fp16 where EPILOGUE is 4; chunks: fp16
// [stride / 64, lines, 64].
struct Output {
    float* rows;
    u8* chunks;
    int stride, lines;
};

// The product of a token's gate and up, as column k of the chunks that the next product reads.
__device__ __forceinline__ void write_swiglu(
    const Output& out, const Tile& tile, int token, int k, float gate, float up) {
    const float y = swiglu(gate, up);
    const int t = k % 256 / 64, e = k % 64;
    const int position = e / 4 * 16 + e % 4 / 2 * 8 + 2 * t + e % 2;
    const long long line = (long long)(k / 256 * 4 + position / 64) * out.lines + token;
    const int unit = (position % 64 / 8) ^ ((token - tile.token) % 8);
    u8* at = out.chunks + line * 128 + unit * 16 + position % 8 * 2;
    *(u16*)at = float_to_half(y * ACTIVATION_SCALE);
}

// Whether a lane has the first of its rows, or the second, 8 further.
__device__ __forceinline__ bool has_row(const Stripe& s, int second) {
    return second == 0 || tile_height(s.type) == 16;
}

// Sums of a lane to SwiGLU: rows `row` (gate) and row + 8 (up), tokens `token`, + 1, + 8, + 9, ...
template <int count>
__device__ __forceinline__ void write_products(
    const Output& out, const Tile& tile, const Stripe& s, int row, int token,
    const float (&sum)[count][4]) {
    const int k = s.row / 2 + row / 16 * 8 + row % 8;
#pragma unroll
    for (int i = 0; i < count; i++)
#pragma unroll
        for (int c = 0; c < 2; c++)
            if (s.num_rows > 0 && token + 8 * i + c < tile.end)
                write_swiglu(out, tile, token + 8 * i + c, k, sum[i][c] / ACTIVATION_SCALE,
                             sum[i][c + 2] / ACTIVATION_SCALE);
}

// The same sums as gates of the rows that an earlier launch stored: rows `row` and row + 8.
template <int count>
__device__ __forceinline__ void write_gated(
    const Output& out, const Tile& tile, const Stripe& s, int row, int token,
    const float (&sum)[count][4]) {
#pragma unroll
    for (int i = 0; i < count; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int own = token + 8 * i + c % 2, k = row + c / 2 * 8;
            if (k >= s.num_rows || own >= tile.end || !has_row(s, c / 2)) continue;
            const float up = out.rows[(long long)own * out.stride + s.row + k];
            write_swiglu(out, tile, own, s.row + k, sum[i][c] / ACTIVATION_SCALE, up);
        }
}

// The same sums to float32 rows. Residuals are read in groups ahead of the writes, which the
// compiler may not reorder.
template <int count>
__device__ __forceinline__ void write_rows(
    const Output& out, const Tile& tile, const Stripe& s, int row, int token,
    const float (&sum)[count][4]) {
    constexpr int GROUP = 8;
    const int inside[2] = {row < s.num_rows, row + 8 < s.num_rows && has_row(s, 1)};
    float* first = out.rows + (long long)token * out.stride + s.row + row;
#pragma unroll
    for (int start = 0; start < count; start += GROUP) {
        float before[GROUP][4] = {};
#pragma unroll
        for (int i = 0; i < GROUP * 4 && EPILOGUE == 1; i++) {
            const int offset = 8 * (start + i / 4) + i % 2;
            if (inside[i / 2 % 2] && token + offset < tile.end)
                before[i / 4][i % 4] = first[(long long)offset * out.stride + i / 2 % 2 * 8];
        }
#pragma unroll
        for (int i = 0; i < GROUP * 4; i++) {
            const int offset = 8 * (start + i / 4) + i % 2;
            const float y = sum[start + i / 4][i % 4] / ACTIVATION_SCALE + before[i / 4][i % 4];
            if (inside[i / 2 % 2] && token + offset < tile.end)
                first[(long long)offset * out.stride + i / 2 % 2 * 8] = y;
        }
    }
}

// The same sums to fp16 rows, transposed 8 x 8, so that a lane has two rows of one token.
template <int count>
__device__ __forceinline__ void write_half_rows(
    const Output& out, const Tile& tile, const Stripe& s, int row, int token,
    const float (&sum)[count][4]) {
    const int lane = threadIdx.x % 32;
    row += lane % 4 * 2 - lane / 4, token += lane / 4 - lane % 4 * 2;
    u16* first = (u16*)out.rows + (long long)token * out.stride + s.row + row;
    const bool aligned = (s.row | out.stride) % 2 == 0;
#pragma unroll
    for (int i = 0; i < count * 2; i++) {
        const float* pair = sum[i / 2] + i % 2 * 2;
        const u32 y = transpose_matrix(
            half2_saturated(pair[0] / ACTIVATION_SCALE, pair[1] / ACTIVATION_SCALE));
        u16* at = first + (long long)(i / 2 * 8) * out.stride + i % 2 * 8;
        const bool is_inside = token + i / 2 * 8 < tile.end && has_row(s, i % 2);
        const int rows = is_inside ? s.num_rows - row - i % 2 * 8 : 0;
        if (rows > 1 && aligned) {
            *(u32*)at = y;
        } else {
            if (rows > 0) at[0] = u16(y);
            if (rows > 1) at[1] = u16(y >> 16);
        }
    }
}

template <int count>
__device__ __forceinline__ void write_sums(
    const Output& out, const Tile& tile, const Stripe& s, int row, int token,
    const float (&sum)[count][4]) {
    if constexpr (EPILOGUE == 2) write_products(out, tile, s, row, token, sum);
    else if constexpr (EPILOGUE == 3) write_gated(out, tile, s, row, token, sum);
    else if constexpr (EPILOGUE == 4) write_half_rows(out, tile, s, row, token, sum);
    else write_rows(out, tile, s, row, token, sum);
}

#if __CUDA_ARCH_FEAT_SM90_ALL
#include "barriers.cuh"
#include "wgmma.cuh"

#define GEMM_BOUNDS __launch_bounds__(THREADS, 1)
constexpr int THREADS = 384;
constexpr int TILE_STRIPES = 2;

struct Rings {
    u8* weights;  // WEIGHT_STAGES x 2 units
    u8* chunks;   // CHUNK_STAGES x CHUNK_BYTES, 1,024-byte aligned
    u64 *weights_full, *weights_empty, *chunks_full, *chunks_empty;
};

struct Cursor {
    int stage, phase;
};

template <int stages>
__device__ __forceinline__ void advance(Cursor& c) {
    if (++c.stage == stages) c.stage = 0, c.phase ^= 1;
}

// One lane: keeps both rings full for all of the block's tiles. x: fp16 chunks [blocks * 4, lines,
// 64], swizzled by a token's place in its tile.
template <typename Work>
__device__ void produce(const Rings& rings, const Work& work, const u8* x, int lines) {
    Cursor w = {0, 1}, c = {0, 1};
    Tile tile;
    for (int index = blockIdx.x; work.find(index, tile); index += gridDim.x) {
        const Stripe pair[2] = {work.stripe(tile, 0), work.stripe(tile, 1)};
        const u32 bytes = min(COLUMNS, tile.padded_end - tile.token) * 128;
        const u32 unit[2] = {pair[0].tile_bytes * 4u, pair[1].tile_bytes * 4u};
        for (int block = 0; block < tile.num_blocks; block++) {
            barrier_wait(rings.weights_empty + w.stage, w.phase);
            barrier_expect(rings.weights_full + w.stage, unit[0] + unit[1]);
            for (int i = 0; i < 2; i++)
                copy_bulk(rings.weights + (w.stage * 2 + i) * UNIT_BYTES,
                          pair[i].units + (long long)block * unit[i], unit[i],
                          rings.weights_full + w.stage);
            advance<WEIGHT_STAGES>(w);
            for (int i = 0; i < 4; i++) {
                barrier_wait(rings.chunks_empty + c.stage, c.phase);
                barrier_expect(rings.chunks_full + c.stage, bytes);
                copy_bulk(rings.chunks + c.stage * CHUNK_BYTES,
                          x + ((long long)(block * 4 + i) * lines + tile.token) * 128, bytes,
                          rings.chunks_full + c.stage);
                advance<CHUNK_STAGES>(c);
            }
        }
    }
}

typedef float Sums[COLUMNS / 8][4];

// Four steps: 64 columns of W. `previous` is the chunk whose products end before this returns.
__device__ __forceinline__ void multiply_chunk(
    Sums& sum, const u32 (&a)[4][4], const Rings& rings, Cursor& c, int lane) {
    barrier_wait(rings.chunks_full + c.stage, c.phase);
    // The mask changes no address, only the order of instructions, in which this is measured.
    const u32 chunk = shared_address(rings.chunks + c.stage * CHUNK_BYTES) & 0x3ffff;
    const u64 b = swizzled_operand(chunk);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma(sum, a[step], b + 2 * step);
    wgmma_commit();
    wgmma_wait<1>();
}

__device__ __forceinline__ void release_chunk(const Rings& rings, int& stage, int next, int lane) {
    if (stage >= 0 && lane == 0) barrier_arrive(rings.chunks_empty + stage);
    stage = next;
}

// All of a stripe's units: the sums of 64 rows.
template <int type>
__device__ __forceinline__ void multiply_stripe(
    Sums& sum, const Rings& rings, Cursor& w, Cursor& c, int num_blocks, int group, int warp,
    int lane) {
    int held = -1;
    Factors factors;
    for (int block = 0; block < num_blocks; block++) {
        barrier_wait(rings.weights_full + w.stage, w.phase);
        const u8* tile =
            rings.weights + (w.stage * 2 + group) * UNIT_BYTES + warp * TILE_BYTES[type];
        load_factors<type>(factors, tile, lane);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            HalfTile h;
            load_half<type>(h, tile, lane, half);
#pragma unroll
            for (int part = 0; part < 2; part++) {
                u32 a[4][4];
#pragma unroll
                for (int step = 0; step < 4; step++)
                    fragment<type>(a[step], h, tile, lane, half, part * 4 + step);
                // Every lane for its own reads: racecheck knows no lane that speaks for its warp.
                if (half + part == 2) barrier_arrive(rings.weights_empty + w.stage);
                multiply_chunk(sum, a, rings, c, lane);
                release_chunk(rings, held, c.stage, lane);
                advance<CHUNK_STAGES>(c);
            }
        }
        advance<WEIGHT_STAGES>(w);
    }
    wgmma_wait<0>();
    release_chunk(rings, held, -1, lane);
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; i++) close_sums<type>(sum[i], factors);
}

template <int type>
__device__ __forceinline__ void dispatch(
    int wanted, Sums& sum, const Rings& rings, Cursor& w, Cursor& c, int num_blocks, int group,
    int warp, int lane) {
    if constexpr (type < NUM_TYPES) {
        if constexpr ((TYPES >> type) & 1) {
            if (wanted == type)
                return multiply_stripe<type>(sum, rings, w, c, num_blocks, group, warp, lane);
        }
        dispatch<type + 1>(wanted, sum, rings, w, c, num_blocks, group, warp, lane);
    }
}

template <typename Work>
__device__ void consume(const Rings& rings, const Work& work, const Output& out) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Cursor w = {0, 0}, c = {0, 0};
    Tile tile;
    for (int index = blockIdx.x; work.find(index, tile); index += gridDim.x) {
        const Stripe stripe = work.stripe(tile, group);
        Sums sum = {};
        dispatch<0>(stripe.type, sum, rings, w, c, tile.num_blocks, group, warp, lane);
        const int row = warp * tile_height(stripe.type) + lane / 4;
        write_sums(out, tile, stripe, row, tile.token + lane % 4 * 2, sum);
    }
}

// The whole of a kernel's block, after its Work is known.
template <typename Work>
__device__ __forceinline__ void multiply_all(
    u8* memory, const Work& work, const u8* x, const Output& out) {
    __shared__ u64 barriers[2 * (WEIGHT_STAGES + CHUNK_STAGES)];
    const u32 skew = -shared_address(memory) & 1023;
    Rings rings;
    rings.chunks = memory + skew;
    rings.weights = rings.chunks + CHUNK_STAGES * CHUNK_BYTES;
    rings.weights_full = barriers, rings.weights_empty = barriers + WEIGHT_STAGES;
    rings.chunks_full = barriers + 2 * WEIGHT_STAGES;
    rings.chunks_empty = rings.chunks_full + CHUNK_STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2 * WEIGHT_STAGES; i++)
            barrier_init(barriers + i, i < WEIGHT_STAGES ? 1 : 256);
        for (int i = 0; i < 2 * CHUNK_STAGES; i++)
            barrier_init(rings.chunks_full + i, i < CHUNK_STAGES ? 1 : 8);
        barrier_init_done();
        publish_shared();
    }
    __syncthreads();
    if (threadIdx.x >= 256) {
        shrink_registers<40>();
        if (threadIdx.x == 256) produce(rings, work, x, out.lines);
    } else {
        grow_registers<232>();
        consume(rings, work, out);
    }
}
#else
#define GEMM_BOUNDS __launch_bounds__(THREADS)
constexpr int THREADS = 128;
constexpr int TILE_STRIPES = 1;

// All threads together; complete after the group's wait and a block barrier.
__device__ __forceinline__ void copy_part(u8* to, const u8* from, int bytes) {
    for (int at = threadIdx.x * 16; at < bytes; at += THREADS * 16)
        copy_async_16(shared_address(to + at), from + at);
}

// Four steps of one warp: 16 rows x COLUMNS tokens. `quarter` is a constant once unrolled.
template <int type>
__device__ __forceinline__ void multiply_chunk(
    float (&sum)[COLUMNS / 8][4], const u8* tile, const u8* chunk, int quarter, int lane) {
    const int half = quarter / 2;
    HalfTile h;
    load_half<type>(h, tile, lane, half);
#pragma unroll
    for (int step = 0; step < 4; step++) {
        u32 a[4];
        fragment<type>(a, h, tile, lane, half, quarter % 2 * 4 + step);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
            const int token = n * 8 + lane / 4, swizzle = token % 8;
            const u8* at = chunk + token * 128 + lane % 4 * 4;
            const u32 b0 = shared_4(at + ((2 * step) ^ swizzle) * 16);
            const u32 b1 = shared_4(at + ((2 * step + 1) ^ swizzle) * 16);
            mma_m16n8k16(sum[n], a, b0, b1);
        }
    }
}

template <int type = 0>
__device__ __forceinline__ void dispatch(
    int wanted, float (&sum)[COLUMNS / 8][4], const u8* tile, const u8* chunk, int quarter,
    int lane) {
    if constexpr (type < NUM_TYPES) {
        if constexpr ((TYPES >> type) & 1) {
            if (wanted == type) return multiply_chunk<type>(sum, tile, chunk, quarter, lane);
        }
        dispatch<type + 1>(wanted, sum, tile, chunk, quarter, lane);
    }
}

template <int type = 0>
__device__ __forceinline__ void close_all(
    int wanted, float (&sum)[COLUMNS / 8][4], const u8* tile, int lane) {
    if constexpr (type < NUM_TYPES) {
        if constexpr (((TYPES >> type) & 1) && HAS_FACTORS<type>) {
            if (wanted == type) {
                Factors factors;
                load_factors<type>(factors, tile, lane);
#pragma unroll
                for (int i = 0; i < COLUMNS / 8; i++) close_sums<type>(sum[i], factors);
            }
        }
        close_all<type + 1>(wanted, sum, tile, lane);
    }
}

template <typename Work>
__device__ __forceinline__ void multiply_all(
    u8* memory, const Work& work, const u8* x, const Output& out) {
    u8* weight_ring = memory + CHUNK_STAGES * CHUNK_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Tile tile;
    for (int index = blockIdx.x; work.find(index, tile); index += gridDim.x) {
        const Stripe stripe = work.stripe(tile, 0);
        const int unit_bytes = stripe.tile_bytes * 4, num_chunks = tile.num_blocks * 4;
        const int bytes = min(COLUMNS, tile.padded_end - tile.token) * 128;
        auto issue = [&](int chunk) {
            if (chunk < num_chunks) {
                copy_part(memory + chunk % CHUNK_STAGES * CHUNK_BYTES,
                          x + ((long long)chunk * out.lines + tile.token) * 128, bytes);
                if (chunk % 4 == 0)
                    copy_part(weight_ring + chunk / 4 % WEIGHT_STAGES * UNIT_BYTES,
                              stripe.units + (long long)(chunk / 4) * unit_bytes, unit_bytes);
            }
            copy_async_commit();
        };
        for (int chunk = 0; chunk < CHUNK_STAGES - 1; chunk++) issue(chunk);
        float sum[COLUMNS / 8][4] = {};
        for (int block = 0; block < tile.num_blocks; block++) {
            const u8* unit = weight_ring + block % WEIGHT_STAGES * UNIT_BYTES;
#pragma unroll
            for (int quarter = 0; quarter < 4; quarter++) {
                const int chunk = block * 4 + quarter;
                copy_async_wait<CHUNK_STAGES - 2>();
                __syncthreads();
                issue(chunk + CHUNK_STAGES - 1);
                dispatch(stripe.type, sum, unit + warp * stripe.tile_bytes,
                         memory + chunk % CHUNK_STAGES * CHUNK_BYTES, quarter, lane);
            }
        }
        const u8* last = weight_ring + (tile.num_blocks - 1) % WEIGHT_STAGES * UNIT_BYTES;
        close_all(stripe.type, sum, last + warp * stripe.tile_bytes, lane);
        const int row = warp * tile_height(stripe.type) + lane / 4;
        write_sums(out, tile, stripe, row, tile.token + lane % 4 * 2, sum);
        copy_async_wait<0>();
        __syncthreads();
    }
}
#endif
