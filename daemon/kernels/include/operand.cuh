// The fp16 operands of quantized products: where a value lies, and how it is scaled.
//
// Panels, for few tokens: [token / 8, columns / 256, 8 chunks, lane 4 (token % 8) + t, 8], with
// columns 64t + 8 chunk. Chunks, for prompts: [columns / 64, padded tokens, 64]. The columns of
// each 256 are permuted: position 16 j + 8 h + 2 t + e holds column 64 t + 4 j + 2 h + e, which is
// what lane t of step j multiplies; and 16-byte units of a line are exchanged by XOR with
// token % 8, as the tensor cores read shared memory, so that a tile is one contiguous copy.
#pragma once

constexpr float ACTIVATION_SCALE = 0.125f;  // x in fp16 is x / 8: values up to 524,000 fit

// Columns up to the next multiple of 8 follow.
__device__ __forceinline__ unsigned char* panel_place(
    void* panels, int token, int column, int columns) {
    const int unit = (token / 8) * (columns / 256) + column / 256;
    const int t = column % 256 / 64, chunk = column % 64 / 8;
    return (unsigned char*)panels + (unit * 8 + chunk) * 512 + (token % 8 * 4 + t) * 16 +
           column % 8 * 2;
}

// The byte of an even column and its successor in the permuted line of 256 columns, 512 bytes.
__device__ __forceinline__ int permuted_byte(int column) {
    const int j = column % 64 / 4, h = column % 4 / 2, t = column % 256 / 64;
    return 32 * j + 16 * h + 4 * t;
}

// Of an even column; its successor follows.
__device__ __forceinline__ unsigned char* chunk_place(
    void* chunks, int token, int column, int padded_tokens) {
    const int byte = permuted_byte(column), unit = byte % 128 / 16 ^ token % 8;
    const long long line = (long long)(column / 256 * 4 + byte / 128) * padded_tokens + token;
    return (unsigned char*)chunks + line * 128 + unit * 16 + byte % 16;
}

// Two scaled values; the first argument goes to the low half, which comes first in memory.
__device__ __forceinline__ unsigned operand_pair(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;"
        : "=r"(pair) : "f"(high * ACTIVATION_SCALE), "f"(low * ACTIVATION_SCALE));
    return pair;
}
