// Rows of float32 by four columns at a time.
#pragma once

// Volatile, so that the compiler keeps the loads of a batch together, ahead of their use.
__device__ __forceinline__ float4 load_now(const void* at) {
    float4 x;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(at) : "memory");
    return x;
}

// In the order of load_now: no more is held at a time than there are registers for.
__device__ __forceinline__ void store_now(float4* at, float4 x) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(x.x), "f"(x.y),
                 "f"(x.z), "f"(x.w) : "memory");
}

// Columns c to c + 3 of a row, or zeros beyond its end.
__device__ __forceinline__ float4 quad_of(const float* row, int column, int columns) {
    return column < columns ? *(const float4*)(row + column) : make_float4(0, 0, 0, 0);
}

__device__ __forceinline__ float4 product(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

__device__ __forceinline__ float4 scaled(float4 a, float by) {
    return make_float4(a.x * by, a.y * by, a.z * by, a.w * by);
}

// In one order, rounded once a step, whatever the compiler makes of the code around it.
__device__ __forceinline__ void add_product(float& sum, float4 a, float4 b) {
    sum = __fmaf_rn(a.x, b.x, sum), sum = __fmaf_rn(a.y, b.y, sum);
    sum = __fmaf_rn(a.z, b.z, sum), sum = __fmaf_rn(a.w, b.w, sum);
}

__device__ __forceinline__ void add_scaled(float4& sum, float by, float4 a) {
    sum.x = __fmaf_rn(by, a.x, sum.x), sum.y = __fmaf_rn(by, a.y, sum.y);
    sum.z = __fmaf_rn(by, a.z, sum.z), sum.w = __fmaf_rn(by, a.w, sum.w);
}
