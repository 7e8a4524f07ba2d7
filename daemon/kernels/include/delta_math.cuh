// Elementwise arithmetic of the gated delta net, shared by its decode and prefill kernels.
//
// PROJECTION_F16: projected rows are fp16 (1) or float32 (0). OUTPUT: results are an
// operand of quantized products (1; operand.cuh) or float32 (0). Rows in slots are float32.
// Arithmetic and state are float32. Exponentials, reciprocals and roots are approximations
// (approximations.cuh), far inside the rounding of activations.
#pragma once
#include "approximations.cuh"
#include "half.cuh"

constexpr int HEAD_DIM = 128;  // of keys and of values
constexpr int CONV_WIDTH = 4;
constexpr int CONV_RING = 4;  // rows kept; the row of position p lies at p mod CONV_RING
constexpr float L2_EPS = 1e-6f;
constexpr float QUERY_SCALE = 0.08838834764831845f;  // 1 / sqrt(HEAD_DIM)
constexpr float LOG2_E = 1.4426950408889634f;

struct Half {
    unsigned short bits;
};

#if PROJECTION_F16
typedef Half Projection;  // of q, k, v, z, beta and alpha
typedef uint2 Projection4;
#else
typedef float Projection;
typedef float4 Projection4;
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return half_to_float(x.bits); }

__device__ __forceinline__ float4 to_float4(float4 x) { return x; }
__device__ __forceinline__ float4 to_float4(uint2 x) {
    const float2 low = half2_to_floats(x.x), high = half2_to_floats(x.y);
    return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ Projection4 load4(const Projection* at) {
    return *reinterpret_cast<const Projection4*>(at);
}

// Of a kept row; exact where a prompt's projection was kept.
__device__ __forceinline__ Projection4 load4_kept(const float* at) {
    const float4 x = *reinterpret_cast<const float4*>(at);
#if PROJECTION_F16
    return make_uint2(half2_saturated(x.x, x.y), half2_saturated(x.z, x.w));
#else
    return x;
#endif
}

__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * LOG2_E); }

__device__ __forceinline__ float sigmoid(float x) {
    return reciprocal_approx(1.0f + exp_approx(-x));
}

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// log(1 + e^x), exact for very negative x: slow heads add up its error over the whole context.
__device__ __forceinline__ float softplus(float x) {
    return x > 20.0f ? x : log1pf(expf(x));
}

// The logarithm of a head's decay at one token; `rate` is -exp(A_log), never positive.
__device__ __forceinline__ float log_decay(float alpha, float dt_bias, float rate) {
    return rate * softplus(alpha + dt_bias);
}

// One channel's causal convolution; `taps.w` multiplies the current token.
__device__ __forceinline__ float convolve(float4 taps, float x3, float x2, float x1, float x0) {
    return fmaf(taps.w, x0, fmaf(taps.z, x1, fmaf(taps.y, x2, taps.x * x3)));
}

// RMS norm of four channels, given 1 / rms, times the gate.
__device__ __forceinline__ float4 gated(float4 o, float scale, float4 weight, float4 z) {
    return make_float4(o.x * scale * weight.x * silu(z.x), o.y * scale * weight.y * silu(z.y),
                       o.z * scale * weight.z * silu(z.z), o.w * scale * weight.w * silu(z.w));
}

__device__ __forceinline__ float dot4(float4 a, float4 b) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x)));
}
