// Prompt tokens attend to their pages, causally: flash attention on mma.sync, for every card.
//
// A block takes one tile of 64 positions (an absolute multiple of 64) for HEADS query heads of one
// KV head; a warp takes 16 rows of one head and keeps its 16 x 256 outputs in registers. Keys come
// page by page from position 0, through one K and one V tile in shared memory; K of the next page
// loads while V is multiplied, V while K is. The output gate is applied at the end.
//
// A row's sums run over the pages in order, each on its own, segment by segment
// (attention_rows.cuh): its bits depend on its position and its sequence, not on the span, the
// tile's other rows or the launch. 4 x 256 x keys x rows x
// heads flops against the tensor cores' rate: bound by arithmetic.
//
// Compile-time: K_FORMAT, V_FORMAT (KvFormat), GROUP (query heads of a KV head), HEADS (of a
// block: 1 or 2, a divisor of GROUP), SEGMENT_PAGES, PROJECTION_F16, OUTPUT (0: f32,
// 1: operand).
#include "attention_rows.cuh"
#include "attention_tile.cuh"
#include "mma.cuh"

constexpr int WARPS = HEADS * 4;
constexpr int THREADS = WARPS * 32;
constexpr bool K_BF16 = K_FORMAT == KV_BF16, V_BF16 = V_FORMAT == KV_BF16;
constexpr int HEAD_BLOCKS = GROUP / HEADS;

// Moves pages of one plane into one tile: as they are, or through registers.
template <int FORMAT>
struct PageLoader {
    const u8* plane;
    const int* pages;
    long long page_bytes;
    u8* tile;
    PageInFlight<FORMAT, THREADS> in_flight;

    __device__ __forceinline__ void start(int index, int valid) {
        const u8* block = plane + pages[index] * page_bytes;
        if constexpr (FORMAT == KV_BF16) {
            copy_page<THREADS>(tile, block, valid, threadIdx.x);
            copy_async_commit();
        } else {
            in_flight.load(block, valid, threadIdx.x);
        }
    }

    // After the block's next barrier the tile can be read.
    __device__ __forceinline__ void finish() {
        if constexpr (FORMAT == KV_BF16) {
            copy_async_wait<0>();
        } else {
            in_flight.store(tile, threadIdx.x);
        }
    }
};

// Rows of a tile [HEADS][64] x 256 to shared memory; rows that the span lacks become zero.
__device__ __forceinline__ void load_queries(u8* tiles, const u16* queries, const QueryTile& tile,
                                             int first_head, int q_heads) {
    for (int i = threadIdx.x; i < HEADS * PAGE * 32; i += THREADS) {
        const int head = i / (PAGE * 32), row = i / 32 % PAGE, chunk = i % 32;
        const size_t source = size_t(tile.source_row(row)) * q_heads + first_head + head;
        const u32 target = shared_address(tiles) + head * TILE_BYTES +
                           kv_chunk_offset<KV_BF16>(row, chunk);
        const bool exists = tile.has(row);
        copy_async_16_or_zero(target, exists ? queries + source * HEAD_DIM + chunk * 8 : queries,
                              exists);
    }
    copy_async_commit();
}

struct Rows : SoftRows {
    // score[n]: rows g and g + 8 of 16 query rows, keys 8 n + 2 j and 8 n + 2 j + 1.
    __device__ __forceinline__ void score_page(float (&score)[8][4], u32 query_tile, u32 key_tile,
                                               int first_row, int lane) {
#pragma unroll
        for (int i = 0; i < 32; ++i) score[i >> 2][i & 3] = 0;
        const int query_row = first_row + (lane & 15);
        const int key_row = (lane & 7) + ((lane >> 4) << 3);
#pragma unroll
        for (int step = 0; step < 16; ++step) {
            u32 a[4];
            load_matrices(a, query_tile +
                               kv_chunk_offset<KV_BF16>(query_row, 2 * step + (lane >> 4)));
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                u32 b[4];
                load_matrices(b, key_tile + kv_chunk_offset<KV_BF16>(
                                              pair * 16 + key_row, 2 * step + ((lane >> 3) & 1)));
                mma_m16n8k16<K_BF16>(score[2 * pair], a, b[0], b[1]);
                mma_m16n8k16<K_BF16>(score[2 * pair + 1], a, b[2], b[3]);
            }
        }
    }

    __device__ __forceinline__ void mix_page(const float (&score)[8][4], u32 value_tile, int lane) {
        const int value_row = lane & 15;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const u32 a[4] = {pair_of<V_BF16>(score[2 * step][0], score[2 * step][1]),
                              pair_of<V_BF16>(score[2 * step][2], score[2 * step][3]),
                              pair_of<V_BF16>(score[2 * step + 1][0], score[2 * step + 1][1]),
                              pair_of<V_BF16>(score[2 * step + 1][2], score[2 * step + 1][3])};
#pragma unroll
            for (int pair = 0; pair < 16; ++pair) {
                u32 b[4];
                load_matrices_transposed(
                    b, value_tile + kv_chunk_offset<KV_BF16>(step * 16 + value_row,
                                                             2 * pair + (lane >> 4)));
                mma_m16n8k16<V_BF16>(out[2 * pair], a, b[0], b[1]);
                mma_m16n8k16<V_BF16>(out[2 * pair + 1], a, b[2], b[3]);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill(
    const u16* queries,                    // bf16 or f16 [rows, q_heads, 256], as kv_append
    const void* projections,               // f32 or f16 [rows, row_stride]
    const int4* __restrict__ items,       // i32 [items, 8]: see QueryItem; heaviest last
    const int* __restrict__ page_table,    // i32 [sequences, table_stride]
    const u8* pool,                        // u8 [pages, page_bytes]
    float4* partials,                      // f32 [slots, q_heads, PARTIAL_VECTORS * 4]
    void* __restrict__ output,             // [rows, q_heads, 256], or chunks of padded_rows
    int row_stride,                        // in elements
    int table_stride, int kv_heads, int padded_rows, long long page_bytes,
    long long layer_offset)                // bytes from a page's start to this layer's K plane
{
    extern __shared__ __align__(128) u8 shared[];  // queries, keys, values: TILE_BYTES each
    wait_for_previous_kernel();
    allow_next_kernel();
    const QueryItem item(items + 2 * (gridDim.x - 1 - blockIdx.x));
    const QueryTile& tile = item.tile;
    if (tile.num_rows == 0) return;
    const int kv_head = blockIdx.y / HEAD_BLOCKS;
    const int first_head = kv_head * GROUP + blockIdx.y % HEAD_BLOCKS * HEADS;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int first_row = (warp & 3) * 16;

    u8 *key_tile = shared + HEADS * TILE_BYTES, *value_tile = key_tile + TILE_BYTES;
    const u8* k_planes = pool + layer_offset;
    const u8* v_planes = k_planes + size_t(kv_heads) * kv_block_bytes(K_FORMAT);
    const int* pages = page_table + size_t(tile.sequence) * table_stride;
    PageLoader<K_FORMAT> keys = {k_planes + size_t(kv_head) * kv_block_bytes(K_FORMAT), pages,
                                 page_bytes, key_tile};
    PageLoader<V_FORMAT> values = {v_planes + size_t(kv_head) * kv_block_bytes(V_FORMAT), pages,
                                   page_bytes, value_tile};
    load_queries(shared, queries, tile, first_head, kv_heads * GROUP);
    const int first = item.first_page(), last = item.last_page();
    keys.start(first, tile.valid_keys(first));

    const int head = first_head + (warp >> 2), q_heads = kv_heads * GROUP;
    Rows rows;
    rows.clear();
    const u32 query_tile = shared_address(shared) + (warp >> 2) * TILE_BYTES;
    for (int page = first; page <= last; ++page) {
        float score[8][4];
        keys.finish();
        if (page == first) copy_async_wait<0>();
        __syncthreads();
        values.start(page, tile.valid_keys(page));
        rows.score_page(score, query_tile, shared_address(key_tile), first_row, lane);
        rows.soften(score, page == tile.last_page, first_row, lane);
        rows.rescale();
        values.finish();
        __syncthreads();
        if (page < last) keys.start(page + 1, tile.valid_keys(page + 1));
        rows.mix_page(score, shared_address(value_tile), lane);
        if (item.is_only_segment() || (page < last && (page + 1) % SEGMENT_PAGES != 0)) continue;
        float4* partial = item.partial(partials, head, q_heads, threadIdx.x % HEAD_THREADS);
        if (page - first < SEGMENT_PAGES) {
            rows.save(partial);
        } else {
            rows.join_into(partial);
        }
        rows.clear();
    }
    if (item.is_only_segment()) {
        rows.write(projections, output, tile, row_stride, head, q_heads, padded_rows, first_row,
                   lane);
    }
}
