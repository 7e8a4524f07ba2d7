// A few rows times quantized matrices: y[token, row] = sum over k of W[row, k] x[token, k].
//
// One launch takes a group of matrices that share their input. The host deals the stripes' units
// (64 rows x 256 columns) in order, in equal bytes, to teams of four warps, so a stripe may be cut
// into pieces. A warp takes one of a unit's four tiles, streams its tiles through a ring of its own
// in shared memory, adds 16 steps of m16n8k16 a tile, and never waits for another warp. The pieces
// of a cut stripe are joined by whichever warp brings the last one, in a fixed order that depends
// on the matrices and the card alone: a token's bits are the same whatever the other tokens are.
// When a warp has asked for its last tile, it brings the beginning of the next launch's weights
// into the L2 cache: memory goes on working while this launch ends and the small ones between run.
// Bound: bytes of the weights, each read once.
//
// Macros: TYPES (bit mask of QuantTypes), NUM_PANELS (1: up to 8 tokens, 2: up to 16), SLOTS and
// SLOT_BYTES (a warp's ring), WARPS (a multiple of 4), BLOCKS_PER_SM, EPILOGUE (0 store, 1 add to a
// residual, 2 SwiGLU of paired rows), BULK_COPIES (1: the copy engine fills the rings, sm_90 on;
// 0: cp.async)
#include "quant_blocks.cuh"
#include "warp.cuh"
#if BULK_COPIES
#include "pipeline.cuh"
#endif

constexpr int TEAM_WARPS = 4;
constexpr int TEAMS = WARPS / TEAM_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr float ACTIVATION_SCALE = 0.125f;  // x in fp16 is x / 8: values up to 524,000 fit

// A run of units of one stripe, for one team.
struct Piece {
    const u8* units;  // the first unit
    int type, tile_bytes, first_block, num_units;  // num_units 0 ends a team's list
    int row, num_rows;  // of the output; num_rows up to 64
    int slot;           // where its sums go; -1 if it is a whole stripe
    int first_slot, num_slots, counter;  // of all pieces of its stripe
};
constexpr int PIECE_WORDS = sizeof(Piece) / 16;

struct Ring {
    u8* slots;  // of this warp
    u64* full;  // one barrier a slot, sm_90 on
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

__device__ __forceinline__ void prefetch(const u8* from, int bytes) { prefetch_bulk(from, bytes); }

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

__device__ __forceinline__ void prefetch(const u8*, int) {}

__device__ __forceinline__ void wait_for_slot(Ring&) {
    copy_async_wait<SLOTS - 1>();
    __syncwarp();
}
#endif

// The beginning of the next launch's weights: `bytes` of each team's, from its own list of pieces.
struct Upcoming {
    const Piece* pieces;  // null: nothing is known of the next launch
    int max_pieces, bytes;
};

constexpr int PREFETCH_BYTES = 1024;  // a request

__device__ void prefetch_upcoming(const Upcoming& u, int team, int part, int lane) {
    if (u.pieces == nullptr) return;
    const Piece* p = u.pieces + team * u.max_pieces;
    for (int left = u.bytes; left > 0 && p->num_units > 0; p++) {
        const int bytes = min(left, p->num_units * TEAM_WARPS * p->tile_bytes);
        for (int at = (part * 32 + lane) * PREFETCH_BYTES; at < bytes;
             at += 32 * TEAM_WARPS * PREFETCH_BYTES)
            prefetch(p->units + at, min(PREFETCH_BYTES, bytes - at));
        left -= bytes;
    }
}

// The tiles that a warp has yet to ask for.
struct Ahead {
    const Piece* piece;
    const u8* tile;
    int units_left;  // of the piece

    __device__ __forceinline__ void enter(int part) {
        units_left = piece->num_units;
        tile = piece->units + part * piece->tile_bytes;
    }
};

// Asks for the next tile; false when there is none.
__device__ __forceinline__ bool issue_next(Ring& ring, int slot, Ahead& a, int part, int lane) {
    if (a.units_left == 0) {
        if (a.piece->num_units != 0) a.piece++;
        if (a.piece->num_units == 0) {
            issue_nothing();
            return false;
        }
        a.enter(part);
    }
    const int bytes = a.piece->tile_bytes;
    issue_copy(ring, slot, a.tile, bytes, lane);
    a.tile += TEAM_WARPS * bytes;
    a.units_left--;
    return true;
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

struct Output {
    float* rows;  // EPILOGUE 0, 1: float32 [tokens, stride]
    u8* panels;   // EPILOGUE 2: fp16 panels of the product, stride / 256 blocks
    int stride, num_tokens;
};

// Of a panel: rows g, g, g + 8, g + 8 of the warp's tile, tokens 2t, 2t + 1, 2t, 2t + 1.
typedef float4 Totals[NUM_PANELS];

__device__ __forceinline__ void write_row(
    const Output& out, const Piece& p, int row, int token, float first, float second) {
    if (row >= p.num_rows) return;
    float* at = out.rows + (long long)token * out.stride + p.row + row;
    const bool has_first = token < out.num_tokens, has_second = token + 1 < out.num_tokens;
    if (EPILOGUE == 1) {
        const float a = has_first ? at[0] : 0.0f, b = has_second ? at[out.stride] : 0.0f;
        first = a + first / ACTIVATION_SCALE, second = b + second / ACTIVATION_SCALE;
    } else {
        first /= ACTIVATION_SCALE, second /= ACTIVATION_SCALE;
    }
    if (has_first) at[0] = first;
    if (has_second) at[out.stride] = second;
}

__device__ __forceinline__ void write_product(
    const Output& out, int k, int token, float gate, float up) {
    if (token >= out.num_tokens) return;
    gate /= ACTIVATION_SCALE, up /= ACTIVATION_SCALE;
    const float y = gate / (1.0f + __expf(-gate)) * up;
    const int t = k % 256 / 64, e = k % 64;
    const int unit = (token / 8 * (out.stride / 256) + k / 256) * 8 + e / 8;
    u8* at = out.panels + unit * 512 + (token % 8 * 4 + t) * 16 + e % 8 * 2;
    *(u16*)at = float_half(y * ACTIVATION_SCALE);
}

__device__ __forceinline__ void finish(
    const Output& out, const Piece& p, const Totals& total, int part, int lane) {
    const int g = lane >> 2;
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++) {
        const int token = 8 * n + (lane & 3) * 2;
        if (EPILOGUE == 2) {
            const int k = p.row / 2 + 8 * part + g;
            write_product(out, k, token, total[n].x, total[n].z);
            write_product(out, k, token + 1, total[n].y, total[n].w);
        } else {
            write_row(out, p, 16 * part + g, token, total[n].x, total[n].y);
            write_row(out, p, 16 * part + g + 8, token, total[n].z, total[n].w);
        }
    }
}

// Leaves a piece's sums in its slot. True for the last warp to come: it has the whole stripe's.
// partial: float4 [slots, 4 tiles, NUM_PANELS, 32 lanes].
__device__ __forceinline__ bool join(
    Totals& total, const Piece& p, float4* partial, int* counters, int part, int lane) {
    constexpr int SLOT = TEAM_WARPS * NUM_PANELS * 32;
    float4* place = partial + part * NUM_PANELS * 32 + lane;
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++) __stcg(place + p.slot * SLOT + n * 32, total[n]);
    __threadfence();
    __syncwarp();
    int* counter = counters + p.counter * TEAM_WARPS + part;
    int before = 0;
    if (lane == 0) before = atomicAdd(counter, 1);
    if (__shfl_sync(0xffffffffu, before, 0) != p.num_slots - 1) return false;
    if (lane == 0) *counter = 0;
    __threadfence();
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++) {
        total[n] = make_float4(0, 0, 0, 0);
#pragma unroll 4
        for (int s = 0; s < p.num_slots; s++) {
            const float4 v = __ldcg(place + (p.first_slot + s) * SLOT + n * 32);
            total[n].x += v.x, total[n].y += v.y, total[n].z += v.z, total[n].w += v.w;
        }
    }
    return true;
}

// Where a warp is in its work.
struct Worker {
    Ring ring;
    Ahead ahead;
    bool is_asking;  // its last tile has not been asked for
    int team, part, lane;
};

// Asks for a tile in the place of the one that was just used, until there are no more.
__device__ __forceinline__ void refill(Worker& w, int slot, const Upcoming& upcoming) {
    const bool had_more = issue_next(w.ring, slot, w.ahead, w.part, w.lane);
    if (w.is_asking && !had_more) prefetch_upcoming(upcoming, w.team, w.part, w.lane);
    w.is_asking = had_more;
}

template <int type>
__device__ __forceinline__ void multiply_piece(
    Sums& sum, const Piece& p, const Input& in, Worker& w, const Upcoming& upcoming) {
    int chunk = p.first_block * 8;
    for (int left = p.num_units; left > 0; left--, chunk += 8) {
        const u8* tile = w.ring.slots + w.ring.slot * SLOT_BYTES;
        multiply_tile<type>(sum, tile, in, chunk, w.ring, w.lane);
        __syncwarp();
        refill(w, w.ring.slot, upcoming);
        if (++w.ring.slot == SLOTS) w.ring.slot = 0, w.ring.phase ^= 1;
    }
}

template <int type>
__device__ __forceinline__ void dispatch(
    Sums& sum, const Piece& p, const Input& in, Worker& w, const Upcoming& upcoming) {
    if constexpr (type < 7) {
        if constexpr ((TYPES >> type) & 1) {
            if (p.type == type) return multiply_piece<type>(sum, p, in, w, upcoming);
        }
        dispatch<type + 1>(sum, p, in, w, upcoming);
    }
}

__device__ __forceinline__ void start_ring(Worker& w, const Upcoming& upcoming) {
#if BULK_COPIES
    if (w.lane == 0) {
        for (int s = 0; s < SLOTS; s++) barrier_init(w.ring.full + s, 1);
        barrier_init_done();
    }
    __syncwarp();
#endif
    for (int s = 0; s < SLOTS; s++) refill(w, s, upcoming);
}

// pieces: Piece [blocks x TEAMS, max_pieces]; upcoming: the next launch's or null, [same teams,
// upcoming_max_pieces]; panels: fp16 panels of x, [NUM_PANELS, num_blocks * 8, 32 lanes, 8]; rows:
// float32 [num_tokens, stride] or null; out_panels: fp16 panels or null; partial: float4 [slots, 4,
// NUM_PANELS, 32]; counters: int32 [cut stripes, 4], zero.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) quant_gemv(
    const Piece* pieces, const Piece* upcoming, const u8* panels, float* rows, u8* out_panels,
    float4* partial, int* counters, int max_pieces, int upcoming_max_pieces, int upcoming_bytes,
    int num_blocks, int num_tokens, int stride) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ u64 full[WARPS * SLOTS];
    allow_next_kernel();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Piece* table = (Piece*)(memory + WARPS * SLOTS * SLOT_BYTES);
    const uint4* dealt = (const uint4*)(pieces + blockIdx.x * TEAMS * max_pieces);
    for (int i = threadIdx.x; i < TEAMS * max_pieces * PIECE_WORDS; i += THREADS)
        ((uint4*)table)[i] = dealt[i];
    __syncthreads();

    const Piece* first = table + warp / TEAM_WARPS * max_pieces;
    const Upcoming next = {upcoming, upcoming_max_pieces, upcoming_bytes};
    Worker w = {{memory + warp * SLOTS * SLOT_BYTES, full + warp * SLOTS, 0, 0},
                {first, nullptr, 0},
                true,
                int(blockIdx.x) * TEAMS + warp / TEAM_WARPS,
                warp % TEAM_WARPS,
                lane};
    w.ahead.enter(w.part);
    start_ring(w, next);
    wait_for_previous_kernel();
    const Output out = {rows, out_panels, stride, num_tokens};
    const Input in = {panels, num_blocks * 8, num_tokens};
    for (const Piece* p = first; p->num_units > 0; p++) {
        Sums sum = {};
        dispatch<0>(sum, *p, in, w, next);
        Totals total;
#pragma unroll
        for (int n = 0; n < NUM_PANELS; n++)
            total[n] = make_float4(
                sum[n][0][0] + sum[n][1][0], sum[n][0][1] + sum[n][1][1],
                sum[n][0][2] + sum[n][1][2], sum[n][0][3] + sum[n][1][3]);
        const bool is_whole = p->slot < 0;
        if (is_whole || join(total, *p, partial, counters, w.part, lane))
            finish(out, *p, total, w.part, lane);
    }
}
