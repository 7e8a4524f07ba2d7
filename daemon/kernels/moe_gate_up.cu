// Gate and up of every expert that any of up to 16 rows chose, and of the shared one, with SwiGLU.
//
// Which experts is read from device memory (moe_route), so that a recorded launch serves any
// choice. An item is a tile of one expert; a team of TEAM warps makes it, each warp its own blocks
// of k, and adds the sums in the order of the warps. Items are dealt to the teams in turn, those of
// the shared expert first: their tiles are asked for before the previous kernel has ended. Every
// expert is multiplied with all rows, which costs nothing; moe_down takes what was chosen. So each
// weight is read once, and a row's bits do not depend on the others.
// Bound: bytes of the chosen experts.
//
// Macros besides those of moe_tiles.cuh: TEAM, TEAMS (of a block), TURNS (blocks of k a warp),
// EPILOGUE (0: store the sums; 2: SwiGLU of paired rows; 3: SiLU, times the stored sums of `up`).
#include "moe_tiles.cuh"

constexpr int WARPS = TEAM * TEAMS;
constexpr int THREADS = 32 * WARPS;
constexpr int TEAM_THREADS = 32 * TEAM;
constexpr bool HOLDS_ROWS = TURNS == 1 && NUM_PANELS == 1;  // one block of k: x is loaded once
constexpr int STRIDE = 20;  // of a token's 16 sums in shared memory: without bank conflicts
constexpr int ITEM_SUMS = TEAM * TOKENS * STRIDE;

struct Work {
    Matrix routed, shared;
    const int* experts;  // in shared memory: how many, then each
    int num_items;

    __device__ __forceinline__ bool is_shared(int item) const { return item < shared.tile_rows; }

    __device__ __forceinline__ int slot(int item) const {
        return is_shared(item) ? 0 : 1 + (item - shared.tile_rows) / routed.tile_rows;
    }

    __device__ __forceinline__ int row(int item) const {
        return is_shared(item) ? item : (item - shared.tile_rows) % routed.tile_rows;
    }

    __device__ __forceinline__ const u8* tile(int item, int block) const {
        if (is_shared(item)) return shared.tile(0, item, block);
        return routed.tile(experts[slot(item)], row(item), block);
    }
};

// The tile that a warp will ask for next.
struct Ahead {
    int item, block;
};

__device__ __forceinline__ void issue_next(
    Ring& ring, int slot, Ahead& ahead, const Work& work, int lane) {
    if (ahead.item >= work.num_items) return issue_nothing();
    const int bytes = work.is_shared(ahead.item) ? work.shared.tile_bytes : work.routed.tile_bytes;
    issue_copy(ring, slot, work.tile(ahead.item, ahead.block), bytes, lane);
    ahead.block += TEAM;
    if (ahead.block < work.routed.num_blocks) return;
    ahead.block %= TEAM;
    ahead.item += gridDim.x * TEAMS;
}

__device__ __forceinline__ void leave_sums(float* to, const Sums& sum, int lane) {
#pragma unroll
    for (int n = 0; n < NUM_PANELS; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int token = 8 * n + lane % 4 * 2 + c % 2, row = lane / 4 + c / 2 * 8;
            to[token * STRIDE + row] = sum[n][0][c] + sum[n][1][c];
        }
}

__device__ __forceinline__ float total(const float* sums, int token, int row) {
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < TEAM; w++) all += sums[(w * TOKENS + token) * STRIDE + row];
    return all / ACTIVATION_SCALE;
}

// hidden: fp16 panels [slots, NUM_PANELS, hidden_blocks, 8 chunks, 32 lanes, 8], for moe_down.
// up: f32 [slots, MAX_ROWS, up_stride].
struct Output {
    u8* hidden;
    float* up;
    int hidden_blocks, up_stride, num_rows;

    __device__ __forceinline__ void write(int slot, int token, int k, float gate, float up) const {
        const float y = swiglu(gate, up);
        u8* panels = hidden + (long long)slot * NUM_PANELS * hidden_blocks * 4096;
        u8* at = panel_place(panels, token, k, hidden_blocks * 256);
        *(u16*)at = float_to_half(y * ACTIVATION_SCALE);
    }
};

__device__ __forceinline__ void finish(
    const Output& out, const float* sums, int type, int slot, int tile_row, int thread) {
    const int rows = EPILOGUE == 2 ? 8 : tile_height(type);
    for (int i = thread; i < out.num_rows * rows; i += TEAM_THREADS) {
        const int token = i / rows, row = i % rows, k = tile_row * rows + row;
        float* stored = out.up + (long long)(slot * MAX_ROWS + token) * out.up_stride + k;
        const float sum = total(sums, token, row);
        if (EPILOGUE == 0) *stored = sum;
        if (EPILOGUE == 2) out.write(slot, token, k, sum, total(sums, token, row + 8));
        if (EPILOGUE == 3) out.write(slot, token, k, sum, *stored);
    }
}

// routed, shared: tiles of all experts, of the shared one; either may have no rows. panels: fp16
// [NUM_PANELS, num_blocks * 8, 32 lanes, 8]; list: moe_route's experts; max_slots: of the list.
extern "C" __global__ void __launch_bounds__(THREADS, 1) moe_gate_up(
    const u8* routed, const u8* shared, const int* list, const u8* panels, u8* hidden, float* up,
    int routed_type, int routed_bytes, int routed_rows, int shared_type, int shared_bytes,
    int shared_rows, int num_blocks, int hidden_blocks, int up_stride, int max_slots,
    int num_rows) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ u64 full[WARPS * SLOTS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / TEAM;
    float* sums = (float*)(memory + WARPS * SLOTS * SLOT_BYTES) + team * 2 * ITEM_SUMS;
    int* experts = (int*)(memory + WARPS * SLOTS * SLOT_BYTES) + TEAMS * 2 * ITEM_SUMS;
    const int first = team * gridDim.x + blockIdx.x, block = warp % TEAM;
    Work work = {{routed, routed_type, routed_bytes, routed_rows, num_blocks},
                 {shared, shared_type, shared_bytes, shared_rows, num_blocks},
                 experts, shared_rows};
    Ring ring = {memory + warp * SLOTS * SLOT_BYTES, full + warp * SLOTS, 0, 0};
    start_ring(ring, lane);
    Ahead ahead = {first, block};
    int asked = 0;
    for (; asked < SLOTS && work.is_shared(ahead.item); asked++)
        issue_next(ring, asked, ahead, work, lane);
    wait_for_previous_kernel();
    // Not earlier: moe_down reads moe_route's lists before it waits for this kernel.
    allow_next_kernel();
    for (int i = threadIdx.x; i < max_slots; i += THREADS) experts[i] = __ldcg(list + i);
    __syncthreads();
    work.num_items = shared_rows + experts[0] * routed_rows;
    for (; asked < SLOTS; asked++) issue_next(ring, asked, ahead, work, lane);

    const int panel_bytes = num_blocks * 4096;
    Input in = {panels + block * 4096, panel_bytes, num_rows};
    const Output out = {hidden, up, hidden_blocks, up_stride, num_rows};
    Rows x;
    if (HOLDS_ROWS) load_rows(x, in, 0, lane);
    int buffer = 0;
    for (int item = first; item < work.num_items; item += gridDim.x * TEAMS, buffer ^= 1) {
        const int type = work.is_shared(item) ? shared_type : routed_type;
        Sums sum = {};
        for (int k = block; k < num_blocks; k += TEAM) {
            in.panels = panels + k * 4096;
            if (!HOLDS_ROWS) load_rows(x, in, 0, lane);
            wait_for_slot(ring);
            multiply(type, sum, ring.tile(), x, in, lane);
            __syncwarp();
            issue_next(ring, ring.slot, ahead, work, lane);
            ring.advance();
        }
        // In turn: the sums of the item before may still be read.
        float* own = sums + buffer * ITEM_SUMS;
        leave_sums(own + block * TOKENS * STRIDE, sum, lane);
        named_barrier<TEAM_THREADS>(1 + team);
        finish(out, own, type, work.slot(item), work.row(item), threadIdx.x % TEAM_THREADS);
    }
}
