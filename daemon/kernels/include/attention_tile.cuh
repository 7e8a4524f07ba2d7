// A page of keys or values as a 16-bit tile in shared memory, for the prefill kernels.
//
// The tile is a bf16 head block (kv_format.cuh): [4 panels of 64 dims][64 tokens][64 dims] with
// 16-byte chunks exchanged by token & 7, which ldmatrix reads without conflicts and wgmma knows as
// the 128-byte swizzle. bf16 pages are copied as they are; other formats become f16.
#pragma once
#include "kv_format.cuh"
#include "warp.cuh"

constexpr int TILE_BYTES = PAGE * HEAD_DIM * 2;

// What one block of THREADS keeps in registers of a page that is on its way.
template <int FORMAT, int THREADS>
struct PageInFlight {
    static constexpr int CHUNK_DIMS = HEAD_DIM * 16 / kv_row_bytes(FORMAT);
    static constexpr int CHUNKS = kv_row_bytes(FORMAT) / 16;
    static constexpr int COUNT = PAGE * CHUNKS / THREADS;

    uint4 raw[COUNT];
    u32 scale[COUNT / 2];  // two halves each

    __device__ __forceinline__ static int token_of(int i, int thread) {
        return (i * THREADS + thread) / CHUNKS;
    }

    // Chunk of dims that the 16 bytes hold; they lie in memory in exchanged order.
    __device__ __forceinline__ static int chunk_of(int i, int thread) {
        return ((i * THREADS + thread) % CHUNKS) ^ narrow_swizzle(token_of(i, thread));
    }

    // Tokens from `valid` on become zero: an earlier owner of the page may have left infinities.
    __device__ __forceinline__ void load(const u8* block, int valid, int thread) {
        asm volatile("" : "+r"(thread));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const bool exists = token_of(i, thread) < valid;
            const uint4* source = reinterpret_cast<const uint4*>(block) + i * THREADS + thread;
            raw[i] = exists ? *source : uint4{0, 0, 0, 0};
            if constexpr (kv_has_scales(FORMAT)) {
                const int group = chunk_of(i, thread) * CHUNK_DIMS / 32;
                const int at = kv_scale_offset<FORMAT>(token_of(i, thread), group);
                const u32 bits = exists ? *reinterpret_cast<const u16*>(block + at) : 0;
                scale[i / 2] = i & 1 ? scale[i / 2] | bits << 16 : bits;
            }
        }
    }

    __device__ __forceinline__ void store(u8* tile, int thread) const {
        // Hidden from the compiler, which would keep all addresses in registers across the loop.
        asm volatile("" : "+r"(thread));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int token = token_of(i, thread), chunk = chunk_of(i, thread);
            const u32 words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
            if constexpr (FORMAT == KV_Q4_0) {
#pragma unroll
                for (int w = 0; w < 4; ++w) store_nibbles(tile, token, 4 * chunk + w, words[w], i);
            } else {
#pragma unroll
                for (int w = 0; w < 4; w += 2) {
                    store_bytes(tile, token, 2 * chunk + w / 2, words[w], words[w + 1], i);
                }
            }
        }
    }

   private:
    __device__ __forceinline__ u32 scale_of(int i) const {
        return __byte_perm(scale[i / 2], 0, i & 1 ? 0x3232 : 0x1010);
    }

    __device__ __forceinline__ void store_nibbles(u8* tile, int token, int chunk, u32 word,
                                                  int i) const {
        uint4 wide = {half_nibbles(word, scale_of(i)), half_nibbles(word >> 4, scale_of(i)),
                      half_nibbles(word >> 8, scale_of(i)), half_nibbles(word >> 12, scale_of(i))};
        *reinterpret_cast<uint4*>(tile + kv_chunk_offset<KV_BF16>(token, chunk)) = wide;
    }

    __device__ __forceinline__ void store_bytes(u8* tile, int token, int chunk, u32 low, u32 high,
                                                int i) const {
        const u32 scale = scale_of(i);
        uint4 wide = {half_low_bytes<FORMAT>(low, scale), half_high_bytes<FORMAT>(low, scale),
                      half_low_bytes<FORMAT>(high, scale), half_high_bytes<FORMAT>(high, scale)};
        *reinterpret_cast<uint4*>(tile + kv_chunk_offset<KV_BF16>(token, chunk)) = wide;
    }
};

// Starts the copy of a bf16 page; tokens from `valid` on become zero.
template <int THREADS>
__device__ __forceinline__ void copy_page(u8* tile, const u8* block, int valid, int thread) {
    const u32 target = shared_address(tile);
#pragma unroll
    for (int i = thread; i < TILE_BYTES / 16; i += THREADS) {
        const int token = (i / 8) % PAGE;
        copy_async_16_or_zero(target + i * 16, block + i * 16, token < valid);
    }
}
