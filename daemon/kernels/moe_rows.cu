// The rows of a prompt on their way to the experts and back.
//
// moe_scatter norms a row and writes it to the line of each expert that it chose, and of the shared
// one, whose gate it computes on the way. moe_combine adds what the experts made of it, weighted,
// to the residual: in the order of their rank, the shared one last. A block a row; bound: memory.
//
// Macros: COLUMNS (a multiple of 256), USED, SHARED (1: there is a shared expert).
#include "half.cuh"
#include "operand.cuh"
#include "quads.cuh"
#include "warp.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int QUADS = (COLUMNS + 4 * THREADS - 1) / (4 * THREADS);
constexpr int RANKS = USED + 1;
constexpr int UNITS = COLUMNS / 8;  // of 16 bytes, eight a chunk

// Where a row's copy for a rank lies, and the low bits of its number in its expert's group.
struct Line {
    int line, phase;
};

__device__ __forceinline__ Line line_of(const int* places, int row, int rank, int rows) {
    if (rank == USED) return {rows * USED + row, row % 8};
    const int place = places[row * USED + rank];
    return {place >> 3, place & 7};
}

// The sums of two values over the block, in one order.
__device__ float2 block_sums(float a, float b) {
    __shared__ float2 of_warp[WARPS];
    a = warp_sum(a), b = warp_sum(b);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = make_float2(a, b);
    __syncthreads();
    float2 all = make_float2(0, 0);
    for (int w = 0; w < WARPS; ++w) all.x += of_warp[w].x, all.y += of_warp[w].y;
    return all;
}

// Columns c to c + 3 of a row in the order of a chunk: see operand.cuh.
__device__ __forceinline__ void put(u16* chunks, int c, float4 v) {
    u16* at = chunks + c / 256 * 256 + c % 64 / 4 * 16 + c % 256 / 64 * 2;
    *(u32*)at = half2_of(v.x, v.y);
    *(u32*)(at + 8) = half2_of(v.z, v.w);
}

// x: f32 [rows, COLUMNS]; gate: f32 [COLUMNS], the shared expert's; weights: f32 [rows, RANKS], the
// last of each written; lines: fp16 chunks [COLUMNS / 64, num_lines, 64], swizzled by the phase.
extern "C" __global__ void __launch_bounds__(THREADS) moe_scatter(
    const float* x, const float* norm, const float* gate, const int* places, float* weights,
    u8* lines, int rows, int num_lines, float eps) {
    __shared__ __align__(16) u16 chunks[COLUMNS];
    const int row = blockIdx.x;
    allow_next_kernel();
    wait_for_previous_kernel();
    float4 v[QUADS];
    float squares = 0, score = 0;
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const int c = 4 * (threadIdx.x + q * THREADS);
        v[q] = quad_of(x + (long long)row * COLUMNS, c, COLUMNS);
        const float4 gain = quad_of(norm, c, COLUMNS);
        add_product(squares, v[q], v[q]);
        v[q] = product(v[q], gain);
        if (SHARED) add_product(score, v[q], quad_of(gate, c, COLUMNS));
    }
    const float2 sums = block_sums(squares, score);
    const float scale = rsqrtf(sums.x / COLUMNS + eps), narrow = scale * ACTIVATION_SCALE;
    if (SHARED && threadIdx.x == 0)
        weights[row * RANKS + USED] = 1.0f / (1.0f + expf(-sums.y * scale));
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const int c = 4 * (threadIdx.x + q * THREADS);
        if (c < COLUMNS) put(chunks, c, scaled(v[q], narrow));
    }
    __syncthreads();
    for (int rank = 0; rank < USED + SHARED; ++rank) {
        const Line to = line_of(places, row, rank, rows);
        for (int unit = threadIdx.x; unit < UNITS; unit += THREADS) {
            const long long line = (long long)(unit / 8) * num_lines + to.line;
            *(uint4*)(lines + line * 128 + (unit % 8 ^ to.phase) * 16) = ((uint4*)chunks)[unit];
        }
    }
}

// made: f32 [num_lines, COLUMNS], by the experts; residual: f32 [rows, COLUMNS].
extern "C" __global__ void __launch_bounds__(THREADS) moe_combine(
    const float* made, const int* places, const float* weights, float* residual, int rows) {
    const int row = blockIdx.x;
    allow_next_kernel();
    wait_for_previous_kernel();
#pragma unroll
    for (int q = 0; q < QUADS; ++q) {
        const int c = 4 * (threadIdx.x + q * THREADS);
        if (c >= COLUMNS) continue;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int rank = 0; rank < USED + SHARED; ++rank) {
            const int line = line_of(places, row, rank, rows).line;
            const float4 v = *(const float4*)(made + (long long)line * COLUMNS + c);
            add_scaled(sum, weights[row * RANKS + rank], v);
        }
        float4* at = (float4*)(residual + (long long)row * COLUMNS + c);
        add_scaled(sum, 1.0f, *at);
        *at = sum;
    }
}
