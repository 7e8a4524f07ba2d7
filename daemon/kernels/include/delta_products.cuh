// Matrix products of the delta net's scan: left operands in registers, right ones panels in shared
// memory, accumulators float32 [16 rows a warp][columns]. On sm_90a the four warps of a block issue
// them together (wgmma), asynchronously: between products_commit and products_wait no register of
// theirs may be touched. Elsewhere mma.sync, and the waits are empty.
#pragma once
#include "delta_tiles.cuh"

typedef float TokenColumns[8][4];  // [16 v][64 tokens]
typedef float KeyColumns[16][4];   // [16 v][128 k]
typedef u32 TokenOperand[4][4];    // [16 v][64 tokens] in fp16, 16 tokens an entry
typedef u32 KeyOperand[8][4];      // [16 v][128 k] in fp16

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "barriers.cuh"
#include "wgmma.cuh"

__device__ __forceinline__ void products_begin() { wgmma_fence(); }
__device__ __forceinline__ void products_commit() { wgmma_commit(); }
template <int pending>
__device__ __forceinline__ void products_wait() { wgmma_wait<pending>(); }

// Panels that ordinary copies have written become visible to the products; before the barrier.
__device__ __forceinline__ void publish_panels() { publish_shared(); }

// Panels lie side by side.
__device__ __forceinline__ u64 panel_operand(u32 address) {
    return swizzled_operand(address, PANEL_BYTES);
}

// c = (tile a')': `tile` [64 tokens][128 k].
__device__ __forceinline__ void read_tile(TokenColumns& c, const KeyOperand& a, u32 tile,
                                          const PanelLanes&) {
    wgmma(c, a[0], panel_operand(tile), false);
#pragma unroll
    for (int step = 1; step < 8; ++step)
        wgmma(c, a[step], panel_operand(tile + step / 4 * PANEL_BYTES + step % 4 * 32));
}

// c (+)= (lower a')' for a lower triangle whose panel has rows i.
__device__ __forceinline__ void add_lower(TokenColumns& c, const TokenOperand& a, u32 panel,
                                          const PanelLanes&) {
#pragma unroll
    for (int step = 0; step < 4; ++step) wgmma(c, a[step], panel_operand(panel + step * 32));
}

// c = (lower a')' for a lower triangle whose panel is transposed, rows j.
__device__ __forceinline__ void multiply_lower_transposed(TokenColumns& c, const TokenOperand& a,
                                                          u32 panel, const PanelLanes&) {
    wgmma<true>(c, a[0], panel_operand(panel), false);
#pragma unroll
    for (int step = 1; step < 4; ++step)
        wgmma<true>(c, a[step], panel_operand(panel + step * 2048));
}

// c += a tile: `tile` [64 tokens][128 k].
__device__ __forceinline__ void add_outer(KeyColumns& c, const TokenOperand& a, u32 tile,
                                          const PanelLanes&) {
#pragma unroll
    for (int step = 0; step < 4; ++step) wgmma<true>(c, a[step], panel_operand(tile + step * 2048));
}

#else

__device__ __forceinline__ void products_begin() {}
__device__ __forceinline__ void products_commit() {}
template <int pending>
__device__ __forceinline__ void products_wait() {}
__device__ __forceinline__ void publish_panels() {}

__device__ __forceinline__ void clear(TokenColumns& c) {
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
}

// c = (tile a')': `tile` [64 tokens][128 k].
__device__ __forceinline__ void read_tile(TokenColumns& c, const KeyOperand& a, u32 tile,
                                          const PanelLanes& lanes) {
    clear(c);
#pragma unroll
    for (int step = 0; step < 8; ++step) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            u32 b[4];
            load_matrices(b, lanes.by_rows(tile + step / 4 * PANEL_BYTES, pair, step % 4));
            mma_m16n8k16(c[pair * 2], a[step], b[0], b[1]);
            mma_m16n8k16(c[pair * 2 + 1], a[step], b[2], b[3]);
        }
    }
}

// c (+)= (lower a')' for a lower triangle whose panel has rows i.
__device__ __forceinline__ void add_lower(TokenColumns& c, const TokenOperand& a, u32 panel,
                                          const PanelLanes& lanes) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int pair = step; pair < 4; ++pair) {
            u32 b[4];
            load_matrices(b, lanes.by_rows(panel, pair, step));
            mma_m16n8k16(c[pair * 2], a[step], b[0], b[1]);
            mma_m16n8k16(c[pair * 2 + 1], a[step], b[2], b[3]);
        }
    }
}

// c = (lower a')' for a lower triangle whose panel is transposed, rows j.
__device__ __forceinline__ void multiply_lower_transposed(TokenColumns& c, const TokenOperand& a,
                                                          u32 panel, const PanelLanes& lanes) {
    clear(c);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int pair = step; pair < 4; ++pair) {
            u32 b[4];
            load_matrices_transposed(b, lanes.by_columns(panel, pair, step));
            mma_m16n8k16(c[pair * 2], a[step], b[0], b[1]);
            mma_m16n8k16(c[pair * 2 + 1], a[step], b[2], b[3]);
        }
    }
}

// c += a tile: `tile` [64 tokens][128 k].
__device__ __forceinline__ void add_outer(KeyColumns& c, const TokenOperand& a, u32 tile,
                                          const PanelLanes& lanes) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) {
            u32 b[4];
            const u32 panel = tile + pair / 4 * PANEL_BYTES;
            load_matrices_transposed(b, lanes.by_columns(panel, pair % 4, step));
            mma_m16n8k16(c[pair * 2], a[step], b[0], b[1]);
            mma_m16n8k16(c[pair * 2 + 1], a[step], b[2], b[3]);
        }
    }
}

#endif
