// Router scores of a prompt: scores[row, expert] = norm(x[row, :]) . router[expert, :], in float32.
//
// A plain product on the ordinary arithmetic units: a block makes TILE rows x TILE experts, a
// thread 4 x 4. The norm's scale is found on the way and applied at the end. Each sum runs over k
// in order in one chain, so TILE changes speed and no bits. Bound: float32 arithmetic.
//
// Macros: EXPERTS, COLUMNS (a multiple of 256), TILE (32 or 64).
#include "quads.cuh"
#include "warp.cuh"

constexpr int DEPTH = 16;  // columns in shared memory at once
constexpr int THREADS = TILE * TILE / 16;
constexpr int LOADS = TILE * DEPTH / 4 / THREADS;

// DEPTH columns of TILE rows of x and of the router, columns first.
struct Tiles {
    float x[DEPTH][TILE + 4], router[DEPTH][TILE + 4];
};

__device__ __forceinline__ void put(float (&to)[DEPTH][TILE + 4], int row, int k, float4 v) {
    to[k][row] = v.x, to[k + 1][row] = v.y, to[k + 2][row] = v.z, to[k + 3][row] = v.w;
}

// Four columns of a row for each of a thread's loads.
struct Loads {
    float4 x[LOADS], router[LOADS];
};

__device__ __forceinline__ void load(
    Loads& l, const float* x, const float* norm, const float* router, int rows, int column) {
    const int k = column + threadIdx.x % 4 * 4;
    const float4 gain = *(const float4*)(norm + k);
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int at = (threadIdx.x + i * THREADS) / 4;
        const int row = blockIdx.x * TILE + at, expert = blockIdx.y * TILE + at;
        const float4 none = make_float4(0, 0, 0, 0);
        l.x[i] = row < rows ? *(const float4*)(x + (long long)row * COLUMNS + k) : none;
        l.router[i] = expert < EXPERTS
                          ? product(*(const float4*)(router + expert * COLUMNS + k), gain) : none;
    }
}

__device__ __forceinline__ void add_tile(float (&sum)[4][4], const Tiles& t, int r, int e) {
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
        const float4 a = *(const float4*)&t.x[k][r], b = *(const float4*)&t.router[k][e];
        const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[i][j] = __fmaf_rn(left[i], right[j], sum[i][j]);
    }
}

// scores: f32 [rows, EXPERTS]. Grid: (rows / TILE, EXPERTS / TILE), rounded up.
extern "C" __global__ void __launch_bounds__(THREADS) moe_scores(
    const float* x, const float* norm, const float* router, float* scores, int rows, float eps) {
    __shared__ __align__(16) Tiles tiles[2];
    __shared__ float scale[TILE];
    const int r = threadIdx.x / (TILE / 4) * 4, e = threadIdx.x % (TILE / 4) * 4;
    allow_next_kernel();
    wait_for_previous_kernel();
    Loads l;
    float sum[4][4] = {}, squares[LOADS] = {};
    load(l, x, norm, router, rows, 0);
    for (int column = 0; column < COLUMNS; column += DEPTH) {
        Tiles& t = tiles[column / DEPTH % 2];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int at = (threadIdx.x + i * THREADS) / 4, k = threadIdx.x % 4 * 4;
            add_product(squares[i], l.x[i], l.x[i]);
            put(t.x, at, k, l.x[i]);
            put(t.router, at, k, l.router[i]);
        }
        __syncthreads();
        if (column + DEPTH < COLUMNS) load(l, x, norm, router, rows, column + DEPTH);
        add_tile(sum, t, r, e);
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        squares[i] += __shfl_xor_sync(~0u, squares[i], 1);
        squares[i] += __shfl_xor_sync(~0u, squares[i], 2);
        scale[(threadIdx.x + i * THREADS) / 4] = rsqrtf(squares[i] / COLUMNS + eps);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = blockIdx.x * TILE + r + i, expert = blockIdx.y * TILE + e + j;
            if (row < rows && expert < EXPERTS)
                scores[(long long)row * EXPERTS + expert] = sum[i][j] * scale[r + i];
        }
}
