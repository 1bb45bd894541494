/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dmu_plugin.h: an image format of your own for cowd, as a shared library.
 *
 * `cowd -p NAME` loads NAME.so and calls dmu_plugin() in it, which answers a structure of
 * functions. dmu-plugin(7) opens with a complete plugin.
 *
 * A format answers where blocks live; it moves no data. Devices are numbered: 0 is the store,
 * 1 the base if there is one, 2 what the plugin itself reads out (`read`). A block may lie in
 * any of them, from a sector on, and only blocks in the store may be written.
 *
 * All functions but `read` are called from one thread. They answer 0, or a positive errno.
 * What a plugin answers is checked: an extent outside the disk or in a device that is not
 * there fails the request.
 */
#ifndef DMU_PLUGIN_H
#define DMU_PLUGIN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this interface. A plugin of another version is refused. */
#define DMU_PLUGIN_VERSION 1

/* Device numbers. */
#define DMU_STORE 0
#define DMU_BASE 1
#define DMU_OWN 2
/* In place of a device: reads as zeroes. */
#define DMU_ZERO 0xffff

/* What the program does for a plugin. Lent for as long as the disk is open. */
struct dmu_host {
    uint32_t version;
    /* How many devices there are: 1, or 2 with a base. */
    uint32_t devices;
    /* Whether the disk shall be writable. */
    int writable;
    /* Length of a device in bytes. */
    uint64_t (*size)(const struct dmu_host *host, unsigned int device);
    /* Reads bytes of a device; past its end, zeroes. */
    int (*read)(const struct dmu_host *host, unsigned int device, void *buffer, size_t count,
                uint64_t offset);
    /* Writes bytes of the store. For `open` only: afterwards plans are what writes. */
    int (*write)(const struct dmu_host *host, const void *buffer, size_t count, uint64_t offset);
    /* Makes the store at least so many bytes long. */
    int (*grow)(const struct dmu_host *host, uint64_t size);
    /* Returns when everything written to the store is durable. */
    int (*flush)(const struct dmu_host *host);
};

/* The disk, as `open` describes it. */
struct dmu_disk {
    /* Given to every other function. */
    void *state;
    /* Length in bytes, a multiple of 512. */
    uint64_t size;
    /* Bytes of a block: a power of two, 512 to 2 MiB. */
    uint32_t block_size;
};

/* A run of blocks mapped alike. */
struct dmu_extent {
    uint64_t block;
    uint64_t count;
    /* DMU_STORE, DMU_BASE, DMU_OWN or DMU_ZERO, and the 512-byte sector there. */
    unsigned int device;
    uint64_t sector;
    /* Whether writes may go there without asking. */
    int writable;
    /* Of a new placement: a number above all before it. Else 0. */
    uint64_t mark;
};

/* What has to be in the rest of a block of which a first write covers a part. */
enum dmu_preparation {
    /* Nothing to do: the write covers the blocks, or what is there is right. */
    DMU_AS_IS = 0,
    /* Zeroes. */
    DMU_FILL_ZERO = 1,
    /* What lies at `from`. */
    DMU_COPY = 2
};

struct dmu_placement {
    struct dmu_extent extent;
    enum dmu_preparation preparation;
    unsigned int from_device;
    uint64_t from_sector;
};

/* A list of writes that make placements durable. */
struct dmu_plan {
    void *handle;
    /* Adds a write of these bytes, which are copied. */
    void (*write)(struct dmu_plan *plan, const void *bytes, size_t count, uint64_t offset);
    /* What was added so far is flushed before what follows is written. */
    void (*barrier)(struct dmu_plan *plan);
};

/* A plugin. What is NULL need not be there; a format with `open` and `find` is complete. */
struct dmu_plugin {
    /* DMU_PLUGIN_VERSION. */
    uint32_t version;
    /* One line for people. */
    const char *description;
    /* Opens the store. */
    int (*open)(const struct dmu_host *host, struct dmu_disk *disk);
    /* Lets go of the state. */
    void (*close)(void *state);
    /* Where a block lives: the extent that begins there, up to `limit` blocks long. */
    int (*find)(void *state, uint64_t block, uint64_t limit, struct dmu_extent *extent);
    /*
     * A place in the store for a first write to `count` blocks; the answer begins at `block`
     * and may be shorter. `whole`: the write covers them. The blocks are there from now on,
     * but not durable. NULL: writes go where `find` says that they may, else nowhere.
     */
    int (*place)(void *state, uint64_t block, uint64_t count, int whole,
                 struct dmu_placement *placement);
    /*
     * The writes that make every placement up to a mark durable. They run after the data of
     * these placements is durable, and are followed by `committed`, or by another plan.
     */
    int (*plan)(void *state, uint64_t mark, struct dmu_plan *plan);
    void (*committed)(void *state, uint64_t mark);
    /* The placement of this mark came to nothing. */
    void (*abandon)(void *state, uint64_t mark);
    /* Placements that a former process made and did not commit, in the order of their marks. */
    int (*restore)(void *state, const struct dmu_extent *extents, size_t count);
    /* Reads from device DMU_OWN. From any thread, several at once. */
    int (*read)(void *state, void *buffer, size_t count, uint64_t offset);
};

/* What a plugin's library has to have. */
const struct dmu_plugin *dmu_plugin(void);

#ifdef __cplusplus
}
#endif

#endif
