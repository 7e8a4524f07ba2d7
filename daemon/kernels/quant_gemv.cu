// A few rows times quantized matrices: y[token, row] = sum over k of W[row, k] x[token, k].
//
// One launch takes a group of matrices that share their input. Persistent blocks of WARPS warps;
// the host deals the stripes' units (64 rows x 256 columns) to the blocks in order, in equal
// bytes, so a stripe may be cut into pieces. A warp takes one of a unit's four tiles, streams its
// tiles through its own ring in shared memory, and adds 16 steps of m16n8k16 a tile. Sums of
// warps, then of pieces, are taken in a fixed order that depends on the matrices and the card
// alone: a token's bits are the same whatever the other tokens are.
// Bound: bytes of the weights, each read once.
//
// Macros: TYPES (bit mask of QuantTypes), NUM_PANELS (1: up to 8 tokens, 2: up to 16), SLOTS and
// SLOT_BYTES (a warp's ring), WARPS (a multiple of 4), EPILOGUE (0 store, 1 add to a residual,
// 2 SwiGLU of paired rows), BULK_COPIES (1: the copy engine fills the rings, sm_90 on; 0: cp.async)
#include "quant_blocks.cuh"
#include "warp.cuh"
#if BULK_COPIES
#include "pipeline.cuh"
#endif

constexpr int LANES_OF_UNITS = WARPS / 4;  // units in work at once
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

#if BULK_COPIES
__device__ __forceinline__ void issue_copy(
    Ring& ring, int slot, const u8* from, int bytes, int lane) {
    if (lane != 0) return;
    barrier_expect(ring.full + slot, bytes);
    copy_bulk(ring.slots + slot * SLOT_BYTES, from, bytes, ring.full + slot);
}

__device__ __forceinline__ void issue_nothing() {}

__device__ __forceinline__ void wait_for_slot(Ring& ring) {
    barrier_wait(ring.full + ring.slot, ring.phase);
}
#else
__device__ __forceinline__ void issue_copy(
    Ring& ring, int slot, const u8* from, int bytes, int lane) {
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

// Walks the tiles of a warp: one of every LANES_OF_UNITS-th unit of the block's pieces.
struct Walk {
    const Piece* piece;
    const Piece* end;
    const u8* next;  // the tile to copy
    int tile_bytes, num_units, unit;
};

__device__ __forceinline__ void enter(Walk& w, int tile) {
    if (w.piece == w.end) return;
    w.tile_bytes = w.piece->tile_bytes;
    w.num_units = w.piece->num_units;
    w.next = w.piece->units + (w.unit * 4 + tile) * w.tile_bytes;
}

__device__ __forceinline__ void step(Walk& w, int tile, int units) {
    w.unit += units;
    w.next += units * 4 * w.tile_bytes;
    while (w.piece < w.end && w.unit >= w.num_units) {
        w.unit -= w.num_units;
        w.piece++;
        enter(w, tile);
    }
}

__device__ __forceinline__ void issue_next(Ring& ring, int slot, Walk& w, int tile, int lane) {
    if (w.piece == w.end) return issue_nothing();
    issue_copy(ring, slot, w.next, w.tile_bytes, lane);
    step(w, tile, LANES_OF_UNITS);
}

// x of a product: fp16 panels [NUM_PANELS, num_chunks, 32 lanes, 8], eight chunks a unit.
struct Input {
    const u8* panels;
    int num_chunks, num_tokens;
};

// Activations of a unit, as B operands: 16 bytes a lane, chunk and panel.
template <int chunks>
__device__ __forceinline__ void load_panels(
    uint4 (&x)[NUM_PANELS][chunks], const Input& in, int chunk, int lane) {
    const u8* at = in.panels + chunk * 512 + lane * 16;
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++) {
        if (8 * n + lane / 4 < in.num_tokens) {
#pragma unroll
            for (int i = 0; i < chunks; i++) x[n][i] = *(const uint4*)(at + i * 512);
        } else {
#pragma unroll
            for (int i = 0; i < chunks; i++) x[n][i] = make_uint4(0, 0, 0, 0);
        }
        at += in.num_chunks * 512;
    }
}

typedef float Sums[NUM_PANELS][2][4];  // even and odd steps apart, to shorten the chain of products

// How much of x a warp holds at once: a whole tile's, as far as registers reach.
constexpr int HELD_CHUNKS = NUM_PANELS == 1 ? 8 : 4;

template <int type>
__device__ __forceinline__ void multiply_tile(
    Sums& sum, const u8* tile, const Input& in, int chunk, Ring& ring, int lane) {
    uint4 x[NUM_PANELS][HELD_CHUNKS];
    load_panels(x, in, chunk, lane);
    wait_for_slot(ring);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        HalfTile h;
        load_half<type>(h, tile, lane, half);
        if (half == 1 && HELD_CHUNKS == 4) load_panels(x, in, chunk + 4, lane);
#pragma unroll
        for (int step = 0; step < 8; step++) {
            u32 a[4];
            fragment<type>(a, h, tile, lane, half, step);
#pragma unroll
            for (int n = 0; n < NUM_PANELS; n++) {
                const uint4& v = x[n][(half * 4 + step / 2) % HELD_CHUNKS];
                if (step % 2 == 0) mma_m16n8k16(sum[n][0], a, v.x, v.y);
                else mma_m16n8k16(sum[n][1], a, v.z, v.w);
            }
        }
    }
}

// Sums of a warp's 16 rows to shared memory, [token][64 rows] for each lane of units.
__device__ __forceinline__ void leave_sums(float* to, const Sums& sum, int tile, int lane) {
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int token = 8 * n + (lane & 3) * 2 + (c & 1);
            const int row = 16 * tile + (lane >> 2) + (c >> 1) * 8;
            to[token * 64 + row] = sum[n][0][c] + sum[n][1][c];
        }
}

struct Output {
    float* rows;       // EPILOGUE 0, 1: float32 [tokens, stride]
    u8* panels;        // EPILOGUE 2: fp16 panels of the product, stride / 256 blocks
    int stride, num_tokens;
};

// The sums of a block's lanes of units in shared memory, added in order.
struct BlockSums {
    const float* sums;

    __device__ __forceinline__ float operator()(int i) const {
        float total = 0.0f;
#pragma unroll
        for (int u = 0; u < LANES_OF_UNITS; u++) total += sums[u * TOKENS * 64 + i];
        return total;
    }
};

// The sums of all pieces of a cut stripe, added in order.
struct PieceSums {
    const float* first;
    int num_slots;

    __device__ __forceinline__ float operator()(int i) const {
        float total = 0.0f;
        for (int s = 0; s < num_slots; s++) total += __ldcg(first + s * TOKENS * 64 + i);
        return total;
    }
};

// Writes a stripe; `sums(i)` gives that of token i / 64, row i % 64.
template <typename Sources>
__device__ __forceinline__ void finish(const Output& out, const Piece& p, const Sources& sums) {
    for (int i = threadIdx.x; i < out.num_tokens * 64; i += THREADS) {
        const int token = i / 64, row = i % 64;
        if (EPILOGUE == 2) {
            if (row % 16 >= 8) continue;
            const float gate = sums(i) / ACTIVATION_SCALE, up = sums(i + 8) / ACTIVATION_SCALE;
            const float y = gate / (1.0f + __expf(-gate)) * up;
            const int k = p.row / 2 + row / 16 * 8 + row % 8, t = k % 256 / 64, e = k % 64;
            const int unit = (token / 8 * (out.stride / 256) + k / 256) * 8 + e / 8;
            u8* at = out.panels + unit * 512 + (token % 8 * 4 + t) * 16 + e % 8 * 2;
            *(u16*)at = float_half(y * ACTIVATION_SCALE);
        } else if (row < p.num_rows) {
            float* at = out.rows + (long long)token * out.stride + p.row + row;
            const float y = sums(i) / ACTIVATION_SCALE;
            *at = EPILOGUE == 1 ? *at + y : y;
        }
    }
}

// A whole stripe is finished; a cut one's sums go to its slot. The block's next piece must leave
// its sums elsewhere: this ends without a barrier.
__device__ __forceinline__ void reduce_piece(
    const Piece& p, const BlockSums& sums, float* partial, const Output& out) {
    __syncthreads();
    if (p.slot < 0) return finish(out, p, sums);
    float* slot = partial + (long long)p.slot * TOKENS * 64;
    for (int i = threadIdx.x; i < out.num_tokens * 64; i += THREADS) __stcg(slot + i, sums(i));
}

__device__ __forceinline__ void join_pieces(
    const Piece& p, const float* partial, const Output& out) {
    finish(out, p, PieceSums{partial + (long long)p.first_slot * TOKENS * 64, p.num_slots});
}

// Only a block's first and last piece can be cut. Whoever brings the last piece of a stripe joins
// them; both are announced together, at the end, because a round trip costs microseconds.
__device__ void finish_cut_stripes(
    const Piece* first, const Piece* last, const float* partial, int* counters, int* is_last,
    const Output& out) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x < 2) {
        const Piece* p = threadIdx.x == 0 ? first : last;
        int yes = 0;
        if (p->slot >= 0 && (threadIdx.x == 0 || first != last)) {
            yes = atomicAdd(counters + p->counter, 1) == p->num_slots - 1;
            if (yes) counters[p->counter] = 0;
            __threadfence();
        }
        is_last[threadIdx.x] = yes;
    }
    __syncthreads();
    if (is_last[0]) join_pieces(*first, partial, out);
    if (is_last[1]) join_pieces(*last, partial, out);
}

template <int type>
__device__ __forceinline__ void dispatch(
    int wanted, Sums& sum, const u8* tile, const Input& in, int chunk, Ring& ring, int lane) {
    if constexpr (type < 7) {
        if constexpr ((TYPES >> type) & 1) {
            if (wanted == type) return multiply_tile<type>(sum, tile, in, chunk, ring, lane);
        }
        dispatch<type + 1>(wanted, sum, tile, in, chunk, ring, lane);
    }
}

__device__ __forceinline__ void start_ring(Ring& ring, Walk& ahead, int tile, int lane) {
#if BULK_COPIES
    if (lane == 0) {
        for (int s = 0; s < SLOTS; s++) barrier_init(ring.full + s, 1);
        barrier_init_done();
    }
    __syncwarp();
#endif
    for (int s = 0; s < SLOTS; s++) issue_next(ring, s, ahead, tile, lane);
}

// pieces: Piece [blocks, max_pieces]; num_pieces: int32 [blocks]; panels: fp16 panels of x,
// [NUM_PANELS, num_blocks * 8, 32 lanes, 8]; rows: float32 [num_tokens, stride] or null;
// out_panels: fp16 panels or null; partial: float32 [slots, TOKENS, 64]; counters: int32, zero.
extern "C" __global__ void __launch_bounds__(THREADS, 1) quant_gemv(
    const Piece* pieces, const int* num_pieces, const u8* panels, float* rows, u8* out_panels,
    float* partial, int* counters, int max_pieces, int num_blocks, int num_tokens, int stride) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ u64 full[WARPS * SLOTS];
    __shared__ int is_last[2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own_tile = warp % 4;
    float* sums = (float*)(memory + WARPS * SLOTS * SLOT_BYTES);
    Ring ring = {memory + warp * SLOTS * SLOT_BYTES, full + warp * SLOTS, 0, 0};
    const Piece* first = pieces + blockIdx.x * max_pieces;
    const Piece* end = first + num_pieces[blockIdx.x];
    Walk here = {first, end, nullptr, 0, 0, warp / 4};
    enter(here, own_tile);
    step(here, own_tile, 0);
    Walk ahead = here;
    start_ring(ring, ahead, own_tile, lane);
    wait_for_previous_kernel();
    const Output out = {rows, out_panels, stride, num_tokens};
    const Input in = {panels, num_blocks * 8, num_tokens};
    for (const Piece* p = first; p < end; p++) {
        Sums sum = {};
        const int type = p->type, first_chunk = p->first_block * 8;
        while (here.piece == p) {
            const u8* tile = ring.slots + ring.slot * SLOT_BYTES;
            dispatch<0>(type, sum, tile, in, first_chunk + here.unit * 8, ring, lane);
            __syncwarp();
            issue_next(ring, ring.slot, ahead, own_tile, lane);
            if (++ring.slot == SLOTS) ring.slot = 0, ring.phase ^= 1;
            step(here, own_tile, LANES_OF_UNITS);
            // Late, so that no block of the next kernel takes a place that this one still needs.
            if (ahead.piece == end) allow_next_kernel();
        }
        float* own = sums + (p - first) % 2 * LANES_OF_UNITS * TOKENS * 64;
        leave_sums(own + warp / 4 * TOKENS * 64, sum, own_tile, lane);
        reduce_piece(*p, BlockSums{own}, partial, out);
    }
    if (first < end) finish_cut_stripes(first, end - 1, partial, counters, is_last, out);
}
