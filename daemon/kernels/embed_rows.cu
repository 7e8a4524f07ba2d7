// Rows of a quantized table, as it lies in the file, to float32: the embedding of token ids.
//
// One block a row, one thread for 8 adjacent columns at a time. Values are exact: scale x level
// (- minimum) in float32, as GGUF defines them. Bytes: one row of the table in, one of floats out.
//
// Compile-time: FORMAT (the GGUF type id), THREADS.
#include "half.cuh"
#include "warp.cuh"

enum Format {
    F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_XS = 23, BF16 = 30
};

__host__ __device__ constexpr int block_values(int format) {
    return format == Q4_0 || format == Q8_0 ? 32
           : format == F32 || format == F16 || format == BF16 ? 8 : 256;
}

__host__ __device__ constexpr int block_bytes(int format) {
    return format == F32 ? 32 : format == F16 || format == BF16 ? 16 : format == Q4_0 ? 18
           : format == Q8_0 ? 34 : format == Q4_K ? 144 : format == Q5_K ? 176
           : format == Q6_K ? 210 : 136;
}

__device__ __forceinline__ u16 load_u16(const u8* p) { return u16(p[0] | p[1] << 8); }

// Scale and minimum `s` of eight from the 12 packed bytes of Q4_K and Q5_K: 6 bits each.
__device__ __forceinline__ void packed_scale(const u8* packed, int s, float& scale,
                                             float& minimum) {
    if (s < 4) {
        scale = packed[s] & 63;
        minimum = packed[s + 4] & 63;
    } else {
        scale = (packed[s + 4] & 15) | (packed[s - 4] >> 6) << 4;
        minimum = (packed[s + 4] >> 4) | (packed[s] >> 6) << 4;
    }
}

// Values e … e + 7 of one block; e is a multiple of 8. Offsets as in the GGUF specification.
template <int F>
__device__ __forceinline__ void dequantize(float (&x)[8], const u8* block, int e);

template <>
__device__ __forceinline__ void dequantize<F32>(float (&x)[8], const u8* block, int) {
    for (int i = 0; i < 8; ++i) x[i] = reinterpret_cast<const float*>(block)[i];
}

template <>
__device__ __forceinline__ void dequantize<F16>(float (&x)[8], const u8* block, int) {
    for (int i = 0; i < 8; ++i) x[i] = half_to_float(load_u16(block + 2 * i));
}

template <>
__device__ __forceinline__ void dequantize<BF16>(float (&x)[8], const u8* block, int) {
    for (int i = 0; i < 8; ++i) x[i] = bf16_to_float(load_u16(block + 2 * i));
}

template <>
__device__ __forceinline__ void dequantize<Q4_0>(float (&x)[8], const u8* block, int e) {
    const float d = half_to_float(load_u16(block));
    const u8* levels = block + 2 + e % 16;
    for (int i = 0; i < 8; ++i) x[i] = d * (int(levels[i] >> (e < 16 ? 0 : 4) & 15) - 8);
}

template <>
__device__ __forceinline__ void dequantize<Q8_0>(float (&x)[8], const u8* block, int e) {
    const float d = half_to_float(load_u16(block));
    for (int i = 0; i < 8; ++i) x[i] = d * static_cast<signed char>(block[2 + e + i]);
}

template <>
__device__ __forceinline__ void dequantize<Q4_K>(float (&x)[8], const u8* block, int e) {
    const int s = e / 32;
    float scale, minimum;
    packed_scale(block + 4, s, scale, minimum);
    scale *= half_to_float(load_u16(block));
    minimum *= half_to_float(load_u16(block + 2));
    const u8* levels = block + 16 + 32 * (s / 2) + e % 32;
    for (int i = 0; i < 8; ++i) {
        x[i] = __fsub_rn(__fmul_rn(scale, levels[i] >> 4 * (s & 1) & 15), minimum);
    }
}

template <>
__device__ __forceinline__ void dequantize<Q5_K>(float (&x)[8], const u8* block, int e) {
    const int s = e / 32;
    float scale, minimum;
    packed_scale(block + 4, s, scale, minimum);
    scale *= half_to_float(load_u16(block));
    minimum *= half_to_float(load_u16(block + 2));
    const u8 *high = block + 16 + e % 32, *low = block + 48 + 32 * (s / 2) + e % 32;
    for (int i = 0; i < 8; ++i) {
        const int level = (low[i] >> 4 * (s & 1) & 15) | (high[i] >> s & 1) << 4;
        x[i] = __fsub_rn(__fmul_rn(scale, level), minimum);
    }
}

template <>
__device__ __forceinline__ void dequantize<Q6_K>(float (&x)[8], const u8* block, int e) {
    const int half = e / 128, g = e % 128 / 32;
    const u8* low = block + 64 * half + 32 * (g & 1) + e % 32;
    const u8* high = block + 128 + 32 * half + e % 32;
    const float scale = half_to_float(load_u16(block + 208)) *
                        static_cast<signed char>(block[192 + e / 16]);
    for (int i = 0; i < 8; ++i) {
        const int level = (low[i] >> 4 * (g >> 1) & 15) | (high[i] >> 2 * g & 3) << 4;
        x[i] = scale * (level - 32);
    }
}

template <>
__device__ __forceinline__ void dequantize<IQ4_XS>(float (&x)[8], const u8* block, int e) {
    const signed char levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                    1,    13,   25,  38,  53,  69,  89,  113};
    const int s = e / 32;
    const int high = load_u16(block + 2) >> 2 * s & 3;
    const int scale = (block[4 + s / 2] >> 4 * (s & 1) & 15) | high << 4;
    const float d = half_to_float(load_u16(block)) * (scale - 32);
    const u8* packed = block + 8 + 16 * s + e % 16;
    for (int i = 0; i < 8; ++i) x[i] = d * levels[packed[i] >> (e % 32 < 16 ? 0 : 4) & 15];
}

extern "C" __global__ void __launch_bounds__(THREADS) embed_rows(
    const u8* __restrict__ table,  // the tensor's bytes [table rows, row_bytes]
    const int* tokens,             // i32 [rows]; negative: the row becomes zero
    float* output,                 // f32 [rows, columns]
    int columns,                   // a multiple of the format's block
    long long row_bytes)
{
    wait_for_previous_kernel();
    allow_next_kernel();
    const int token = tokens[blockIdx.x];
    for (int column = threadIdx.x * 8; column < columns; column += THREADS * 8) {
        float x[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (token >= 0) {
            constexpr int VALUES = block_values(FORMAT);
            const u8* block = table + token * row_bytes + column / VALUES * block_bytes(FORMAT);
            dequantize<FORMAT>(x, block, column % VALUES);
        }
        float4* target = reinterpret_cast<float4*>(output + size_t(blockIdx.x) * columns + column);
        target[0] = {x[0], x[1], x[2], x[3]};
        target[1] = {x[4], x[5], x[6], x[7]};
    }
}
