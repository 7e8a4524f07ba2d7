// The fp16 operands of quantized products: where a value lies, and how it is scaled.
//
// Panels, for few tokens: [token / 8, columns / 256, 8 chunks, lane 4 (token % 8) + t, 8], with
// columns 64t + 8 chunk. Chunks, for prompts: [columns / 64, padded tokens, 64]. The columns of
// each 256 are permuted: position 16 j + 8 h + 2 t + e holds column 64 t + 4 j + 2 h + e, which is
// what lane t of step j multiplies; and 16-byte units of a line are exchanged by XOR with
// token % 8, as the tensor cores read shared memory, so that a tile is one contiguous copy.
#pragma once
#include "half.cuh"

constexpr float ACTIVATION_SCALE = 0.125f;  // x in fp16 is x / 8: values up to 524,000 fit

// Columns up to the next multiple of 8 follow.
__device__ __forceinline__ u8* panel_place(
    void* panels, int token, int column, int columns) {
    const int unit = (token / 8) * (columns / 256) + column / 256;
    const int t = column % 256 / 64, chunk = column % 64 / 8;
    return (u8*)panels + (unit * 8 + chunk) * 512 + (token % 8 * 4 + t) * 16 +
           column % 8 * 2;
}

// The byte of an even column and its successor in the permuted line of 256 columns, 512 bytes.
__device__ __forceinline__ int permuted_byte(int column) {
    const int j = column % 64 / 4, h = column % 4 / 2, t = column % 256 / 64;
    return 32 * j + 16 * h + 4 * t;
}

// Of an even column; its successor follows.
__device__ __forceinline__ u8* chunk_place(
    void* chunks, int token, int column, int padded_tokens) {
    const int byte = permuted_byte(column), unit = byte % 128 / 16 ^ token % 8;
    const long long line = (long long)(column / 256 * 4 + byte / 128) * padded_tokens + token;
    return (u8*)chunks + line * 128 + unit * 16 + byte % 16;
}

// Two scaled values.
__device__ __forceinline__ u32 operand_pair(float low, float high) {
    high *= ACTIVATION_SCALE, low *= ACTIVATION_SCALE;
    return half2_of(low, high);
}
