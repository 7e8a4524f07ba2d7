// What is left to do to the sums of packed tiles: a row's factor, its high and low halves, SwiGLU.
//
// A tile of float32 weights has 8 rows, each twice: rounded to fp16, and the rest. Both halves are
// multiplied like rows of their own; their sums lie in one lane and are added here. So a matrix of
// float32 takes twice the products, and no other path.
//
// Macros: TYPES (bit mask of QuantTypes: a kernel without float32 weights has no code for them).
#pragma once
#include "quant_blocks.cuh"

template <int type>
constexpr bool HAS_FACTORS = type == F16 || type == F32;

// Rows of a matrix in a tile, of which there are four in a stripe.
__device__ __forceinline__ int tile_height(int type) {
    return ((TYPES >> F32) & 1) && type == F32 ? 8 : 16;
}

// Of a lane's rows g and g + 8: powers of two, so that no order of sums changes a bit.
struct Factors {
    float first, second;
};

template <int type>
__device__ __forceinline__ void load_factors(Factors& f, const u8* tile, int lane) {
    if constexpr (HAS_FACTORS<type>) {
        f.first = *(const float*)(tile + SCALES_AT[type] + lane / 4 * 4);
        f.second = *(const float*)(tile + SCALES_AT[type] + 32 + lane / 4 * 4);
    }
}

// Sums of m16n8k16: rows g, g, g + 8, g + 8. Of float32 weights the first two are left.
template <int type>
__device__ __forceinline__ void close_sums(float (&sum)[4], const Factors& f) {
    if constexpr (type == F32) {
        sum[0] = (sum[0] + sum[2]) * f.first, sum[1] = (sum[1] + sum[3]) * f.first;
        sum[2] = sum[3] = 0.0f;
    } else if constexpr (HAS_FACTORS<type>) {
        sum[0] *= f.first, sum[1] *= f.first, sum[2] *= f.second, sum[3] *= f.second;
    }
}

__device__ __forceinline__ float swiglu(float gate, float up) {
    return gate / (1.0f + __expf(-gate)) * up;
}
