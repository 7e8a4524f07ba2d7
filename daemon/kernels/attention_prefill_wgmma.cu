// Prompt tokens attend to their pages, causally: flash attention on wgmma, for sm_90a.
//
// What attention_prefill.cu does, in another shape: a block takes one tile of 64 positions (an
// absolute multiple of 64) for two query heads of one KV head. Two warpgroups own a head each and
// keep 64 x 256 outputs in registers; two more fill two K and two V tiles in shared memory ahead
// of them, as 16-bit values. While a page's values are multiplied, the next page's scores already
// are.
//
// A row's sums run over the pages in order, each on its own, segment by segment
// (attention_rows.cuh): its bits depend on its position and its sequence, not on the span, the
// tile's other rows or the launch.
//
// Compile-time: K_FORMAT, V_FORMAT (KvFormat), GROUP (query heads of a KV head, even),
// SEGMENT_PAGES, PROJECTION_F16, OUTPUT (0: f32, 1: operand).
#include "attention_rows.cuh"
#include "attention_tile.cuh"
#include "barriers.cuh"
#include "wgmma.cuh"

constexpr int WARPGROUP = 128;
constexpr int HEADS = 2;
constexpr int STAGES = 2;
constexpr int PANEL_BYTES = PAGE * 128;  // 64 dims of a tile
constexpr int HEAD_BLOCKS = GROUP / HEADS;
constexpr bool K_BF16 = K_FORMAT == KV_BF16, V_BF16 = V_FORMAT == KV_BF16;
constexpr int THREADS = (2 + HEADS) * WARPGROUP;
// A block gets 128 registers for each of its threads at launch; asking for more would wait forever.
constexpr int PRODUCER_REGISTERS = 48, CONSUMER_REGISTERS = 208;
static_assert(2 * PRODUCER_REGISTERS + HEADS * CONSUMER_REGISTERS <= 65536 / WARPGROUP, "");

// Tiles of keys, or of values, with barriers for "filled" and "emptied".
struct Tiles {
    u8* tiles;
    u32 filled, emptied;  // the first of STAGES each

    __device__ u8* tile(int page) const { return tiles + page % STAGES * TILE_BYTES; }
    __device__ u32 is_filled(int page) const { return filled + page % STAGES * 8; }
    __device__ u32 is_emptied(int page) const { return emptied + page % STAGES * 8; }

    __device__ void init() const {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(is_filled(i), WARPGROUP);
            barrier_init(is_emptied(i), HEADS * 4);
        }
    }

    __device__ void wait_filled(int page) const {
        barrier_wait(is_filled(page), (page / STAGES) & 1);
    }

    __device__ void wait_emptied(int page) const {
        if (page >= STAGES) barrier_wait(is_emptied(page), (page / STAGES - 1) & 1);
    }
};

// One warpgroup brings a plane's pages of an item, each as soon as its place is free.
template <int FORMAT>
__device__ __forceinline__ void produce(const Tiles& tiles, const u8* plane, const int* pages,
                                        long long page_bytes, const QueryItem& item, int thread) {
    const int first = item.first_page(), count = item.last_page() - first + 1;
    pages += first;
    if constexpr (FORMAT == KV_BF16) {
        for (int page = 0; page <= count; ++page) {
            if (page < count) {
                tiles.wait_emptied(page);
                copy_page<WARPGROUP>(tiles.tile(page), plane + pages[page] * page_bytes,
                                     item.tile.valid_keys(first + page), thread);
            }
            copy_async_commit();
            if (page == 0) continue;
            copy_async_wait<1>();
            publish_shared();
            barrier_arrive(tiles.is_filled(page - 1));
        }
    } else {
        PageInFlight<FORMAT, WARPGROUP> in_flight;
        in_flight.load(plane + pages[0] * page_bytes, item.tile.valid_keys(first), thread);
        for (int page = 0; page < count; ++page) {
            tiles.wait_emptied(page);
            in_flight.store(tiles.tile(page), thread);
            publish_shared();
            barrier_arrive(tiles.is_filled(page));
            if (page + 1 == count) break;
            in_flight.load(plane + pages[page + 1] * page_bytes,
                           item.tile.valid_keys(first + page + 1), thread);
        }
    }
}

__device__ __forceinline__ void load_queries(u8* target, const u16* queries, const QueryTile& tile,
                                             int head, int q_heads, int thread) {
    const u32 address = shared_address(target);
    for (int i = thread; i < PAGE * 32; i += WARPGROUP) {
        const int row = i / 32, chunk = i % 32;
        const bool exists = tile.has(row);
        const size_t source = (size_t(tile.source_row(row)) * q_heads + head) * HEAD_DIM;
        copy_async_16_or_zero(address + kv_chunk_offset<KV_BF16>(row, chunk),
                              exists ? queries + source + chunk * 8 : queries, exists);
    }
    copy_async_commit();
    copy_async_wait<0>();
    publish_shared();
}

// Issues score = queries x keysᵀ; both tiles [4 panels][64 rows][64 dims].
__device__ __forceinline__ void start_scores(float (&score)[8][4], u32 queries, u32 keys) {
    // Or the compiler keeps 16 descriptors from page to page, for which there are no registers.
    asm volatile("" : "+r"(queries));
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 16; ++step) {
        const u32 at = step / 4 * PANEL_BYTES + step % 4 * 32;
        wgmma<K_BF16>(score, swizzled_operand(queries + at), swizzled_operand(keys + at), step > 0);
    }
    wgmma_commit();
}

// In halves of the dims: one instruction may not name more registers than a thread has at launch.
__device__ __forceinline__ void start_mix(float (&out)[32][4], const u32 (&shares)[4][4],
                                          u32 values) {
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 at = values + half * 2 * PANEL_BYTES + step * 16 * 128;
            wgmma<true, V_BF16>(reinterpret_cast<float(&)[16][4]>(out[half * 16]), shares[step],
                                swizzled_operand(at, PANEL_BYTES));
        }
    }
    wgmma_commit();
}

__device__ __forceinline__ void pack_shares(u32 (&shares)[4][4], const float (&score)[8][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float* pair = &score[2 * (i >> 2) + ((i >> 1) & 1)][2 * (i & 1)];
        shares[i >> 2][i & 3] = pair_of<V_BF16>(pair[0], pair[1]);
    }
}

// One warpgroup's 64 rows over the pages `first` to `last` of an item, counted from its first;
// `diagonal` is the tile's own.
__device__ __forceinline__ void attend(SoftRows& rows, const Tiles& keys, const Tiles& values,
                                       u32 queries, int first, int last, int diagonal,
                                       int first_row, int lane) {
    float score[8][4];
    u32 shares[4][4];
    rows.clear();
    keys.wait_filled(first);
    start_scores(score, queries, shared_address(keys.tile(first)));
    wgmma_wait<0>();
    hold(score);
    if (lane == 0) barrier_arrive(keys.is_emptied(first));
    rows.soften(score, first == diagonal, first_row, lane);
    pack_shares(shares, score);
    for (int page = first; page < last; ++page) {
        keys.wait_filled(page + 1);
        start_scores(score, queries, shared_address(keys.tile(page + 1)));
        values.wait_filled(page);
        start_mix(rows.out, shares, shared_address(values.tile(page)));
        wgmma_wait<1>();
        hold(score);
        if (lane == 0) barrier_arrive(keys.is_emptied(page + 1));
        rows.soften(score, page + 1 == diagonal, first_row, lane);
        wgmma_wait<0>();
        hold(rows.out);
        if (lane == 0) barrier_arrive(values.is_emptied(page));
        rows.rescale();
        pack_shares(shares, score);
    }
    values.wait_filled(last);
    start_mix(rows.out, shares, shared_address(values.tile(last)));
    wgmma_wait<0>();
    hold(rows.out);
    if (lane == 0) barrier_arrive(values.is_emptied(last));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_wgmma(
    const u16* queries,                   // bf16 or f16 [rows, q_heads, 256], as kv_append
    const void* projections,              // f32 or f16 [rows, row_stride]
    const int4* __restrict__ items,       // i32 [items, 8]: see QueryItem; heaviest last
    const int* __restrict__ page_table,   // i32 [sequences, table_stride]
    const u8* pool,                       // u8 [pages, page_bytes]
    float4* partials,                     // f32 [slots, q_heads, PARTIAL_VECTORS * 4]
    void* __restrict__ output,            // [rows, q_heads, 256], or chunks of padded_rows
    int row_stride,                       // in elements
    int table_stride, int kv_heads, int padded_rows, long long page_bytes,
    long long layer_offset)               // bytes from a page's start to this layer's K plane
{
    // Queries of two heads, STAGES tiles of keys, STAGES of values.
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ u64 barriers[4 * STAGES];
    const QueryItem item(items + 2 * (gridDim.x - 1 - blockIdx.x));
    if (item.tile.num_rows == 0) return;
    u8* k_tiles = shared + HEADS * TILE_BYTES;
    const u32 barrier = shared_address(barriers);
    const Tiles keys = {k_tiles, barrier, barrier + 8 * STAGES};
    const Tiles values = {k_tiles + STAGES * TILE_BYTES, barrier + 16 * STAGES,
                          barrier + 24 * STAGES};
    if (threadIdx.x == 0) {
        keys.init();
        values.init();
        barrier_init_done();
    }
    wait_for_previous_kernel();
    allow_next_kernel();
    __syncthreads();
    const int kv_head = blockIdx.y / HEAD_BLOCKS;
    const int warpgroup = threadIdx.x / WARPGROUP;

    const int thread = threadIdx.x % WARPGROUP;
    if (warpgroup >= HEADS) {
        shrink_registers<PRODUCER_REGISTERS>();
        const u8* k_planes = pool + layer_offset;
        const u8* v_planes = k_planes + size_t(kv_heads) * kv_block_bytes(K_FORMAT);
        const int* pages = page_table + size_t(item.tile.sequence) * table_stride;
        if (warpgroup == HEADS) {
            const u8* plane = k_planes + size_t(kv_head) * kv_block_bytes(K_FORMAT);
            produce<K_FORMAT>(keys, plane, pages, page_bytes, item, thread);
        } else {
            const u8* plane = v_planes + size_t(kv_head) * kv_block_bytes(V_FORMAT);
            produce<V_FORMAT>(values, plane, pages, page_bytes, item, thread);
        }
    } else {
        grow_registers<CONSUMER_REGISTERS>();
        const int head = kv_head * GROUP + blockIdx.y % HEAD_BLOCKS * HEADS + warpgroup;
        const int lane = thread & 31, first_row = thread / 32 * 16;
        u8* query_tile = shared + warpgroup * TILE_BYTES;
        load_queries(query_tile, queries, item.tile, head, kv_heads * GROUP, thread);
        named_barrier<WARPGROUP>(1 + warpgroup);
        const int base = item.first_page(), count = item.last_page() - base + 1;
        SoftRows rows;
#pragma unroll 1
        for (int page = 0; page < count; page += SEGMENT_PAGES) {
            attend(rows, keys, values, shared_address(query_tile), page,
                   min(page + SEGMENT_PAGES, count) - 1, item.tile.last_page - base, first_row,
                   lane);
            if (item.is_only_segment()) break;
            float4* partial = item.partial(partials, head, kv_heads * GROUP, thread);
            if (page == 0) {
                rows.save(partial);
            } else {
                rows.join_into(partial);
            }
        }
        if (item.is_only_segment()) {
            rows.write(projections, output, item.tile, row_stride, head, kv_heads * GROUP,
                       padded_rows, first_row, lane);
        }
    }
}
