// Where keys and values lie in memory: pages of 64 tokens, all attention layers of a page
// together.
//
//   pool   u8 [pages][layers][K plane | V plane]     one page of all layers is one contiguous copy
//   plane  [kv_heads][head block]                    K and V each in their own format
//   block  64 tokens x 256 dims of one head:
//     bf16        [4 panels of 64 dims][64 tokens][64 dims]          32,768 bytes
//     fp8 (e4m3)  [64 tokens][256]                                   16,384
//     q8_0        [64 tokens][256] u8 = value + 128, [64][8] f16     17,408
//     q4_0        [64 tokens][128] nibbles,          [64][8] f16      9,216
//
// The 16-byte chunks of a row are exchanged by the token's low bits, so that a linear copy of a
// block to shared memory can be read without bank conflicts; panels of bf16 are the 128-byte
// swizzle that wgmma expects. q8_0 and q4_0 have one f16 scale for 32 dims, as in GGUF. In a word
// of q4_0, dims 0, 2, 4, 6 are the low four nibbles and dims 1, 3, 5, 7 the high four.
#pragma once
#include "half.cuh"

enum KvFormat { KV_BF16 = 0, KV_Q8_0 = 1, KV_FP8 = 2, KV_Q4_0 = 3 };

constexpr int PAGE = 64;
constexpr int HEAD_DIM = 256;
constexpr int SCALE_GROUPS = HEAD_DIM / 32;
constexpr float LOG2_SCALE = 0.0625f * 1.44269504088896f;  // 1 / sqrt(HEAD_DIM), base 2

__host__ __device__ constexpr int kv_row_bytes(int format) {
    return format == KV_BF16 ? 512 : format == KV_Q4_0 ? 128 : 256;
}

__host__ __device__ constexpr bool kv_has_scales(int format) {
    return format == KV_Q8_0 || format == KV_Q4_0;
}

__host__ __device__ constexpr int kv_block_bytes(int format) {
    return PAGE * (kv_row_bytes(format) + (kv_has_scales(format) ? SCALE_GROUPS * 2 : 0));
}

// For 8-bit and 4-bit rows: lanes (token pair, chunk) and (chunk, even tokens) both hit all banks.
__device__ __forceinline__ int narrow_swizzle(int token) {
    return (((token >> 1) & 3) << 1) ^ ((token & 1) << 2);
}

// Byte offset of a 16-byte chunk (0-based within the row of 256 dims) in a head block.
template <int FORMAT>
__device__ __forceinline__ int kv_chunk_offset(int token, int chunk) {
    if constexpr (FORMAT == KV_BF16) {
        return (chunk >> 3) * (PAGE * 128) + token * 128 + (((chunk & 7) ^ (token & 7)) << 4);
    } else {
        return token * kv_row_bytes(FORMAT) + ((chunk ^ narrow_swizzle(token)) << 4);
    }
}

template <int FORMAT>
__device__ __forceinline__ int kv_scale_offset(int token, int group) {
    return PAGE * kv_row_bytes(FORMAT) + (token * SCALE_GROUPS + group) * 2;
}

// Two e4m3 values in the low bytes to two halves.
__device__ __forceinline__ u32 fp8_pair_to_half2(u32 packed) {
    u32 y;
#if __CUDA_ARCH__ >= 890
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.rn.f16x2.e4m3x2 %0, l;}" : "=r"(y) : "r"(packed));
#else
    // e4m3 has exponent bias 7 and f16 has 15: move the bits, then multiply by 2^8.
    u32 wide = __byte_perm(packed, 0, 0x1404);
    y = half2_times((wide & 0x80008000u) | ((wide >> 1) & 0x3f803f80u), 0x5c005c00u);
#endif
    return y;
}

// The nibbles at bits 0 and 16 of `x`, stored with 8 added, to two halves times `scale`.
__device__ __forceinline__ u32 half_nibbles(u32 x, u32 scale) {
    return half2_times(half2_minus((x & 0x000f000fu) | 0x64006400u, 0x64086408u), scale);
}

// Two bytes of `x`, stored with 128 added, to two halves times `scale`.
__device__ __forceinline__ u32 half_bytes(u32 x, u32 selector, u32 scale) {
    return half2_times(half2_minus(__byte_perm(x, 0x64646464u, selector), 0x64806480u), scale);
}

// Bytes 0 and 1, or 2 and 3, of a q8_0 or fp8 row to two halves; fp8 has no scale.
template <int FORMAT>
__device__ __forceinline__ u32 half_low_bytes(u32 x, u32 scale) {
    return FORMAT == KV_FP8 ? fp8_pair_to_half2(x & 0xffffu) : half_bytes(x, 0x4140, scale);
}

template <int FORMAT>
__device__ __forceinline__ u32 half_high_bytes(u32 x, u32 scale) {
    return FORMAT == KV_FP8 ? fp8_pair_to_half2(x >> 16) : half_bytes(x, 0x4342, scale);
}

// Eight dims of one token from floats to the page; `lane` holds dims 8 lane … 8 lane + 7.
template <int FORMAT>
__device__ __forceinline__ void kv_store_row(u8* block, int token, int lane, const float (&x)[8]);

template <>
__device__ __forceinline__ void kv_store_row<KV_BF16>(
    u8* block, int token, int lane, const float (&x)[8]) {
    uint4 packed = {bf16x2_of(x[0], x[1]), bf16x2_of(x[2], x[3]), bf16x2_of(x[4], x[5]),
                    bf16x2_of(x[6], x[7])};
    *reinterpret_cast<uint4*>(block + kv_chunk_offset<KV_BF16>(token, lane)) = packed;
}

__device__ __forceinline__ u32 pack_fp8(float low, float high) {
#if __CUDA_ARCH__ >= 890
    u16 y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
    return y;
#else
    u32 bytes = 0;
    float values[2] = {low, high};
    for (int i = 0; i < 2; ++i) {
        u32 sign = (__float_as_uint(values[i]) >> 24) & 0x80;
        float size = fminf(fabsf(values[i]), 448.0f);
        // Adding 2^k rounds to the format's step: three mantissa bits, steps of 2^-9 at the bottom.
        int exponent = max(int(__float_as_uint(size) >> 23) - 127, -6);
        float step = __uint_as_float(u32(exponent - 3 + 127) << 23);
        u32 steps = u32(__float2int_rn(size / step));
        u32 code = size < 0.015625f ? steps : u32(exponent + 7) * 8 + steps - 8;
        bytes |= (sign | code) << (8 * i);
    }
    return bytes;
#endif
}

template <>
__device__ __forceinline__ void kv_store_row<KV_FP8>(
    u8* block, int token, int lane, const float (&x)[8]) {
    uint2 packed = {pack_fp8(x[0], x[1]) | pack_fp8(x[2], x[3]) << 16,
                    pack_fp8(x[4], x[5]) | pack_fp8(x[6], x[7]) << 16};
    int offset = kv_chunk_offset<KV_FP8>(token, lane >> 1) + (lane & 1) * 8;
    *reinterpret_cast<uint2*>(block + offset) = packed;
}

// q8_0: scale max|x| / 127 over 32 dims, which four lanes hold.
template <>
__device__ __forceinline__ void kv_store_row<KV_Q8_0>(
    u8* block, int token, int lane, const float (&x)[8]) {
    float largest = 0;
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    float scale = largest / 127.0f;
    float inverse = scale > 0 ? 1.0f / scale : 0;
    u32 words[2] = {0, 0};
    for (int i = 0; i < 8; ++i) {
        words[i >> 2] |= u32(__float2int_rn(x[i] * inverse) + 128) << (8 * (i & 3));
    }
    int offset = kv_chunk_offset<KV_Q8_0>(token, lane >> 1) + (lane & 1) * 8;
    *reinterpret_cast<uint2*>(block + offset) = {words[0], words[1]};
    if ((lane & 3) == 0) {
        int at = kv_scale_offset<KV_Q8_0>(token, lane >> 2);
        *reinterpret_cast<u16*>(block + at) = float_to_half(scale);
    }
}

// q4_0: the value of largest magnitude, with its sign, becomes -8.
template <>
__device__ __forceinline__ void kv_store_row<KV_Q4_0>(
    u8* block, int token, int lane, const float (&x)[8]) {
    float low = x[0], high = x[0];
    for (int i = 1; i < 8; ++i) low = fminf(low, x[i]), high = fmaxf(high, x[i]);
    for (int step = 1; step <= 2; step *= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, step));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
    }
    float scale = (-low > high ? low : high) / -8.0f;
    float inverse = scale != 0 ? 1.0f / scale : 0;
    u32 word = 0;
    for (int i = 0; i < 8; ++i) {
        u32 level = u32(min(15, int(x[i] * inverse + 8.5f)));
        word |= level << (4 * ((i >> 1) + 4 * (i & 1)));
    }
    int offset = kv_chunk_offset<KV_Q4_0>(token, lane >> 2) + (lane & 3) * 4;
    *reinterpret_cast<u32*>(block + offset) = word;
    if ((lane & 3) == 0) {
        int at = kv_scale_offset<KV_Q4_0>(token, lane >> 2);
        *reinterpret_cast<u16*>(block + at) = float_to_half(scale);
    }
}
