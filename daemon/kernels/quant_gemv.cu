// A chain of products of a few rows with quantized matrices, y[token, row] = sum over k of
// W[row, k] x[token, k], and of the norms between them, in one launch.
//
// The host deals the stripes' units (64 rows x 256 columns) of each product in order, in equal
// bytes, to the blocks and within them to teams of four warps, so a stripe may be cut. A warp takes
// one of a unit's four tiles, takes its tiles from a ring of its own in shared memory, adds 16
// steps of m16n8k16 a tile, and waits for no other warp before the product's end. (Where there is a
// copy engine, one more warp feeds all rings, a lane each.) Then cut stripes are joined: within a
// block through shared memory, between blocks by the last of them, which awaits the others' sums.
// The order of all sums depends on the matrices and the card alone: a token's bits are the same
// whatever the other tokens are.
// Between steps all blocks meet; the rings fill with the next product's tiles meanwhile. At the end
// a warp brings the beginning of the next chain's weights into the L2 cache.
// Bound: bytes of the weights, each read once.
//
// Macros: TYPES (bit mask of QuantTypes), NUM_PANELS (1: up to 8 tokens, 2: up to 16), RING_BYTES
// (of a warp), WARPS (a multiple of 4), BLOCKS_PER_SM, BULK_COPIES (1: the copy engine fills the
// rings, sm_90 on; 0: cp.async)
#include "gemv_rings.cuh"
#include "operand.cuh"
#include "quant_blocks.cuh"
#include "warp.cuh"

// The beginning of the next chain's weights: `bytes` of each team's, from what it is dealt.
struct Upcoming {
    const u8* deals;  // of all blocks; null: nothing is known of the next chain
    int max_pieces, bytes;
};

constexpr int PREFETCH_BYTES = 1024;  // a request

__device__ void prefetch_upcoming(const Upcoming& u, int team, int part, int lane) {
    if (u.deals == nullptr) return;
    const u8* deal = u.deals + team / TEAMS * (long long)deal_bytes(u.max_pieces);
    const Piece* p = (const Piece*)deal + team % TEAMS * u.max_pieces;
    for (int left = u.bytes; left > 0 && p->num_units > 0; p++) {
        const int bytes = min(left, p->num_units * TEAM_WARPS * p->tile_bytes);
        for (int at = (part * 32 + lane) * PREFETCH_BYTES; at < bytes;
             at += 32 * TEAM_WARPS * PREFETCH_BYTES)
            prefetch(p->units + at, min(PREFETCH_BYTES, bytes - at));
        left -= bytes;
    }
}

// x of a product.
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

// Where the result of a product goes.
struct Output {
    float* rows;
    u8* panels;
    int epilogue, stride, num_tokens;
};

// Of a panel: rows g, g, g + 8, g + 8 of the warp's tile, tokens 2t, 2t + 1, 2t, 2t + 1.
typedef float4 Totals[NUM_PANELS];

__device__ __forceinline__ void write_row(
    const Output& out, int row, int token, float first, float second) {
    float* at = out.rows + (long long)token * out.stride + row;
    const bool has_first = token < out.num_tokens, has_second = token + 1 < out.num_tokens;
    if (out.epilogue == ADD) {
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
    *(u16*)panel_place(out.panels, token, k, out.stride) = float_half(y * ACTIVATION_SCALE);
}

// Writes a warp's 16 of a stripe's rows.
__device__ __forceinline__ void finish(
    const Output& out, int row, int num_rows, const Totals& total, int part, int lane) {
    const int own = 16 * part + (lane >> 2);
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++) {
        const int token = 8 * n + (lane & 3) * 2;
        if (out.epilogue == SWIGLU) {
            const int k = row / 2 + 8 * part + (lane >> 2);
            write_product(out, k, token, total[n].x, total[n].z);
            write_product(out, k, token + 1, total[n].y, total[n].w);
        } else {
            if (own < num_rows) write_row(out, row + own, token, total[n].x, total[n].y);
            if (own + 8 < num_rows) write_row(out, row + own + 8, token, total[n].z, total[n].w);
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
    if (s.own_slot < 0) finish(out, s.row, s.num_rows, total, part, lane);
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
    Sums& sum, Part (&x)[2], const Input& in, int chunk, int next_chunk, Worker& w,
    const Deals& deals) {
    const u8* tile = w.front();
    // Both halves at once, where registers reach: the sooner the next tile can come.
    constexpr int HALVES = NUM_PANELS == 1 ? 2 : 1;
    HalfTile h[HALVES];
    load_half<type>(h[0], tile, w.lane, 0);
    if (HALVES == 2) load_half<type>(h[HALVES - 1], tile, w.lane, 1);
    if (HALVES == 2 && type != F16) w.release(deals);
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (HALVES == 1 && part == PARTS / 2) {
            load_half<type>(h[0], tile, w.lane, 1);
            if (type != F16) w.release(deals);
        }
        const int later = part + 1 < PARTS ? chunk + (part + 1) * PART_CHUNKS : next_chunk;
        load_part(x[(part + 1) % 2], in, later, w.lane);
        multiply_part<type>(sum, x[part % 2], h[part * HALVES / PARTS], tile, part, w.lane);
    }
    if (type == F16) w.release(deals);
}

// A team's later pieces begin with a stripe, at chunk 0.
template <int type>
__device__ __forceinline__ void multiply_piece(
    Sums& sum, Part (&x)[2], const Piece& p, const Input& in, Worker& w, const Deals& deals) {
    const int end = (p.first_block + p.num_units) * 8;
    for (int chunk = p.first_block * 8; chunk < end; chunk += 8)
        multiply_tile<type>(sum, x, in, chunk, chunk + 8 < end ? chunk + 8 : 0, w, deals);
}

template <int type>
__device__ __forceinline__ void dispatch(
    Sums& sum, Part (&x)[2], const Piece& p, const Input& in, Worker& w, const Deals& deals) {
    if constexpr (type < 7) {
        if constexpr ((TYPES >> type) & 1) {
            if (p.type == type) return multiply_piece<type>(sum, x, p, in, w, deals);
        }
        dispatch<type + 1>(sum, x, p, in, w, deals);
    }
}

__device__ __forceinline__ void run_product(
    const Step& step, const Piece* pieces, const Seam* seams, float4* sums, float4* partial,
    int num_tokens, Worker& w, const Deals& deals) {
    const Output out = {step.rows, step.out_panels, step.epilogue, step.stride, num_tokens};
    const Input in = {step.panels, step.num_blocks * 8, num_tokens};
    Part x[2];
    load_part(x[0], in, pieces->first_block * 8, w.lane);
    for (const Piece* p = pieces; p->num_units > 0; p++) {
        Sums sum = {};
        dispatch<0>(sum, x, *p, in, w, deals);
        Totals total;
#pragma unroll
        for (int n = 0; n < NUM_PANELS; n++) {
            total[n] = make_float4(
                sum[n][0][0] + sum[n][1][0], sum[n][0][1] + sum[n][1][1],
                sum[n][0][2] + sum[n][1][2], sum[n][0][3] + sum[n][1][3]);
            const int at = (w.part * NUM_PANELS + n) * 32 + w.lane;
            if (p->sums >= 0) sums[p->sums * SUMS + at] = total[n];
        }
        if (p->sums < 0) finish(out, p->row, p->num_rows, total, w.part, w.lane);
    }
    sync_warps();
    // The last first: what goes to another block must not wait for what comes from one.
    for (int s = MAX_SEAMS - 1 - w.team; s >= 0; s -= TEAMS)
        if (seams[s].num_sums > 0) close_seam(seams[s], sums, partial, out, w.part, w.lane);
}

__device__ __forceinline__ float square(float4 v) {
    return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
}

// One block's token to panels: x / sqrt(mean(x^2) + eps) times the weight.
__device__ void run_norm(const Step& step, int token, float eps, float* of_warp) {
    const float* row = step.rows + (long long)token * step.stride;
    float sum = 0.0f;
#pragma unroll 4
    for (int c = threadIdx.x * 4; c < step.stride; c += THREADS * 4)
        sum += square(*(const float4*)(row + c));
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    sync_warps();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += of_warp[w];
    const float scale = rsqrtf(total / step.stride + eps);
#pragma unroll 4
    for (int c = threadIdx.x * 4; c < step.stride; c += THREADS * 4) {
        const float4 v = *(const float4*)(row + c), w = *(const float4*)(step.weight + c);
        *(uint2*)panel_place(step.out_panels, token, c, step.stride) =
            make_uint2(operand_pair(v.x * w.x * scale, v.y * w.y * scale),
                       operand_pair(v.z * w.z * scale, v.w * w.w * scale));
    }
}

// Waits until all blocks have come here, and sees what they wrote. `arrivals` only grows.
__device__ __forceinline__ void meet(u64* arrivals) {
    sync_warps();
    if (threadIdx.x == 0) {
        u64 mine, seen;
        asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], 1;"
                     : "=l"(mine) : "l"(arrivals) : "memory");
        const u64 wanted = (mine / gridDim.x + 1) * gridDim.x;
        do {
            asm volatile("ld.acquire.gpu.global.u64 %0, [%1];"
                         : "=l"(seen) : "l"(arrivals) : "memory");
        } while (seen < wanted);
    }
    sync_warps();
}

// Copies a block's deals to shared memory; weights of norms come nearer for those who will norm.
__device__ __forceinline__ void load_deals(u8* to, const Chain& chain, int num_steps, int tokens) {
    for (int s = 0; s < num_steps; s++) {
        const Step& step = chain.steps[s];
        if (step.epilogue == NORM) {
            const int end = blockIdx.x < tokens ? step.stride : 0;
            for (int c = threadIdx.x * 32; c < end; c += ALL_THREADS * 32)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(step.weight + c));
            continue;
        }
        const int bytes = deal_bytes(step.max_pieces);
        for (int i = threadIdx.x * 8; i < bytes; i += ALL_THREADS * 8)
            *(uint2*)(to + i) = *(const uint2*)(step.deals + (long long)blockIdx.x * bytes + i);
        to += bytes;
    }
}

__device__ __forceinline__ void init_barriers(u64* full, u64* empty) {
#if BULK_COPIES
    for (int i = threadIdx.x; i < WARPS * MAX_TILES; i += ALL_THREADS) {
        barrier_init(full + i, 1);
        barrier_init(empty + i, 1);
    }
    barrier_init_done();
#endif
}

// partial: float4 [blocks, SUMS], sums on their way between blocks, all words AWAITED; arrivals:
// u64, 0 at first. All chains share both.
extern "C" __global__ void __launch_bounds__(ALL_THREADS, BLOCKS_PER_SM) quant_gemv(
    const __grid_constant__ Chain chain, float4* partial, u64* arrivals, const u8* upcoming,
    int upcoming_max_pieces, int upcoming_bytes, int num_steps, int num_tokens, float eps) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ u64 full[WARPS * MAX_TILES], empty[WARPS * MAX_TILES];
    __shared__ Note notes[WARPS * MAX_TILES];
    __shared__ float of_warp[WARPS];
    allow_next_kernel();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4* sums = (float4*)(memory + WARPS * RING_BYTES);
    u8* dealt = (u8*)(sums + 2 * TEAMS * SUMS);
    load_deals(dealt, chain, num_steps, num_tokens);
    init_barriers(full, empty);
    __syncthreads();

    const Deals deals = {dealt, chain, num_steps};
    const int fed = warp < WARPS ? warp : min(lane, WARPS - 1);
    const Ring ring = {memory + fed * RING_BYTES, notes + fed * MAX_TILES, full + fed * MAX_TILES,
                       empty + fed * MAX_TILES};
    const int own_team = fed / TEAM_WARPS, part = fed % TEAM_WARPS;
    const Feeder feeder = {ring, 0, RING_BYTES, 0, 0, -1, nullptr, nullptr, 0, own_team, part};
#if BULK_COPIES
    if (warp == WARPS) return feed_rings(feeder, deals, lane < WARPS);
    Worker w = {ring, 0, own_team, part, lane};
#else
    Worker w = {ring, 0, own_team, part, lane, feeder};
    fill_ring(w, deals);
#endif
    wait_for_previous_kernel();
    for (int s = 0; s < num_steps; s++) {
        const Step& step = chain.steps[s];
        if (s > 0) meet(arrivals);
        if (step.epilogue == NORM) {
            if (blockIdx.x < num_tokens) run_norm(step, blockIdx.x, eps, of_warp);
        } else {
            run_product(step, deals.pieces(s, w.team), deals.seams(s), sums, partial, num_tokens,
                        w, deals);
        }
    }
    const int team = blockIdx.x * TEAMS + w.team;
    prefetch_upcoming({upcoming, upcoming_max_pieces, upcoming_bytes}, team, w.part, lane);
}
