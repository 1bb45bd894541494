// SPDX-License-Identifier: Apache-2.0
/*
 * overlay.c: a small complete image format as a plugin: the blocks that a guest has written,
 * one after the other in the order of their first writes, over a base.
 *
 *   cc -shared -fPIC -o /usr/lib/dmu-xen/plugins/overlay.so overlay.c
 *   truncate -s 0 my.store
 *   cowd -p overlay --nbd unix:/tmp/my.sock --base base.img my.store
 *
 * Layout, in sectors of 512 bytes: sector 0 the header (magic, size of the disk), then the
 * table, an entry of 4 bytes a block, then the blocks. An entry of 0 means: in the base. An
 * entry n means: the n-th block of the store. Numbers are in the byte order of the machine,
 * which a format for others to read would not leave open.
 *
 * Commit: the table's sectors that changed, and no order among them, since an entry depends
 * on no other. A block whose entry was not written is in the base, as before; its place in
 * the store is given out again only by the next process.
 */
#include <dmu_plugin.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 65536u
#define SECTOR 512u
#define MAGIC "overlay1"
#define PER_SECTOR (SECTOR / 4)

struct header {
    char magic[8];
    uint64_t size;
};

struct overlay {
    const struct dmu_host *host;
    uint64_t size, blocks, first; /* bytes, blocks, and the first byte of the blocks */
    uint32_t *table;              /* what is durable */
    uint64_t *marks;              /* of each block that is not; 0: none */
    uint32_t *pending;            /* its place in the store */
    uint32_t used;                /* blocks of the store that are taken */
    uint64_t last;                /* the last mark */
};

static uint64_t blocks_of(uint64_t size) { return (size + BLOCK - 1) / BLOCK; }

static uint64_t table_bytes(uint64_t blocks)
{
    return (blocks + PER_SECTOR - 1) / PER_SECTOR * SECTOR;
}

static int make(const struct dmu_host *host, struct header *header)
{
    uint64_t end;
    char sector[SECTOR] = {0};
    int error;

    if (host->devices < 2 || !host->writable)
        return EINVAL;
    memcpy(header->magic, MAGIC, 8);
    header->size = (host->size(host, DMU_BASE) + 511) / 512 * 512;
    memcpy(sector, header, sizeof(*header));
    /* The table is zeroes: the file is made longer. Only then does it become an image. */
    end = SECTOR + table_bytes(blocks_of(header->size));
    error = host->grow(host, end);
    if (!error)
        error = host->flush(host);
    if (!error)
        error = host->write(host, sector, SECTOR, 0);
    return error ? error : host->flush(host);
}

static void overlay_close(void *state)
{
    struct overlay *o = state;

    if (!o)
        return;
    free(o->table);
    free(o->marks);
    free(o->pending);
    free(o);
}

static int overlay_open(const struct dmu_host *host, struct dmu_disk *disk)
{
    struct header header;
    struct overlay *o;
    uint64_t block;
    int error;

    error = host->read(host, DMU_STORE, &header, sizeof(header), 0);
    if (!error && host->size(host, DMU_STORE) == 0)
        error = make(host, &header);
    if (error)
        return error;
    /* Nothing is allocated in proportion to a number that nobody has checked. */
    if (memcmp(header.magic, MAGIC, 8) || header.size == 0 || header.size % 512 ||
        header.size > (uint64_t)1 << 40)
        return EINVAL;
    o = calloc(1, sizeof(*o));
    if (!o)
        return ENOMEM;
    o->host = host;
    o->size = header.size;
    o->blocks = blocks_of(o->size);
    o->first = (SECTOR + table_bytes(o->blocks) + BLOCK - 1) / BLOCK * BLOCK;
    o->table = calloc(1, table_bytes(o->blocks));
    o->marks = calloc(o->blocks, sizeof(*o->marks));
    o->pending = calloc(o->blocks, sizeof(*o->pending));
    error = o->table && o->marks && o->pending
                ? host->read(host, DMU_STORE, o->table, table_bytes(o->blocks), SECTOR)
                : ENOMEM;
    for (block = 0; !error && block < o->blocks; block++) {
        if (o->table[block] > o->blocks)
            error = EINVAL;
        else if (o->table[block] > o->used)
            o->used = o->table[block];
    }
    if (error) {
        overlay_close(o);
        return error;
    }
    disk->state = o;
    disk->size = o->size;
    disk->block_size = BLOCK;
    return 0;
}

static uint32_t place_of(const struct overlay *o, uint64_t block)
{
    return o->marks[block] ? o->pending[block] : o->table[block];
}

static uint64_t sector_of(const struct overlay *o, uint32_t place)
{
    return (o->first + (uint64_t)(place - 1) * BLOCK) / SECTOR;
}

static int overlay_find(void *state, uint64_t block, uint64_t limit, struct dmu_extent *extent)
{
    const struct overlay *o = state;
    uint32_t place = place_of(o, block);

    extent->block = block;
    extent->count = 1;
    if (place) {
        extent->device = DMU_STORE;
        extent->sector = sector_of(o, place);
        extent->writable = 1;
        extent->mark = o->marks[block];
        return 0;
    }
    while (extent->count < limit && !place_of(o, block + extent->count))
        extent->count++;
    extent->device = o->host->devices > 1 ? DMU_BASE : DMU_ZERO;
    extent->sector = block * (BLOCK / SECTOR);
    return 0;
}

static int overlay_place(void *state, uint64_t block, uint64_t count, int whole,
                         struct dmu_placement *placement)
{
    struct overlay *o = state;
    int error;

    (void)count;
    error = overlay_find(state, block, 1, &placement->extent);
    if (error || placement->extent.writable) {
        placement->extent.mark = 0; /* not a new place */
        return error;
    }
    placement->preparation =
        whole ? DMU_AS_IS : placement->extent.device == DMU_BASE ? DMU_COPY : DMU_FILL_ZERO;
    placement->from_device = placement->extent.device;
    placement->from_sector = placement->extent.sector;
    o->pending[block] = ++o->used;
    o->marks[block] = ++o->last;
    placement->extent.device = DMU_STORE;
    placement->extent.sector = sector_of(o, o->used);
    placement->extent.writable = 1;
    placement->extent.mark = o->last;
    return 0;
}

static int overlay_plan(void *state, uint64_t mark, struct dmu_plan *plan)
{
    const struct overlay *o = state;
    uint32_t sector[PER_SECTOR];
    uint64_t block, first;
    int changed;

    for (first = 0; first < o->blocks; first += PER_SECTOR) {
        changed = 0;
        memcpy(sector, o->table + first, SECTOR);
        for (block = first; block < o->blocks && block < first + PER_SECTOR; block++) {
            if (o->marks[block] && o->marks[block] <= mark) {
                sector[block - first] = o->pending[block];
                changed = 1;
            }
        }
        if (changed)
            plan->write(plan, sector, SECTOR, SECTOR + first * 4);
    }
    return 0;
}

static void overlay_committed(void *state, uint64_t mark)
{
    struct overlay *o = state;
    uint64_t block;

    for (block = 0; block < o->blocks; block++) {
        if (o->marks[block] && o->marks[block] <= mark) {
            o->table[block] = o->pending[block];
            o->marks[block] = 0;
        }
    }
}

static void overlay_abandon(void *state, uint64_t mark)
{
    struct overlay *o = state;
    uint64_t block;

    for (block = 0; block < o->blocks; block++)
        if (o->marks[block] == mark)
            o->marks[block] = 0;
}

static const struct dmu_plugin plugin = {
    .version = DMU_PLUGIN_VERSION,
    .description = "a small copy-on-write image, as an example",
    .open = overlay_open,
    .close = overlay_close,
    .find = overlay_find,
    .place = overlay_place,
    .plan = overlay_plan,
    .committed = overlay_committed,
    .abandon = overlay_abandon,
};

const struct dmu_plugin *dmu_plugin(void) { return &plugin; }
