// A few rows times quantized matrices: y[token, row] = sum over k of W[row, k] x[token, k].
//
// One launch takes a group of matrices that share their input. Persistent blocks of WARPS warps;
// the host deals the stripes' units (64 rows x 256 columns) to the blocks in order, in equal
// bytes, so a stripe may be cut into pieces. Each warp streams whole tiles through its own ring in
// shared memory, keeps the values of x for a unit in registers, and adds 16 steps of m16n8k16 a
// tile. Sums of warps, then of pieces, are taken in a fixed order that depends on the matrices
// and the card alone: a token's bits are the same whatever the other tokens are.
// Bound: bytes of the weights, each read once.
//
// Macros: TYPES (bit mask of QuantTypes), NUM_PANELS (1: up to 8 tokens, 2: up to 16), SLOTS and
// SLOT_BYTES (a warp's ring), EPILOGUE (0 store, 1 add to a residual, 2 SwiGLU of paired rows).
#include "quant_blocks.cuh"
#include "warp.cuh"

constexpr int WARPS = 8;
constexpr int TOKENS = 8 * NUM_PANELS;
constexpr int THREADS = 32 * WARPS;
constexpr float ACTIVATION_SCALE = 0.125f;  // x in fp16 is x / 8: values up to 524,000 fit

// A run of units of one stripe, for one block.
struct Piece {
    const u8* units;  // the first unit
    int type, tile_bytes, first_block, num_units;
    int row, num_rows;  // of the output; num_rows up to 64
    int slot;           // where its sums go; -1 if it is a whole stripe
    int first_slot, num_slots, counter;  // of all pieces of its stripe
};

struct Ring {
    u8* slots;        // of this warp
    u64* full;        // one barrier a slot, sm_90 on
    int slot, phase;
};

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void issue_copy(Ring& ring, int slot, const u8* from, int bytes, int lane) {
    if (lane != 0) return;
    const u32 barrier = shared_address(ring.full + slot);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(ring.slots + slot * SLOT_BYTES)),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void issue_nothing() {}

__device__ __forceinline__ void wait_for_slot(Ring& ring) {
    const u32 barrier = shared_address(ring.full + ring.slot);
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier),
        "r"(ring.phase)
        : "memory");
}
#else
__device__ __forceinline__ void issue_copy(Ring& ring, int slot, const u8* from, int bytes, int lane) {
    const u32 to = shared_address(ring.slots + slot * SLOT_BYTES);
    for (int at = lane * 16; at < bytes; at += 512) copy_async_16(to + at, from + at);
    copy_async_commit();
}

__device__ __forceinline__ void issue_nothing() { copy_async_commit(); }

__device__ __forceinline__ void wait_for_slot(Ring&) {
    copy_async_wait<SLOTS - 1>();
    __syncwarp();
}
#endif

// Walks the tiles of a warp: every WARPS-th unit of the block's pieces, four tiles a unit.
struct Walk {
    const Piece* piece;
    const Piece* end;
    const u8* units;
    int tile_bytes, num_units, unit, tile;
};

__device__ __forceinline__ void enter(Walk& w) {
    if (w.piece == w.end) return;
    w.units = w.piece->units;
    w.tile_bytes = w.piece->tile_bytes;
    w.num_units = w.piece->num_units;
}

__device__ __forceinline__ void settle(Walk& w) {
    while (w.piece < w.end && w.unit >= w.num_units) {
        w.unit -= w.num_units;
        w.piece++;
        enter(w);
    }
}

__device__ __forceinline__ void issue_next(Ring& ring, int slot, Walk& w, int lane) {
    if (w.piece == w.end) return issue_nothing();
    const u8* from = w.units + (long long)(w.unit * 4 + w.tile) * w.tile_bytes;
    issue_copy(ring, slot, from, w.tile_bytes, lane);
    if (++w.tile < 4) return;
    w.tile = 0;
    w.unit += WARPS;
    settle(w);
}

// The activations of one unit, as B operands: 8 x 16 bytes a lane and panel.
__device__ __forceinline__ void load_panels(
    uint4 (&x)[NUM_PANELS][8], const u8* panels, int block, int num_blocks, int num_tokens, int lane) {
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u8* at = panels + ((long long)(n * num_blocks + block) * 8 + i) * 512 + lane * 16;
            x[n][i] = 8 * n + lane / 4 < num_tokens ? *(const uint4*)at : make_uint4(0, 0, 0, 0);
        }
}

template <int type>
__device__ __forceinline__ void multiply_unit(
    float (&sum)[4][NUM_PANELS][2][4], const uint4 (&x)[NUM_PANELS][8], Ring& ring, Walk& ahead,
    int lane) {
#pragma unroll
    for (int tile = 0; tile < 4; tile++) {
        wait_for_slot(ring);
        const u8* at = ring.slots + ring.slot * SLOT_BYTES;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            HalfTile h;
            load_half<type>(h, at, lane, half);
#pragma unroll
            for (int step = 0; step < 8; step++) {
                u32 a[4];
                fragment<type>(a, h, at, lane, half, step);
#pragma unroll
                for (int n = 0; n < NUM_PANELS; n++) {
                    const uint4& v = x[n][half * 4 + step / 2];
                    if (step % 2 == 0) mma_m16n8k16(sum[tile][n][0], a, v.x, v.y);
                    else mma_m16n8k16(sum[tile][n][1], a, v.z, v.w);
                }
            }
        }
        __syncwarp();
        issue_next(ring, ring.slot, ahead, lane);
        if (++ring.slot == SLOTS) ring.slot = 0, ring.phase ^= 1;
    }
}

// Sums of a warp to shared memory, [token][row], rows 64.
__device__ __forceinline__ void leave_sums(float* to, float (&sum)[4][NUM_PANELS][2][4], int lane) {
#pragma unroll
    for (int tile = 0; tile < 4; tile++)
#pragma unroll
        for (int n = 0; n < NUM_PANELS; n++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const int token = 8 * n + (lane & 3) * 2 + (c & 1);
                const int row = 16 * tile + (lane >> 2) + (c >> 1) * 8;
                to[token * 64 + row] = sum[tile][n][0][c] + sum[tile][n][1][c];
            }
}

struct Output {
    float* rows;       // EPILOGUE 0, 1: float32 [tokens, stride]
    u8* panels;        // EPILOGUE 2: fp16 panels of the product, stride / 256 blocks
    int stride, num_tokens;
};

__device__ __forceinline__ void finish(const Output& out, const Piece& p, const float* total) {
    for (int i = threadIdx.x; i < out.num_tokens * 64; i += THREADS) {
        const int token = i / 64, row = i % 64;
        if (EPILOGUE == 2) {
            if (row % 16 >= 8) continue;
            const float gate = total[i] / ACTIVATION_SCALE, up = total[i + 8] / ACTIVATION_SCALE;
            const float y = gate / (1.0f + __expf(-gate)) * up;
            const int k = p.row / 2 + row / 16 * 8 + row % 8, t = k % 256 / 64, e = k % 64;
            const long long unit = (long long)(token / 8 * (out.stride / 256) + k / 256) * 8 + e / 8;
            u8* at = out.panels + unit * 512 + (token % 8 * 4 + t) * 16 + e % 8 * 2;
            *(u16*)at = float_half(y * ACTIVATION_SCALE);
        } else if (row < p.num_rows) {
            float* at = out.rows + (long long)token * out.stride + p.row + row;
            const float y = total[i] / ACTIVATION_SCALE;
            *at = EPILOGUE == 1 ? *at + y : y;
        }
    }
}

// True for the block that brings the last piece of a stripe; all sums are then visible to it.
__device__ __forceinline__ bool is_last_piece(const Piece& p, int* counters, int* shared_flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const int before = atomicAdd(counters + p.counter, 1);
        *shared_flag = before == p.num_slots - 1;
        if (*shared_flag) counters[p.counter] = 0;
        __threadfence();
    }
    __syncthreads();
    return *shared_flag;
}

// Adds warps in order; for a cut stripe adds pieces in order, in the last block to arrive.
__device__ void reduce_piece(
    const Piece& p, float* warp_sums, float* partial, int* counters, int* flag, const Output& out) {
    __syncthreads();
    float* pieces_sums = partial + (long long)p.slot * TOKENS * 64;
    for (int i = threadIdx.x; i < TOKENS * 64; i += THREADS) {
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += warp_sums[w * TOKENS * 64 + i];
        if (p.slot >= 0) __stcg(pieces_sums + i, total);
        else warp_sums[i] = total;
    }
    if (p.slot >= 0) {
        if (!is_last_piece(p, counters, flag)) return;
        for (int i = threadIdx.x; i < TOKENS * 64; i += THREADS) {
            float total = 0.0f;
            for (int s = 0; s < p.num_slots; s++)
                total += __ldcg(partial + (long long)(p.first_slot + s) * TOKENS * 64 + i);
            warp_sums[i] = total;
        }
    }
    __syncthreads();
    finish(out, p, warp_sums);
    __syncthreads();
}

template <int type>
__device__ __forceinline__ void dispatch(
    int wanted, float (&sum)[4][NUM_PANELS][2][4], const uint4 (&x)[NUM_PANELS][8], Ring& ring,
    Walk& ahead, int lane) {
    if constexpr (type < 7) {
        if constexpr ((TYPES >> type) & 1) {
            if (wanted == type) return multiply_unit<type>(sum, x, ring, ahead, lane);
        }
        dispatch<type + 1>(wanted, sum, x, ring, ahead, lane);
    }
}

__device__ __forceinline__ void start_ring(Ring& ring, Walk& ahead, int lane) {
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        for (int s = 0; s < SLOTS; s++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(ring.full + s)));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
#endif
    for (int s = 0; s < SLOTS; s++) issue_next(ring, s, ahead, lane);
}

// pieces: Piece [number of pieces]; piece_start: int32 [blocks + 1]; panels: fp16 panels of x,
// [NUM_PANELS, num_blocks, 8, 32 lanes, 8]; rows: float32 [num_tokens, stride] or null;
// out_panels: fp16 panels or null; partial: float32 [slots, TOKENS, 64]; counters: int32, zero.
extern "C" __global__ void __launch_bounds__(THREADS, NUM_PANELS == 1 ? 2 : 1) quant_gemv(
    const Piece* pieces, const int* piece_start, const u8* panels, float* rows, u8* out_panels,
    float* partial, int* counters, int num_blocks, int num_tokens, int stride) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ u64 full[WARPS * SLOTS];
    __shared__ int flag;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* warp_sums = (float*)(memory + WARPS * SLOTS * SLOT_BYTES);
    Ring ring = {memory + warp * SLOTS * SLOT_BYTES, full + warp * SLOTS, 0, 0};
    const Piece* end = pieces + piece_start[blockIdx.x + 1];
    Walk here = {pieces + piece_start[blockIdx.x], end, nullptr, 0, 0, warp, 0};
    enter(here);
    settle(here);
    Walk ahead = here;
    allow_next_kernel();
    start_ring(ring, ahead, lane);
    wait_for_previous_kernel();
    const Output out = {rows, out_panels, stride, num_tokens};
    for (const Piece* p = pieces + piece_start[blockIdx.x]; p < end; p++) {
        float sum[4][NUM_PANELS][2][4] = {};
        while (here.piece == p) {
            uint4 x[NUM_PANELS][8];
            load_panels(x, panels, p->first_block + here.unit, num_blocks, num_tokens, lane);
            dispatch<0>(p->type, sum, x, ring, ahead, lane);
            here.unit += WARPS;
            settle(here);
        }
        leave_sums(warp_sums + warp * TOKENS * 64, sum, lane);
        reduce_piece(*p, warp_sums, partial, counters, &flag, out);
    }
}
