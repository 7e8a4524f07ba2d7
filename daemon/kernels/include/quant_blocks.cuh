// Packed weight tiles, and their values as operands of matrix instructions.
//
// A tile is 16 rows x 256 columns of one quantized matrix, laid out for the A operand of
// m16n8k16: lane 4g+t owns rows g and g+8 and columns 64t..64t+63, so that it needs few scales.
// Step j (0..15) multiplies its columns 64t+4j..64t+4j+3. Four tiles (64 rows) of the same columns
// are a unit, the units of 64 rows a stripe; all are contiguous, so weights stream in order.
// Tiles of F32 have 8 rows of the matrix: rows 0..7 their values in fp16, rows 8..15 what is left.
//
// Planes of a tile, in this order (chunk c of a plane: 32 lanes x 16 bytes):
//   low bits   Q4_K Q5_K Q6_K IQ4_XS Q4_0: 4 chunks, c = (columns / 32) * 2 + row half; a 32-bit
//              word holds columns 8w..8w+7, pair p at bits 4p and 4p+16
//              Q8_0: 8 chunks, c = (columns / 16) * 2 + row half; bytes biased by 128
//              F16 F32: 16 chunks, one a step: registers a0..a3
//   high bits  Q5_K: 1 chunk, words as the 4 low chunks; pair P (0..15) at bits P and P+16
//              Q6_K: 2 chunks, one a row half; word (columns / 16), pair P (0..7) at 2P and 2P+16
//   scales     Q4_K Q5_K: 4 words a row; word t: scale, scale, min, min of sub-blocks 2t, 2t+1 in
//              6 bits each, and byte t of (d, dmin)
//              Q6_K: 16 int8 a row, then 16 fp16 d; Q8_0, Q4_0: 8 fp16 a row
//              IQ4_XS: 4 16-bit words a row; word t: two 6-bit scales and bits 4t..4t+3 of d
//              F16 F32: a float a row, a power of two by which sums are multiplied; the same in all
//              tiles of the row. It brings a row of bf16 or float32 into the range of fp16.
#pragma once
#include "half.cuh"

enum QuantType {
    Q4_K = 0, Q5_K = 1, Q6_K = 2, Q8_0 = 3, IQ4_XS = 4, Q4_0 = 5, F16 = 6, F32 = 7, NUM_TYPES = 8
};

constexpr int TILE_BYTES[NUM_TYPES] = {2304, 2816, 3360, 4352, 2176, 2304, 8256, 8256};
constexpr int SCALES_AT[NUM_TYPES] = {2048, 2560, 3072, 4096, 2048, 2048, 8192, 8192};

// What a lane keeps of a tile while it makes 8 steps (one half: 32 of its 64 columns).
struct HalfTile {
    uint4 low[2];    // by row half; Q8_0: [row half] of the first 16 columns
    uint4 more[2];   // Q8_0: of the next 16 columns
    u32 high[2][2];  // [row half][columns / 16]
    u32 scale[2][2]; // fp16 pairs, [row half][columns / 16]
    u32 minimum[2];  // fp16 pairs, [row half]
    u32 bias;        // 1024 in fp16, twice: an integer below 1024 in the low bits adds on
};

// A value that the assembler does not know, or it would keep no register for it: an AND-OR takes
// one constant, and it would then move each mask to a register anew.
__device__ __forceinline__ u32 kept_bias() { return 0x64006400u + (gridDim.z - 1); }

__device__ __forceinline__ uint4 shared_16(const u8* at) { return *(const uint4*)at; }
__device__ __forceinline__ u32 shared_4(const u8* at) { return *(const u32*)at; }

template <int type>
__device__ __forceinline__ void load_scales(HalfTile& h, const u8* tile, int lane, int half) {
    const u8* scales = tile + SCALES_AT[type];
    const int t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = (lane >> 2) + 8 * r;
        if constexpr (type == Q4_K || type == Q5_K) {
            const uint4 all = shared_16(scales + row * 16);
            const u32 own = shared_4(scales + row * 16 + t * 4);
            const u32 dd = __byte_perm(
                __byte_perm(all.x, all.y, 0x0073), __byte_perm(all.z, all.w, 0x0073), 0x5410);
            const float d = half_to_float(dd), dmin = half_to_float(dd >> 16);
            h.scale[r][0] = h.scale[r][1] = half2_twice(d * float((own >> (6 * half)) & 63));
            h.minimum[r] = half2_twice(-dmin * float((own >> (12 + 6 * half)) & 63));
        } else if constexpr (type == Q6_K) {
            const float d = half_to_float(*(const u16*)(scales + 256 + row * 2));
            const char2 own = *(const char2*)(scales + row * 16 + t * 4 + half * 2);
            h.scale[r][0] = half2_twice(d * float(own.x));
            h.scale[r][1] = half2_twice(d * float(own.y));
        } else if constexpr (type == IQ4_XS) {
            const uint2 all = *(const uint2*)(scales + row * 8);
            const u32 own = *(const u16*)(scales + row * 8 + t * 2);
            const u32 bits = ((all.x >> 12) & 0xf) | ((all.x >> 24) & 0xf0) |
                             ((all.y >> 4) & 0xf00) | ((all.y >> 16) & 0xf000);
            const int scale = int((own >> (6 * half)) & 63) - 32;
            h.scale[r][0] = h.scale[r][1] = half2_twice(half_to_float(bits) * float(scale));
        } else if constexpr (type == Q8_0 || type == Q4_0) {
            const u32 d = *(const u16*)(scales + row * 16 + t * 4 + half * 2);
            h.scale[r][0] = h.scale[r][1] = d | (d << 16);
        }
    }
}

// Reads a lane's part of a tile in shared memory: columns 64t + 32 half ... + 31.
template <int type>
__device__ __forceinline__ void load_half(HalfTile& h, const u8* tile, int lane, int half) {
    const u8* at = tile + lane * 16;
    if constexpr (type == F16 || type == F32) return;
    h.bias = kept_bias();
    if constexpr (type == Q8_0) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            h.low[r] = shared_16(at + (half * 4 + r) * 512);
            h.more[r] = shared_16(at + (half * 4 + 2 + r) * 512);
        }
    } else {
        h.low[0] = shared_16(at + half * 1024);
        h.low[1] = shared_16(at + half * 1024 + 512);
    }
    if constexpr (type == Q5_K) {
        const uint2 high = *(const uint2*)(at + 2048 + half * 8);
        h.high[0][0] = high.x;
        h.high[1][0] = high.y;
    }
    if constexpr (type == Q6_K) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint2 high = *(const uint2*)(at + 2048 + r * 512 + half * 8);
            h.high[r][0] = high.x;
            h.high[r][1] = high.y;
        }
    }
    load_scales<type>(h, tile, lane, half);
}

__device__ __forceinline__ u32 word_of(const uint4& v, int index) {
    return index == 0 ? v.x : index == 1 ? v.y : index == 2 ? v.z : v.w;
}

// 16 bytes of int8 codes of IQ4_XS, biased by 128, for four nibbles at bits 0, 4, 8, 12.
__device__ __forceinline__ u32 iq4_bytes(u32 nibbles) {
    const u32 low = __byte_perm(0x3f2d1801u, 0x766a5d4fu, nibbles & 0x7777u);
    const u32 high = __byte_perm(0xa6998d81u, 0xf1d9c5b5u, nibbles & 0x7777u);
    return __byte_perm(low, high, 0x3210u | ((nibbles >> 1) & 0x4444u));
}

__device__ __forceinline__ u32 shifted(u32 word, int left) {
    return left >= 0 ? word << left : word >> -left;
}

// Two neighbouring integer codes, exact in fp16. `pair` counts the 16 pairs of a half.
template <int type>
__device__ __forceinline__ u32 codes(const HalfTile& h, int r, int pair) {
    const u32 bias = h.bias;
    if constexpr (type == Q8_0) {
        const uint4& part = pair < 8 ? h.low[r] : h.more[r];
        const u32 word = word_of(part, (pair & 7) >> 1);
        const u32 wide = __byte_perm(word, bias, (pair & 1) ? 0x7372u : 0x7170u);
        return half2_minus(wide, 0x64806480u);
    }
    const u32 word = word_of(h.low[r], pair >> 2);
    const int p = pair & 3;
    if constexpr (type == IQ4_XS) {
        // Pairs lie at bits 4p and 4p+16: bring two pairs to 16 neighbouring bits.
        const u32 low = (word >> (8 * (p >> 1))) & 0xffu;
        const u32 high = (word >> (16 + 8 * (p >> 1))) & 0xffu;
        const u32 bytes = iq4_bytes(low | (high << 8));
        const u32 wide = __byte_perm(bytes, bias, (p & 1) ? 0x7371u : 0x7270u);
        return half2_minus(wide, 0x64806480u);
    }
    // Odd pairs keep their place, four bits up, which saves a shift: 1024 + 16 code is exact too.
    const bool up = p & 1;
    u32 code = (p < 2 ? word : word >> 8) & (up ? 0x00f000f0u : 0x000f000fu);
    if constexpr (type == Q5_K)
        code |= shifted(h.high[r][0], (up ? 8 : 4) - pair) & (up ? 0x01000100u : 0x00100010u);
    if constexpr (type == Q6_K)
        code |= shifted(h.high[r][pair >> 3], (up ? 8 : 4) - 2 * (pair & 7)) &
                (up ? 0x03000300u : 0x00300030u);
    constexpr u32 zero =
        type == Q6_K ? 0x64206420u : type == Q4_0 ? 0x64086408u : 0x64006400u;
    constexpr u32 zero_up = type == Q6_K ? 0xd600d600u : type == Q4_0 ? 0xd480d480u : 0xd400d400u;
    return up ? half2_fma(code | bias, 0x2c002c00u, zero_up) : half2_minus(code | bias, zero);
}

// Two neighbouring weights, rounded once or twice to fp16.
template <int type>
__device__ __forceinline__ u32 weights(const HalfTile& h, int r, int pair) {
    const u32 code = codes<type>(h, r, pair);
    if constexpr (type == Q4_K || type == Q5_K) return half2_fma(code, h.scale[r][0], h.minimum[r]);
    return half2_times(code, h.scale[r][pair >> 3]);
}

// The A operand of step `half * 8 + step`, step 0..7.
template <int type>
__device__ __forceinline__ void fragment(
    u32 (&a)[4], const HalfTile& h, const u8* tile, int lane, int half, int step) {
    if constexpr (type == F16 || type == F32) {
        const uint4 v = shared_16(tile + (half * 8 + step) * 512 + lane * 16);
        a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
    } else {
        a[0] = weights<type>(h, 0, 2 * step);
        a[1] = weights<type>(h, 1, 2 * step);
        a[2] = weights<type>(h, 0, 2 * step + 1);
        a[3] = weights<type>(h, 1, 2 * step + 1);
    }
}
