// Repacks GGUF blocks of one matrix into the tiles of quant_blocks.cuh; values stay what they are.
//
// bf16 and float32 become fp16 times a power of two for each row, which brings its largest value to
// 2^14 and more: bf16 is exact down to 2^-31 of that value, and off by 2^-39 of it at most below;
// float32, as two values of fp16, is right to 2^-22 of itself, or that bound.
//
// Grid (ceil(rows / 8), y), 256 threads: a block moves 8 rows x 256 columns at a time, and one of y
// shares of the columns. Bound by the copy to the card that precedes it (PCIe), not by this kernel.
// Macros: TYPE (a QuantType), FROM (of F16: 0 fp16, 1 bf16 in the file; of F32: 2).
#include "quant_blocks.cuh"

constexpr int FILE_BYTES[NUM_TYPES] = {144, 176, 210, 272, 136, 144, 512, 1024};
constexpr bool IS_SCALED = FROM > 0;

__device__ __forceinline__ u32 read_16(const u8* p) { return p[0] | (u32(p[1]) << 8); }

// Value k of a row of bf16 or float32, as the bits of a float.
__device__ __forceinline__ u32 float_bits(const u8* row, int k) {
    return FROM == 1 ? u32(((const u16*)row)[k]) << 16 : ((const u32*)row)[k];
}

// The exponent of a row's factor, biased by 127. A warp reads the row.
__device__ int row_exponent(const u8* row, int columns, int lane) {
    u32 largest = 0;
#pragma unroll 8
    for (int k = lane; k < columns; k += 32) largest = max(largest, float_bits(row, k) << 1);
    return min(max(int(__reduce_max_sync(~0u, largest) >> 24) - 14, 1), 241);
}

__device__ __forceinline__ float power_of_two(int exponent) {
    return __uint_as_float(u32(exponent) << 23);
}

// A row's value in fp16, and what that leaves.
__device__ __forceinline__ void put_float(u16& high, u16& low, const u8* row, int k, int exponent) {
    const float value = __uint_as_float(float_bits(row, k)) * power_of_two(254 - exponent);
    high = float_to_half(value);
    if (TYPE == F32) low = float_to_half(value - half_to_float(high));
}

// The integer code of column k (0..255) of a row's block, as the file has it.
__device__ __forceinline__ u32 read_code(const u8* block, int k) {
    const int s = k / 32, l = k % 32;
    if constexpr (TYPE == Q4_K) return (block[16 + 32 * (s / 2) + l] >> (4 * (s & 1))) & 15;
    if constexpr (TYPE == Q5_K) {
        const u32 low = (block[48 + 32 * (s / 2) + l] >> (4 * (s & 1))) & 15;
        return low | (((block[16 + l] >> s) & 1) << 4);
    }
    if constexpr (TYPE == Q6_K) {
        const int h = k / 128, g = s % 4;
        const u32 low = (block[64 * h + 32 * (g & 1) + l] >> (4 * (g >> 1))) & 15;
        return low | (((block[128 + 32 * h + l] >> (2 * g)) & 3) << 4);
    }
    if constexpr (TYPE == Q8_0) return block[34 * s + 2 + l] ^ 128;
    if constexpr (TYPE == IQ4_XS) return (block[8 + 16 * s + l % 16] >> (l < 16 ? 0 : 4)) & 15;
    if constexpr (TYPE == Q4_0) return (block[18 * s + 2 + l % 16] >> (l < 16 ? 0 : 4)) & 15;
    return read_16(block + 2 * k);
}

// The 6-bit scale and minimum of sub-block s in the 12 bytes of Q4_K and Q5_K.
__device__ __forceinline__ u32 six_bit_scale(const u8* sc, int s) {
    return s < 4 ? sc[s] & 63 : (sc[s + 4] & 15) | ((sc[s - 4] >> 6) << 4);
}

__device__ __forceinline__ u32 six_bit_minimum(const u8* sc, int s) {
    return s < 4 ? sc[s + 4] & 63 : (sc[s + 4] >> 4) | ((sc[s] >> 6) << 4);
}

__device__ __forceinline__ u32 iq4_scale(const u8* block, int s) {
    const u32 high = (read_16(block + 2) >> (2 * s)) & 3;
    return ((block[4 + s / 2] >> (4 * (s & 1))) & 15) | (high << 4);
}

// Word t of a row's scales.
__device__ void write_scales(u8* tile, const u8* block, int row, int t) {
    u8* scales = tile + SCALES_AT[TYPE];
    if constexpr (TYPE == Q4_K || TYPE == Q5_K) {
        const u8* sc = block + 4;
        *(u32*)(scales + row * 16 + t * 4) =
            six_bit_scale(sc, 2 * t) | (six_bit_scale(sc, 2 * t + 1) << 6) |
            (six_bit_minimum(sc, 2 * t) << 12) | (six_bit_minimum(sc, 2 * t + 1) << 18) |
            (u32(block[t]) << 24);
    } else if constexpr (TYPE == Q6_K) {
        for (int i = 0; i < 4; i++) scales[row * 16 + t * 4 + i] = block[192 + t * 4 + i];
        if (t == 0) *(u16*)(scales + 256 + row * 2) = read_16(block + 208);
    } else if constexpr (TYPE == Q8_0 || TYPE == Q4_0) {
        constexpr int stride = TYPE == Q8_0 ? 34 : 18;
        const u8* pair = block + 2 * t * stride;
        *(u32*)(scales + row * 16 + t * 4) = read_16(pair) | (read_16(pair + stride) << 16);
    } else if constexpr (TYPE == IQ4_XS) {
        const u32 bits = (read_16(block) >> (4 * t)) & 15;
        *(u16*)(scales + row * 8 + t * 2) =
            iq4_scale(block, 2 * t) | (iq4_scale(block, 2 * t + 1) << 6) | (bits << 12);
    } else if (t == 0) {
        ((float*)scales)[row] = 1.0f;
    }
}

// One 32-bit word of the low-bit plane: where it lies, and its first column.
struct LowWord {
    int at, row, column;
};

__device__ __forceinline__ LowWord low_word(int index, int r) {
    const int lane = (index / 4) % 32, w = index % 4, c = index / 128, t = lane % 4;
    const int at = (c * 2 + r) * 512 + lane * 16 + w * 4;
    return {at, lane / 4, 64 * t + (TYPE == Q8_0 ? 16 * c + 4 * w : 32 * c + 8 * w)};
}

__device__ __forceinline__ u32 join_low(const u16* code) {
    u32 word = 0;
    if (TYPE == F16 || TYPE == F32) return code[0] | (u32(code[1]) << 16);
    if (TYPE == Q8_0) {
        for (int i = 0; i < 4; i++) word |= u32(code[i]) << (8 * i);
        return word;
    }
    for (int p = 0; p < 4; p++)
        word |= ((code[2 * p] & 15u) << (4 * p)) | ((code[2 * p + 1] & 15u) << (4 * p + 16));
    return word;
}

__device__ void write_low_plane(u8* tile, const u16 (*code)[256], int r) {
    if (TYPE == F16 || TYPE == F32) {
        for (int i = threadIdx.x; i < 1024; i += 256) {
            const int lane = (i / 2) % 32, w = i % 2, step = i / 64;
            const u16* at = &code[lane / 4][64 * (lane % 4) + 4 * step + 2 * w];
            *(u32*)(tile + step * 512 + lane * 16 + (2 * w + r) * 4) = join_low(at);
        }
        return;
    }
    for (int i = threadIdx.x; i < (TYPE == Q8_0 ? 512 : 256); i += 256) {
        const LowWord word = low_word(i, r);
        *(u32*)(tile + word.at) = join_low(&code[word.row][word.column]);
    }
}

__device__ void write_high_plane(u8* tile, const u16 (*code)[256], int r) {
    const int i = threadIdx.x;
    u32 word = 0;
    if (TYPE == Q5_K && i < 64) {
        const int lane = i % 32, half = i / 32;
        const u16* from = &code[lane / 4][64 * (lane % 4) + 32 * half];
        for (int p = 0; p < 16; p++)
            word |= (u32(from[2 * p] >> 4) << p) | (u32(from[2 * p + 1] >> 4) << (p + 16));
        *(u32*)(tile + 2048 + lane * 16 + (half * 2 + r) * 4) = word;
    }
    if (TYPE == Q6_K && i < 128) {
        const int lane = i % 32, c = i / 32;
        const u16* from = &code[lane / 4][64 * (lane % 4) + 16 * c];
        for (int p = 0; p < 8; p++)
            word |= (from[2 * p] >> 4 << 2 * p) | (u32(from[2 * p + 1] >> 4) << (2 * p + 16));
        *(u32*)(tile + 2048 + r * 512 + lane * 16 + c * 4) = word;
    }
}

// Where 8 rows go: a tile, and the half of it.
struct Place {
    u8* tile;
    int r;
};

__device__ __forceinline__ Place place_of(
    u8* tiles, int group, int block, int num_blocks, int part) {
    const int number = TYPE == F32 ? group : part < 0 ? group / 2 : group;
    const long long unit = (long long)(number / 4) * num_blocks + block;
    const int r = TYPE == F32 ? 0 : part < 0 ? group & 1 : part;
    return {tiles + (unit * 4 + number % 4) * TILE_BYTES[TYPE], r};
}

// Rows of floats: their fp16 values, the rests of float32, and the rows' factors.
struct Floats {
    u16 high[8][256], low[TYPE == F32 ? 8 : 1][256];
    int exponent[8];
};

__device__ void pack_floats(Floats& f, const Place& to, const u8* first, long long row_bytes,
                            int num_rows) {
    const int k = threadIdx.x;
    for (int row = 0; row < 8; row++) {
        u16 low = 0;
        f.high[row][k] = 0;
        if (row < num_rows)
            put_float(f.high[row][k], low, first + row * row_bytes, k, f.exponent[row]);
        if (TYPE == F32) f.low[row][k] = low;
    }
    __syncthreads();
    write_low_plane(to.tile, f.high, to.r);
    if (TYPE == F32) write_low_plane(to.tile, f.low, 1);
    if (k < (TYPE == F32 ? 16 : 8)) {
        const int row = to.r * 8 + k;
        ((float*)(to.tile + SCALES_AT[TYPE]))[row] = power_of_two(f.exponent[k % 8]);
    }
}

__device__ void pack_codes(
    u16 (&code)[8][256], const Place& to, const u8* first, long long row_bytes, int num_rows) {
    const int k = threadIdx.x;
    for (int row = 0; row < 8; row++) {
        const u32 none = TYPE == Q8_0 ? 128 : 0;
        code[row][k] = row < num_rows ? read_code(first + row * row_bytes, k) : none;
    }
    __syncthreads();
    write_low_plane(to.tile, code, to.r);
    write_high_plane(to.tile, code, to.r);
    const int row = k / 4, t = k % 4;
    if (k < 32 && row < num_rows)
        write_scales(to.tile, first + row * row_bytes, to.r * 8 + row, t);
}

// raw: u8 [rows, blocks, FILE_BYTES], as in the file. tiles: u8, where the matrix's stripes start.
// part: -1 puts rows in order; 0 and 1 put groups of 8 rows in the even or odd halves of tiles,
// which brings a gate row and its up row into one thread.
extern "C" __global__ void quant_pack(
    const u8* raw, u8* tiles, int rows, int num_blocks, int part) {
    __shared__ Floats floats;
    const int group = blockIdx.x, num_rows = min(8, rows - group * 8), warp = threadIdx.x / 32;
    const long long row_bytes = (long long)num_blocks * FILE_BYTES[TYPE];
    const u8* first = raw + group * 8 * row_bytes;
    if (IS_SCALED) {
        const u8* own = first + min(warp, num_rows - 1) * row_bytes;
        const int exponent = row_exponent(own, num_blocks * 256, threadIdx.x % 32);
        if (threadIdx.x % 32 == 0) floats.exponent[warp] = exponent;
        __syncthreads();
    }
    for (int block = blockIdx.y; block < num_blocks; block += gridDim.y) {
        const Place to = place_of(tiles, group, block, num_blocks, part);
        const u8* from = first + (long long)block * FILE_BYTES[TYPE];
        if (IS_SCALED) pack_floats(floats, to, from, row_bytes, num_rows);
        else pack_codes(floats.high, to, from, row_bytes, num_rows);
        __syncthreads();
    }
}
