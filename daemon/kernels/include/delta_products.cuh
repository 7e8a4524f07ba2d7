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

// Keeps arithmetic on accumulators on its side of begin and wait, which the compiler does not see
// to concern registers.
template <int tiles>
__device__ __forceinline__ void hold(float (&c)[tiles][4]) {
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int pending>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Panels that ordinary copies have written become visible to the products; before the barrier.
__device__ __forceinline__ void publish_panels() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A panel for wgmma: 128-byte swizzle, groups of 8 rows 1,024 bytes apart, panels side by side.
__device__ __forceinline__ unsigned long long panel_descriptor(u32 address) {
    return (address >> 4 & 0x3fff) | static_cast<unsigned long long>(PANEL_BYTES >> 4) << 16 |
           static_cast<unsigned long long>(1024 >> 4) << 32 | 1ull << 62;
}

#define ROW4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])

// c (+)= a b: one k step of 16, 64 columns. `transposed`: the panel's rows are k.
template <bool transposed, bool accumulate>
__device__ __forceinline__ void product_64(TokenColumns& c, const u32 (&a)[4], u32 panel) {
    asm volatile(
        "{.reg .pred p;\n setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
        : ROW4(c, 0), ROW4(c, 1), ROW4(c, 2), ROW4(c, 3), ROW4(c, 4), ROW4(c, 5), ROW4(c, 6),
          ROW4(c, 7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(panel_descriptor(panel)),
          "n"(static_cast<int>(accumulate)), "n"(static_cast<int>(transposed)));
}

// c += a b: one k step of 16, 128 columns over two panels whose rows are k.
__device__ __forceinline__ void product_128(KeyColumns& c, const u32 (&a)[4], u32 panel) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : ROW4(c, 0), ROW4(c, 1), ROW4(c, 2), ROW4(c, 3), ROW4(c, 4), ROW4(c, 5), ROW4(c, 6),
          ROW4(c, 7), ROW4(c, 8), ROW4(c, 9), ROW4(c, 10), ROW4(c, 11), ROW4(c, 12), ROW4(c, 13),
          ROW4(c, 14), ROW4(c, 15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(panel_descriptor(panel)));
}

#undef ROW4

// c = (tile a')': `tile` [64 tokens][128 k].
__device__ __forceinline__ void read_tile(TokenColumns& c, const KeyOperand& a, u32 tile,
                                          const PanelLanes&) {
    product_64<false, false>(c, a[0], tile);
#pragma unroll
    for (int step = 1; step < 8; ++step)
        product_64<false, true>(c, a[step], tile + step / 4 * PANEL_BYTES + step % 4 * 32);
}

// c (+)= (lower a')' for a lower triangle whose panel has rows i.
__device__ __forceinline__ void add_lower(TokenColumns& c, const TokenOperand& a, u32 panel,
                                          const PanelLanes&) {
#pragma unroll
    for (int step = 0; step < 4; ++step) product_64<false, true>(c, a[step], panel + step * 32);
}

// c = (lower a')' for a lower triangle whose panel is transposed, rows j.
__device__ __forceinline__ void multiply_lower_transposed(TokenColumns& c, const TokenOperand& a,
                                                          u32 panel, const PanelLanes&) {
    product_64<true, false>(c, a[0], panel);
#pragma unroll
    for (int step = 1; step < 4; ++step) product_64<true, true>(c, a[step], panel + step * 2048);
}

// c += a tile: `tile` [64 tokens][128 k].
__device__ __forceinline__ void add_outer(KeyColumns& c, const TokenOperand& a, u32 tile,
                                          const PanelLanes&) {
#pragma unroll
    for (int step = 0; step < 4; ++step) product_128(c, a[step], tile + step * 2048);
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
            multiply(c[pair * 2], a[step], b[0], b[1]);
            multiply(c[pair * 2 + 1], a[step], b[2], b[3]);
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
            multiply(c[pair * 2], a[step], b[0], b[1]);
            multiply(c[pair * 2 + 1], a[step], b[2], b[3]);
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
            multiply(c[pair * 2], a[step], b[0], b[1]);
            multiply(c[pair * 2 + 1], a[step], b[2], b[3]);
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
            multiply(c[pair * 2], a[step], b[0], b[1]);
            multiply(c[pair * 2 + 1], a[step], b[2], b[3]);
        }
    }
}

#endif
