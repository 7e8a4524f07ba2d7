// What the two expert kernels of decode share: where tiles lie, and their products with up to 16
// rows. Macros: TYPES, NUM_PANELS as in quant_gemv; those of weight_ring.cuh.
#pragma once
#include "mma.cuh"
#include "operand.cuh"
#include "quant_sums.cuh"
#include "weight_ring.cuh"

constexpr int MAX_ROWS = 16;
constexpr int TOKENS = 8 * NUM_PANELS;

// The matrices of all routed experts, or the shared expert's.
struct Matrix {
    const u8* tiles;
    int type, tile_bytes;
    int tile_rows;   // of one expert, of tile_height rows each
    int num_blocks;  // 256 columns each

    __device__ __forceinline__ const u8* tile(int expert, int row, int block) const {
        const long long unit = (long long)(expert * (tile_rows / 4) + row / 4) * num_blocks + block;
        return tiles + (unit * 4 + row % 4) * tile_bytes;
    }
};

typedef float Sums[NUM_PANELS][2][4];  // even and odd steps apart, to shorten the chain of products

// How much of x a warp holds at once: a whole tile's, as far as registers reach.
constexpr int HELD_CHUNKS = NUM_PANELS == 1 ? 8 : 4;
typedef uint4 Rows[NUM_PANELS][HELD_CHUNKS];

// 256 columns of all rows as B operands: fp16 panels, of which the next is `panel_bytes` further.
struct Input {
    const u8* panels;
    int panel_bytes, num_rows;
};

__device__ __forceinline__ void load_rows(Rows& x, const Input& in, int chunk, int lane) {
    const u8* at = in.panels + chunk * 512 + lane * 16;
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++, at += in.panel_bytes)
#pragma unroll
        for (int i = 0; i < HELD_CHUNKS; i++)
            x[n][i] = 8 * n + lane / 4 < in.num_rows ? __ldcg((const uint4*)(at + i * 512))
                                                     : make_uint4(0, 0, 0, 0);
}

// A tile of an expert times all rows of x, over 256 columns. `x` holds the first chunks; with
// two panels the others are loaded on the way, and `x` holds the last ones after that.
template <int type>
__device__ __forceinline__ void multiply_tile(
    Sums& sum, const u8* tile, Rows& x, const Input& in, int lane) {
    Sums own = {};
    Sums& to = HAS_FACTORS<type> ? own : sum;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        HalfTile h;
        load_half<type>(h, tile, lane, half);
        if (half == 1 && HELD_CHUNKS == 4) load_rows(x, in, 4, lane);
#pragma unroll
        for (int step = 0; step < 8; step++) {
            u32 a[4];
            fragment<type>(a, h, tile, lane, half, step);
#pragma unroll
            for (int n = 0; n < NUM_PANELS; n++) {
                const uint4& v = x[n][(half * 4 + step / 2) % HELD_CHUNKS];
                if (step % 2 == 0) mma_m16n8k16(to[n][0], a, v.x, v.y);
                else mma_m16n8k16(to[n][1], a, v.z, v.w);
            }
        }
    }
    if constexpr (HAS_FACTORS<type>) {
        Factors factors;
        load_factors<type>(factors, tile, lane);
#pragma unroll
        for (int i = 0; i < 2 * NUM_PANELS; i++) {
            close_sums<type>(own[i / 2][i % 2], factors);
#pragma unroll
            for (int c = 0; c < 4; c++) sum[i / 2][i % 2][c] += own[i / 2][i % 2][c];
        }
    }
}

template <int type = 0>
__device__ __forceinline__ void multiply(
    int wanted, Sums& sum, const u8* tile, Rows& x, const Input& in, int lane) {
    if constexpr (type < NUM_TYPES) {
        if constexpr ((TYPES >> type) & 1) {
            if (wanted == type) return multiply_tile<type>(sum, tile, x, in, lane);
        }
        multiply<type + 1>(wanted, sum, tile, x, in, lane);
    }
}
