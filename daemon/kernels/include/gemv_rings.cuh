// How packed tiles stream to the warps of quant_gemv: a ring in shared memory for each, filled by
// a warp of its own through the copy engine, or by each warp itself with cp.async.
// Needs WARPS, RING_BYTES (of a warp) and BULK_COPIES (1: the copy engine, sm_90 on).
#pragma once
#include "gemv_deals.cuh"
#include "warp.cuh"
#if BULK_COPIES
#include "pipeline.cuh"
#endif

constexpr int THREADS = 32 * WARPS;  // that multiply
constexpr int ALL_THREADS = THREADS + (BULK_COPIES ? 32 : 0);
constexpr int MAX_TILES = 8;  // of a warp, on their way or in its ring

// Of those that multiply.
__device__ __forceinline__ void sync_warps() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// Where a tile lies in a ring, and how many bytes it takes with those skipped before it.
struct Note {
    int at, taken;
};

// The tiles of one warp: a ring of bytes, in which a tile that would cross the end begins at 0.
struct Ring {
    u8* bytes;
    Note* notes;  // [MAX_TILES], of tiles number i, i + MAX_TILES, ...
    u64* full;    // [MAX_TILES] barriers, where there is a copy engine
    u64* empty;
};

// Fills a ring with a warp's tiles in order, over the ends of pieces and products.
struct Feeder {
    Ring ring;
    int put, room;     // bytes
    u32 issued, used;  // tiles
    int step;          // of the next tile
    const Piece* piece;
    const u8* tile;
    int units_left;  // of the piece
    int team, part;

    // Finds the next tile; false if there is none.
    __device__ __forceinline__ bool find_next(const Deals& deals) {
        while (units_left == 0) {
            if (piece != nullptr && piece->num_units != 0) piece++;
            else {
                do step++;
                while (step < deals.num_steps && deals.chain.steps[step].epilogue == NORM);
                if (step >= deals.num_steps) return false;
                piece = deals.pieces(step, team);
            }
            units_left = piece->num_units;
            tile = piece->units + part * piece->tile_bytes;
        }
        return true;
    }

    // Takes room for the tile; false if there is not enough.
    __device__ __forceinline__ bool has_place(int size) {
        if (issued == used) put = 0, room = RING_BYTES;
        const int skipped = put + size > RING_BYTES ? RING_BYTES - put : 0;
        if (room < skipped + size || issued - used == MAX_TILES) return false;
        if (skipped) put = 0;
        room -= skipped + size;
        ring.notes[issued % MAX_TILES] = {put, skipped + size};
        return true;
    }

    // Puts the tile on its way.
    __device__ __forceinline__ void issue(int size, int lane);

    __device__ __forceinline__ bool try_issue(const Deals& deals, int lane) {
        const int size = piece->tile_bytes;
        if (!has_place(size)) return false;
        issue(size, lane);
        put += size;
        issued++;
        tile += TEAM_WARPS * size;
        units_left--;
        return true;
    }

    __device__ __forceinline__ void retire() {
        room += ring.notes[used % MAX_TILES].taken;
        used++;
    }
};

// A warp that multiplies.
struct Worker {
    Ring ring;
    u32 used;  // tiles
    int team, part, lane;
#if !BULK_COPIES
    Feeder feeder;
#endif

    // The next tile, when it has come.
    __device__ __forceinline__ const u8* front();

    // The tile has been read; another one may take its place.
    __device__ __forceinline__ void release(const Deals& deals);
};

#if BULK_COPIES
__device__ __forceinline__ void Feeder::issue(int size, int) {
    u64* full = ring.full + issued % MAX_TILES;
    barrier_expect(full, size);
    copy_bulk(ring.bytes + put, tile, size, full);
}

// One lane of the feeding warp for each ring.
__device__ void feed_rings(Feeder f, const Deals& deals, bool has_ring) {
    bool has_more = has_ring && f.find_next(deals);
    while (__any_sync(0xffffffffu, has_more)) {
        bool was_busy = false;
        if (has_more) {
            while (f.used != f.issued &&
                   barrier_test(f.ring.empty + f.used % MAX_TILES, f.used / MAX_TILES & 1))
                f.retire();
            was_busy = f.try_issue(deals, 0);
            if (was_busy) has_more = f.find_next(deals);
        }
        if (!__any_sync(0xffffffffu, was_busy)) __nanosleep(40);
    }
}

__device__ __forceinline__ const u8* Worker::front() {
    barrier_wait(ring.full + used % MAX_TILES, used / MAX_TILES & 1);
    return ring.bytes + ring.notes[used % MAX_TILES].at;
}

__device__ __forceinline__ void Worker::release(const Deals&) {
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty + used % MAX_TILES);
    used++;
}

__device__ __forceinline__ void prefetch(const u8* from, int bytes) { prefetch_bulk(from, bytes); }
#else
__device__ __forceinline__ void Feeder::issue(int size, int lane) {
    const u32 to = shared_address(ring.bytes + put);
    for (int at = lane * 16; at < size; at += 512) copy_async_16(to + at, tile + at);
    copy_async_commit();
}

template <int pending>
__device__ __forceinline__ void wait_for_all_but(int wanted) {
    if constexpr (pending < MAX_TILES) {
        if (wanted == pending) return copy_async_wait<pending>();
        wait_for_all_but<pending + 1>(wanted);
    }
}

__device__ __forceinline__ const u8* Worker::front() {
    wait_for_all_but<0>(feeder.issued - used - 1);
    __syncwarp();
    return ring.bytes + ring.notes[used % MAX_TILES].at;
}

__device__ __forceinline__ void fill_ring(Worker& w, const Deals& deals) {
    while (w.feeder.find_next(deals) && w.feeder.try_issue(deals, w.lane)) continue;
}

__device__ __forceinline__ void Worker::release(const Deals& deals) {
    __syncwarp();
    feeder.retire();
    used++;
    fill_ring(*this, deals);
}

__device__ __forceinline__ void prefetch(const u8*, int) {}
#endif
