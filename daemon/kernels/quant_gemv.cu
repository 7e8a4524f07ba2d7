// A few rows times quantized matrices: y[token, row] = sum over k of W[row, k] x[token, k].
//
// One launch takes a group of matrices that share their input. The host deals the stripes' units
// (64 rows x 256 columns) in order, in equal bytes, to the blocks and within them to teams of four
// warps, so a stripe may be cut. A warp takes one of a unit's four tiles, streams its tiles through
// a ring of its own in shared memory, adds 16 steps of m16n8k16 a tile, and waits for no other warp
// before the end. Then cut stripes are joined: within a block through shared memory, between blocks
// by the last of them, which awaits the others' sums. The order of all sums depends on the matrices
// and the card alone: a token's bits are the same whatever the other tokens are.
// Bound: bytes of the weights, each read once.
//
// Macros: TYPES (bit mask of QuantTypes), NUM_PANELS (1: up to 8 tokens, 2: up to 16), WARPS (a
// multiple of 4), BLOCKS_PER_SM, EPILOGUE (0 store, 1 add to a residual, 2 SwiGLU of paired rows);
// those of weight_ring.cuh.
#include "mma.cuh"
#include "operand.cuh"
#include "quant_sums.cuh"
#include "weight_ring.cuh"

constexpr int TEAM_WARPS = 4;
constexpr int TEAMS = WARPS / TEAM_WARPS;
constexpr int THREADS = 32 * WARPS;

// A run of units of one stripe, for one team.
struct Piece {
    const u8* units;  // the first unit
    int type, tile_bytes, first_block, num_units;  // num_units 0 ends a team's list
    int row, num_rows;                             // of the output; num_rows up to 64
    int sums, unused;  // where its sums go in shared memory; -1 if it is a whole stripe
};

// What a block has of a stripe that is cut.
struct Seam {
    int first_sums, num_sums;    // of its pieces, in order; num_sums 0 ends a block's list
    int row, num_rows;           // of the output
    int first_slot, num_before;  // what the blocks before have of it, in order
    int own_slot, type;          // where this block's goes; -1 for the last block, which finishes
};

// What a block is dealt: Piece [TEAMS, max_pieces], then Seam [MAX_SEAMS].
constexpr int MAX_SEAMS = TEAMS + 2;

__device__ __forceinline__ int deal_bytes(int max_pieces) {
    return TEAMS * max_pieces * int(sizeof(Piece)) + MAX_SEAMS * int(sizeof(Seam));
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

// Asks for the next tile, if there is one.
__device__ __forceinline__ void issue_next(Ring& ring, int slot, Ahead& a, int part, int lane) {
    if (a.units_left == 0) {
        if (a.piece->num_units != 0) a.piece++;
        if (a.piece->num_units == 0) return issue_nothing();
        a.enter(part);
    }
    const int bytes = a.piece->tile_bytes;
    issue_copy(ring, slot, a.tile, bytes, lane);
    a.tile += TEAM_WARPS * bytes;
    a.units_left--;
}

// x of a product: fp16 panels [NUM_PANELS, num_chunks, 32 lanes, 8], eight chunks a unit.
struct Input {
    const u8* panels;
    int num_chunks, num_tokens;
};

// How many chunks of x make a part: a warp holds two parts, one in use and one on its way.
constexpr int PART_CHUNKS = 4 / NUM_PANELS;
constexpr int PARTS = 8 / PART_CHUNKS;  // of a tile
typedef uint4 Part[NUM_PANELS][PART_CHUNKS];  // B operands: 16 bytes a lane, panel and chunk

__device__ __forceinline__ void load_part(Part& x, const Input& in, int chunk, int lane) {
    const u8* at = in.panels + chunk * 512 + lane * 16;
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++) {
        const bool is_token = 8 * n + lane / 4 < in.num_tokens;
#pragma unroll
        for (int i = 0; i < PART_CHUNKS; i++)
            x[n][i] = is_token ? *(const uint4*)(at + i * 512) : make_uint4(0, 0, 0, 0);
        at += in.num_chunks * 512;
    }
}

typedef float Sums[NUM_PANELS][2][4];  // even and odd steps apart, to shorten the chain of products

struct Output {
    float* rows;  // EPILOGUE 0, 1: float32 [tokens, stride]
    u8* panels;   // EPILOGUE 2: fp16 panels of the product, stride / 256 blocks
    int stride, num_tokens;
};

// Of a panel: rows g, g, g + 8, g + 8 of the warp's tile, tokens 2t, 2t + 1, 2t, 2t + 1.
typedef float4 Totals[NUM_PANELS];

__device__ __forceinline__ void write_row(
    const Output& out, int row, int token, float first, float second) {
    float* at = out.rows + (long long)token * out.stride + row;
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
    const float y = swiglu(gate, up);
    *(u16*)panel_place(out.panels, token, k, out.stride) = float_to_half(y * ACTIVATION_SCALE);
}

// Writes a warp's quarter of a stripe's rows.
__device__ __forceinline__ void finish(
    const Output& out, int type, int row, int num_rows, const Totals& total, int part, int lane) {
    const int height = tile_height(type), own = height * part + (lane >> 2);
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++) {
        const int token = 8 * n + (lane & 3) * 2;
        if (EPILOGUE == 2) {
            const int k = row / 2 + 8 * part + (lane >> 2);
            write_product(out, k, token, total[n].x, total[n].z);
            write_product(out, k, token + 1, total[n].y, total[n].w);
        } else {
            if (own < num_rows) write_row(out, row + own, token, total[n].x, total[n].y);
            if (height == 16 && own + 8 < num_rows)
                write_row(out, row + own + 8, token, total[n].z, total[n].w);
        }
    }
}

// A sum that another block has not written yet: a NaN that no arithmetic gives.
constexpr u32 AWAITED = 0xffffffffu;

__device__ __forceinline__ bool is_awaited(float x) { return __float_as_uint(x) == AWAITED; }

// Waits for a block that came earlier in the grid, so that is running or has ended.
__device__ __forceinline__ float4 take(float4* place) {
    float4 v;
    do {
        asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                     : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(place) : "memory");
    } while (is_awaited(v.x) || is_awaited(v.y) || is_awaited(v.z) || is_awaited(v.w));
    const float empty = __uint_as_float(AWAITED);
    *place = make_float4(empty, empty, empty, empty);
    return v;
}

__device__ __forceinline__ void leave(float4* place, float4 v) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(place), "f"(v.x),
                 "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

__device__ __forceinline__ void add(float4& a, float4 b) {
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
}

constexpr int SUMS = TEAM_WARPS * NUM_PANELS * 32;  // float4s of a piece: [4 tiles, panel, lane]

// Joins what the block has of a cut stripe; hands it on, or finishes the stripe.
__device__ __forceinline__ void close_seam(
    const Seam& s, const float4* sums, float4* partial, const Output& out, int part, int lane) {
    const int own = part * NUM_PANELS * 32 + lane;
    Totals total;
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++) {
        const int at = own + n * 32;
        total[n] = sums[s.first_sums * SUMS + at];
        for (int i = 1; i < s.num_sums; i++) add(total[n], sums[(s.first_sums + i) * SUMS + at]);
        if (s.own_slot >= 0) {
            leave(partial + s.own_slot * SUMS + at, total[n]);
        } else if (s.num_before > 0) {
            float4 all = take(partial + s.first_slot * SUMS + at);
            for (int i = 1; i < s.num_before; i++)
                add(all, take(partial + (s.first_slot + i) * SUMS + at));
            add(all, total[n]);
            total[n] = all;
        }
    }
    if (s.own_slot < 0) finish(out, s.type, s.row, s.num_rows, total, part, lane);
}

// Where a warp is in its work.
struct Worker {
    Ring ring;
    Ahead ahead;
    int part, lane;
};

// A tile has been read from its slot.
__device__ __forceinline__ void release_slot(Worker& w) {
    __syncwarp();
    issue_next(w.ring, w.ring.slot, w.ahead, w.part, w.lane);
    w.ring.advance();
}

template <int type>
__device__ __forceinline__ void multiply_part(
    Sums& sum, const Part& x, const HalfTile& h, const u8* tile, int part, int lane) {
    constexpr int STEPS = 2 * PART_CHUNKS;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        const int step = part * STEPS + i;
        u32 a[4];
        fragment<type>(a, h, tile, lane, step / 8, step % 8);
#pragma unroll
        for (int n = 0; n < NUM_PANELS; n++) {
            const uint4& v = x[n][i / 2];
            if (i % 2 == 0) mma_m16n8k16(sum[n][0], a, v.x, v.y);
            else mma_m16n8k16(sum[n][1], a, v.z, v.w);
        }
    }
}

// Begins with the tile's first part of x in x[0], ends with that of the tile at `next_chunk`.
template <int type>
__device__ __forceinline__ void multiply_tile(
    Sums& sum, Factors& factors, Part (&x)[2], const Input& in, int chunk, int next_chunk,
    Worker& w) {
    wait_for_slot(w.ring);
    const u8* tile = w.ring.tile();
    HalfTile h[2];
    load_half<type>(h[0], tile, w.lane, 0);
    load_half<type>(h[1], tile, w.lane, 1);
    load_factors<type>(factors, tile, w.lane);
    if (!HAS_FACTORS<type>) release_slot(w);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        const int later = part + 1 < PARTS ? chunk + (part + 1) * PART_CHUNKS : next_chunk;
        load_part(x[(part + 1) % 2], in, later, w.lane);
        multiply_part<type>(sum, x[part % 2], h[part * 2 / PARTS], tile, part, w.lane);
    }
    if (HAS_FACTORS<type>) release_slot(w);
}

// A team's later pieces begin with a stripe, at chunk 0.
template <int type>
__device__ __forceinline__ void multiply_piece(
    Sums& sum, Part (&x)[2], const Piece& p, const Input& in, Worker& w) {
    const int end = (p.first_block + p.num_units) * 8;
    Factors factors;
    for (int chunk = p.first_block * 8; chunk < end; chunk += 8)
        multiply_tile<type>(sum, factors, x, in, chunk, chunk + 8 < end ? chunk + 8 : 0, w);
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) close_sums<type>(sum[n][i], factors);
}

template <int type>
__device__ __forceinline__ void dispatch(
    Sums& sum, Part (&x)[2], const Piece& p, const Input& in, Worker& w) {
    if constexpr (type < NUM_TYPES) {
        if constexpr ((TYPES >> type) & 1) {
            if (p.type == type) return multiply_piece<type>(sum, x, p, in, w);
        }
        dispatch<type + 1>(sum, x, p, in, w);
    }
}

// deals: u8 [blocks, deal_bytes(max_pieces)]; panels: fp16 panels of x, [NUM_PANELS,
// num_blocks * 8, 32 lanes, 8]; rows: float32 [num_tokens, stride] or null; out_panels: fp16 panels
// or null; partial: float4 [slots, SUMS], all words AWAITED.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) quant_gemv(
    const u8* deals, const u8* panels, float* rows, u8* out_panels, float4* partial,
    int max_pieces, int num_blocks, int num_tokens, int stride) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ u64 full[WARPS * SLOTS];
    allow_next_kernel();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4* sums = (float4*)(memory + WARPS * SLOTS * SLOT_BYTES);
    u8* dealt = (u8*)(sums + 2 * TEAMS * SUMS);
    const int bytes = deal_bytes(max_pieces);
    for (int i = threadIdx.x * 8; i < bytes; i += THREADS * 8)
        *(uint2*)(dealt + i) = *(const uint2*)(deals + (long long)blockIdx.x * bytes + i);
    __syncthreads();

    const Piece* pieces = (const Piece*)dealt + warp / TEAM_WARPS * max_pieces;
    const Seam* seams = (const Seam*)((const Piece*)dealt + TEAMS * max_pieces);
    Worker w = {{memory + warp * SLOTS * SLOT_BYTES, full + warp * SLOTS, 0, 0},
                {pieces, nullptr, 0},
                warp % TEAM_WARPS,
                lane};
    w.ahead.enter(w.part);
    start_ring(w.ring, lane);
    for (int s = 0; s < SLOTS; s++) issue_next(w.ring, s, w.ahead, w.part, lane);
    wait_for_previous_kernel();
    const Output out = {rows, out_panels, stride, num_tokens};
    const Input in = {panels, num_blocks * 8, num_tokens};
    Part x[2];
    load_part(x[0], in, pieces->first_block * 8, lane);
    for (const Piece* p = pieces; p->num_units > 0; p++) {
        Sums sum = {};
        dispatch<0>(sum, x, *p, in, w);
        Totals total;
#pragma unroll
        for (int n = 0; n < NUM_PANELS; n++) {
            total[n] = make_float4(
                sum[n][0][0] + sum[n][1][0], sum[n][0][1] + sum[n][1][1],
                sum[n][0][2] + sum[n][1][2], sum[n][0][3] + sum[n][1][3]);
            if (p->sums >= 0)
                sums[p->sums * SUMS + (w.part * NUM_PANELS + n) * 32 + lane] = total[n];
        }
        if (p->sums < 0) finish(out, p->type, p->row, p->num_rows, total, w.part, lane);
    }
    __syncthreads();
    // The last first: what goes to another block must not wait for what comes from one.
    for (int s = MAX_SEAMS - 1 - warp / TEAM_WARPS; s >= 0; s -= TEAMS)
        if (seams[s].num_sums > 0) close_seam(seams[s], sums, partial, out, w.part, lane);
}
