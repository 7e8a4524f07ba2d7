// Values of 16 bits, fp16 and bf16: conversions, and arithmetic on pairs in a word. Inline PTX from
// sm_80 on and no toolkit headers, so that every listed card compiles the same text.
//
// The first value of a pair is the low half, which comes first in memory.
#pragma once
#include "numbers.cuh"

__device__ __forceinline__ float half_to_float(u32 bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(u16(bits)));
    return y;
}

__device__ __forceinline__ u16 float_to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float2 half2_to_floats(u32 pair) {
    return make_float2(half_to_float(pair), half_to_float(pair >> 16));
}

__device__ __forceinline__ u32 half2_of(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ u32 half2_twice(float x) { return half2_of(x, x); }

// Values beyond 65504 become that.
__device__ __forceinline__ u32 half2_saturated(float low, float high) {
    u32 y;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ u32 half2_fma(u32 a, u32 b, u32 c) {
    u32 y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

__device__ __forceinline__ u32 half2_times(u32 a, u32 b) {
    u32 y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

__device__ __forceinline__ u32 half2_minus(u32 a, u32 b) {
    u32 y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

__device__ __forceinline__ float bf16_to_float(u16 x) { return __uint_as_float(u32(x) << 16); }

__device__ __forceinline__ u32 bf16x2_of(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

template <bool BF16>
__device__ __forceinline__ u32 pair_of(float low, float high) {
    return BF16 ? bf16x2_of(low, high) : half2_of(low, high);
}
