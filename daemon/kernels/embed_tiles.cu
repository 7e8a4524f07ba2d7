// Rows of a packed matrix to float32: the embedding of token ids, where the output matrix is its
// table as well and is kept only once.
//
// One block a row, one thread a column of each 256. Values are those of embed_rows.cu, bit for bit:
// scale x level (- minimum) in float32. Bytes: a sixteenth of the tiles that hold the row, in words
// that a warp reads together, and one row of floats out.
//
// Macros: TYPE (a QuantType but F32, whose values packing has rounded). Grid (rows), 256 threads.
#include "quant_blocks.cuh"
#include "warp.cuh"

// Bits of a packed code, from the pair-interleaved words of quant_blocks.cuh: `width` bits at pair
// `pair`'s place, 16 bits higher for its second column.
__device__ __forceinline__ int code_bits(u32 word, int width, int column) {
    return (word >> (width * (column / 2) + 16 * (column & 1))) & ((1 << width) - 1);
}

__device__ __forceinline__ u32 word_at(const u8* at) { return *(const u32*)at; }

// The integer code of row `8 r + lane / 4`, column `64 (lane % 4) + c`.
__device__ __forceinline__ int tile_code(const u8* tile, int r, int lane, int c) {
    if (TYPE == Q8_0) return tile[(c / 16 * 2 + r) * 512 + lane * 16 + c % 16];
    const int low = (c / 32 * 2 + r) * 512 + lane * 16 + c % 32 / 8 * 4;
    int code = code_bits(word_at(tile + low), 4, c % 8);
    if (TYPE == Q5_K) {
        const int at = 2048 + lane * 16 + (c / 32 * 2 + r) * 4;
        code |= code_bits(word_at(tile + at), 1, c % 32) << 4;
    }
    if (TYPE == Q6_K) {
        const int at = 2048 + r * 512 + lane * 16 + c / 16 * 4;
        code |= code_bits(word_at(tile + at), 2, c % 16) << 4;
    }
    return code;
}

__device__ __forceinline__ float half_at(const u8* at) { return half_to_float(*(const u16*)at); }

// The value in row `row` (0..15), column `k` (0..255) of a tile.
__device__ __forceinline__ float tile_value(const u8* tile, int row, int k) {
    const int r = row / 8, lane = row % 8 * 4 + k / 64, c = k % 64, s = k / 32;
    const u8* scales = tile + SCALES_AT[TYPE];
    if (TYPE == F16) {
        const u8* at = tile + c / 4 * 512 + lane * 16 + (c % 4 / 2 * 2 + r) * 4 + c % 2 * 2;
        return half_at(at) * ((const float*)scales)[row];
    }
    const int code = tile_code(tile, r, lane, c);
    if (TYPE == Q8_0) return half_at(scales + row * 16 + s * 2) * (code - 128);
    if (TYPE == Q4_0) return half_at(scales + row * 16 + s * 2) * (code - 8);
    if (TYPE == Q6_K) {
        const float d = half_at(scales + 256 + row * 2);
        return d * float(((const signed char*)scales)[row * 16 + k / 16]) * (code - 32);
    }
    if (TYPE == IQ4_XS) {
        const signed char levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                        1,    13,   25,  38,  53,  69,  89,  113};
        const u16* words = (const u16*)(scales + row * 8);
        u32 d = 0;
        for (int t = 0; t < 4; t++) d |= u32(words[t] >> 12) << (4 * t);
        const int scale = ((words[s / 2] >> (6 * (s & 1))) & 63) - 32;
        return half_to_float(d) * scale * levels[code];
    }
    const u32* words = (const u32*)(scales + row * 16);
    const u32 d = (words[0] >> 24) | ((words[1] >> 24) << 8);
    const u32 dmin = (words[2] >> 24) | ((words[3] >> 24) << 8);
    const u32 own = words[s / 2] >> (6 * (s & 1));
    const float scale = half_to_float(d) * float(own & 63);
    const float minimum = half_to_float(dmin) * float((own >> 12) & 63);
    return __fsub_rn(__fmul_rn(scale, float(code)), minimum);
}

// tiles: u8 [stripes, num_blocks, 4, TILE_BYTES]; tokens: int32 [rows], a negative one gives zeros;
// output: float32 [rows, 256 num_blocks].
extern "C" __global__ void __launch_bounds__(256) embed_tiles(
    const u8* tiles, const int* tokens, float* output, int num_blocks) {
    wait_for_previous_kernel();
    allow_next_kernel();
    const int token = tokens[blockIdx.x];
    for (int block = 0; block < num_blocks; block++) {
        const long long unit = (long long)(token / 64) * num_blocks + block;
        const u8* tile = tiles + (unit * 4 + token % 64 / 16) * TILE_BYTES[TYPE];
        const float value = token < 0 ? 0.0f : tile_value(tile, token % 16, threadIdx.x);
        output[((long long)blockIdx.x * num_blocks + block) * 256 + threadIdx.x] = value;
    }
}
