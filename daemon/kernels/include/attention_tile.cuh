// A page of keys or values as a 16-bit tile in shared memory, for the prefill kernels.
//
// The tile is a bf16 head block (kv_format.cuh): [4 panels of 64 dims][64 tokens][64 dims] with
// 16-byte chunks exchanged by token & 7, which ldmatrix reads without conflicts and wgmma knows as
// the 128-byte swizzle. bf16 pages are copied as they are; other formats become f16.
#pragma once
#include "kv_format.cuh"

constexpr int TILE_BYTES = PAGE * HEAD_DIM * 2;

// What one block of THREADS keeps in registers of a page that is on its way.
template <int FORMAT, int THREADS>
struct PageInFlight {
    static constexpr int CHUNK_DIMS = HEAD_DIM * 16 / kv_row_bytes(FORMAT);
    static constexpr int CHUNKS = kv_row_bytes(FORMAT) / 16;
    static constexpr int COUNT = PAGE * CHUNKS / THREADS;

    uint4 raw[COUNT];
    u32 scale[COUNT];

    __device__ __forceinline__ static int token_of(int i, int thread) {
        return (i * THREADS + thread) / CHUNKS;
    }

    // Chunk of dims that the 16 bytes hold; they lie in memory in exchanged order.
    __device__ __forceinline__ static int chunk_of(int i, int thread) {
        return ((i * THREADS + thread) % CHUNKS) ^ narrow_swizzle(token_of(i, thread));
    }

    // Tokens from `valid` on become zero: an earlier owner of the page may have left infinities.
    __device__ __forceinline__ void load(const u8* block, int valid, int thread) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const bool exists = token_of(i, thread) < valid;
            const uint4* source = reinterpret_cast<const uint4*>(block) + i * THREADS + thread;
            raw[i] = exists ? *source : uint4{0, 0, 0, 0};
            if constexpr (kv_has_scales(FORMAT)) {
                const int group = chunk_of(i, thread) * CHUNK_DIMS / 32;
                const int at = kv_scale_offset<FORMAT>(token_of(i, thread), group);
                scale[i] = exists ? *reinterpret_cast<const u16*>(block + at) * 0x10001u : 0;
            }
        }
    }

    __device__ __forceinline__ void store(u8* tile, int thread) const {
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
    __device__ __forceinline__ void store_nibbles(u8* tile, int token, int chunk, u32 word,
                                                  int i) const {
        uint4 wide = {half_nibbles(word, scale[i]), half_nibbles(word >> 4, scale[i]),
                      half_nibbles(word >> 8, scale[i]), half_nibbles(word >> 12, scale[i])};
        *reinterpret_cast<uint4*>(tile + kv_chunk_offset<KV_BF16>(token, chunk)) = wide;
    }

    __device__ __forceinline__ void store_bytes(u8* tile, int token, int chunk, u32 low, u32 high,
                                                int i) const {
        uint4 wide = {half_low_bytes<FORMAT>(low, scale[i]), half_high_bytes<FORMAT>(low, scale[i]),
                      half_low_bytes<FORMAT>(high, scale[i]),
                      half_high_bytes<FORMAT>(high, scale[i])};
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
