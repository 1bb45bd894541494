/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * dm-userspace: a device-mapper target whose mapping is decided in user space.
 *
 * Structures
 *
 *   dmu_device     one /dev/dmu/NAME. It outlives table reloads: mappings, questions and
 *                  uncommitted placements belong to it, not to a table.
 *   dmu_table      one loaded table of it: the references to backing devices. Its target
 *                  is ti->private. The device uses that which resumed last.
 *   dmu_index      the remembered mapping: tables like a processor's page tables, from a
 *                  block to one word (device, right, distance in sectors), so that looking
 *                  up takes four steps at most, no lock and no reference. Runs that
 *                  continue each other have the same word, and are one extent. What is
 *                  committed is a cache: it may be forgotten, and is asked for again.
 *   dmu_cell       a block (for a discard: a run) that is in question: the requests that
 *                  wait for it, in order, the fault that was raised, and, once answered,
 *                  the preparation of its new place. While a cell stands every request to
 *                  its blocks queues behind it.
 *   dmu_placement  an answer that is not committed: listed by mark, found by block.
 *   dmu_grant      where first writes may go without a question.
 *   dmu_layer      blocks that have one place each, with a bit for whether they are there.
 *   dmu_epoch      counts requests that were sent to a place; there are two, and an
 *                  invalidation turns from one to the other and waits for the old one.
 *   dmu_io         what we keep beside each bio.
 *
 * Files, each with a header that says of its functions in which context they may be called
 *
 *   dmu-target.c   tables, devices, suspend and resume, status
 *   dmu-io.c       the path of a request
 *   dmu-map.c      from a block to its word; what is committed may be forgotten there
 *   dmu-layer.c    blocks of which only has to be known whether they are there
 *   dmu-cell.c     blocks in question
 *   dmu-place.c    MAP, the preparation of a place, uncommitted placements
 *   dmu-grant.c    first writes that are placed without a question
 *   dmu-commit.c   flushes, invalidations
 *   dmu-node.c     /dev/dmu: messages, and answers
 *
 * Hot paths
 *
 *   dmu_map(): see that no suspend has given anything back, enter the epoch, read the index, see
 *   that no cell stands (one atomic; while there are some, the heads of the blocks' buckets) and
 *   that none has gone meanwhile, send the bio on. No lock, no memory, no shared cache line
 *   written. The lock is taken for a block in whose bucket a cell stands, and by everybody while
 *   dev->broad says that there is what any block may have to wait for. A touch of a layer takes
 *   the layer's lock, once when it begins and once when it ends, and so does a read of what is not
 *   present where one is near.
 *   dmu_end_io(): leave the epoch.
 *
 *   The reading comes before the look for cells, and a place enters the index after its
 *   cell stands and its cell goes after its data is there. So whoever finds a new place there
 *   and no cell has found one that is ready. Whoever finds the old place and no cell may have
 *   missed a cell that came, was answered, written and went in between: dev->removals, which
 *   is raised before a cell goes and read before the index and after the cells, tells. Each part
 *   of the look for cells is enough for that by itself: busy, or broad and the bucket, are raised
 *   when the cell comes, and lowered after dev->removals. What was deferred is a cell before it
 *   is deferred no more, so broad is read before the buckets.
 *   These orders, and those of the rest, are checked as models: module/model.
 *
 * Locks, outermost first
 *
 *   answer_mutex        answers are taken one at a time; guards table and gone. Held over the
 *                       worker's memory and over I/O
 *   dmu_devices_mutex   the list of devices and their minors: all devices need it
 *   map_mutex           changes of the index; new marks
 *   lock                (spin, any context) cells, placements, messages, marks, the flush,
 *                       forced, failed and returned requests, invalidations, opener
 *   layer->lock         (spin, any context) bits, touches, the round in which they end
 *
 * Memory
 *
 *   A cell comes from a pool without waiting; when the pool is dry the bio goes to the list
 *   of deferred ones, which needs none. What an answer needs it takes before it changes
 *   anything, and is refused with ENOMEM otherwise; the worker asks again.
 */
#ifndef DMU_CORE_H
#define DMU_CORE_H

#include <linux/bio.h>
#include <linux/completion.h>
#include <linux/dm-kcopyd.h>
#include <linux/kref.h>
#include <linux/mempool.h>
#include <linux/mutex.h>
#include <linux/percpu-refcount.h>
#include <linux/rbtree.h>
#include <linux/signal.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include "compat.h"
#include "dmu.h"
#include "dmu-stop.h"

#define DM_MSG_PREFIX "userspace"

#define DMU_HASH_BITS	10
#define DMU_POOL_CELLS	256
#define DMU_MAX_EVENTS	65536
#define DMU_MAX_UNCOMMITTED	262144	/* placements of a device */
#define DMU_ASK_COMMIT	65536	/* so many of them are worth a flush of our own */
#define DMU_ASK_AFTER	(5 * HZ)	/* and so is one that has waited for so long */

struct dmu_device;
struct dmu_index;
struct dmu_layer;
struct dmu_layer_page;

struct dmu_epoch {
	struct percpu_ref ref;
	struct dmu_device *dev;
};

struct dmu_io {
	struct dmu_device *dev;
	struct dmu_epoch *epoch;	/* entered while the bio is under way */
	unsigned long word;		/* where it is to be sent */
	unsigned long since;		/* when it began to wait, in jiffies */
	bio_end_io_t *saved_end_io;
	struct dmu_cell *cell;		/* whose preparation it is the write of */
	u64 arrival;			/* when it came to wait, or was forced */
	u64 asked;			/* for the block before this a failed write has asked; 0: not */
	u64 sector;			/* where a forced write begins */
	unsigned int forced;		/* its sectors, when a commit has to follow; or 0 */
	struct list_head forcing;	/* dev->forced while forced is not 0 */
	struct bvec_iter iter;		/* what of a write was sent, for when it fails */
	bool written;			/* only the commit is left */
	bool passed;			/* a flush that a backing device got as it is */
	struct dmu_layer_page *touched;	/* while it is a touch of blocks of this page, */
	u64 touch_block;		/* from this one on */
	unsigned int touch_count;
	struct list_head touching;	/* of the region's */
};

struct dmu_backing {
	struct dm_dev *dm_dev;
	bool writable;
};

struct dmu_table {
	struct dmu_device *dev;
	struct dm_target *ti;
	struct list_head list;		/* of dev->tables */
	sigset_t signals;		/* of who suspends it, while they are blocked */
	bool blocked;
	unsigned int fault_timeout;
	unsigned int count;
	unsigned int writable;		/* how many are */
	struct dmu_backing devs[DMU_MAX_DEVICES];
};

/* A message that is not the question of a cell or of the flush. */
struct dmu_event {
	struct list_head list;
	u64 session;			/* of the opener it is for */
	u64 after;			/* it happened after the placements up to this mark */
	struct dmu_message message;
};

enum dmu_cell_state {
	DMU_ASKING,		/* in dev->unsent */
	DMU_ASKED,		/* the worker has read it */
	DMU_PARKED,		/* the worker said DMU_WAIT */
	DMU_CLAIMED,		/* whoever claimed it works on its queue, or a list of dev has it */
	DMU_PREPARING,		/* copies or writes are under way */
};

struct dmu_cell {
	struct dmu_device *dev;
	struct hlist_node by_block;	/* faults */
	struct hlist_node by_id;
	struct list_head all;
	struct list_head range;		/* discards */
	struct list_head unsent;	/* or dev->granting, or dev->standing */
	struct bio_list bios;
	u64 id;
	u64 block;
	u64 count;
	u32 type;			/* DMU_FAULT or DMU_DISCARD */
	u32 flags;			/* as in the message */
	enum dmu_cell_state state;
	bool orphan;			/* the request that raised the question has left */
	bool told;			/* to an earlier opener */
	bool stands;			/* it counts in the layer */
	unsigned int tell_round;	/* what of the layer is to be told before the question: from */
	u64 tell;			/* which word of which round on, */
	u64 tell_mark;			/* under which mark, if it has one */

	/* The preparation. */
	struct bio *active;
	struct dmu_answer answer;
	unsigned long word;		/* where the answer puts it */
	struct dmu_epoch *epoch;
	struct dmu_placement *placement;
	struct dmu_event *event;
	struct completion *linked;	/* someone decides when it may complete */
	struct work_struct work;
	atomic_t pending;
	int error;			/* negative errno */
};

struct dmu_placement {
	struct list_head list;		/* dev->placements, by mark */
	struct list_head untold;	/* dev->untold, or empty */
	struct list_head writing;	/* dev->writing while it is in flight */
	struct rb_node node;		/* dev->placed, by block */
	u64 block;
	u64 count;
	u64 mark;
	u64 sector;
	u16 device;
	bool writable;
	bool in_flight;
};

/* Places of a block each, taken in their order. */
struct dmu_pool {
	u16 device;
	u32 units;
	u32 used;			/* of them, so far */
	u64 sector;			/* of the first */
	u64 stride;			/* from one to the next, in sectors */
};

struct dmu_grant {
	u64 block;
	u64 count;			/* 0: nothing is granted */
	bool pooled;			/* the blocks go to the units of a pool */
	unsigned long word;		/* else: where they go, in a row */
	u32 budget;			/* so many may be untold; of a pool: its units */
	struct dmu_pool pool;
	struct dmu_pool next;		/* when that has no unit left */
};

enum dmu_flush_state {
	DMU_FLUSH_IDLE,
	DMU_FLUSH_DATA,		/* waits for placements under way */
	DMU_FLUSH_DEVICES,	/* flushes the backing devices */
	DMU_FLUSH_ASKING,	/* the question has not been read */
	DMU_FLUSH_ASKED,
};

struct dmu_flush {
	enum dmu_flush_state state;
	struct bio_list waiting;	/* for the next one */
	struct bio_list active;
	u64 id;
	u64 upto;
	unsigned long since;
	u64 tell;			/* of the round's bits from which word on are to be told */
	bool wanted;			/* a commit that no request waits for */
	bool suspended;			/* and that has to wait for a resume */
	unsigned long uncommitted;	/* since when something is, in jiffies */
	bool told;
	bool failed;			/* for good, until clear_error */
	bool failure_told;		/* what the opener knows of that */
	int error;
	atomic_t pending;
	struct work_struct work;
	struct delayed_work late;	/* while something is uncommitted */
};

enum dmu_failed_state {
	DMU_FAILED_IDLE,
	DMU_FAILED_ASKING,	/* the question has not been read */
	DMU_FAILED_ASKED,
};

/* Writes that have failed: see dmu-io.c. */
struct dmu_failed {
	bool hold;			/* the worker has said HOLD_FAILED */
	enum dmu_failed_state state;
	bool told;			/* to an earlier opener */
	bool sending;			/* some of again are in the hands of the work */
	int error;			/* the last one, a positive errno */
	u64 id;
	struct bio_list bios;		/* the question is about */
	struct bio_list again;		/* are to be sent */
	struct delayed_work work;
};

#define DMU_RETURNED_BITS 8

/* Requests that a suspend has given back: see dmu-io.c. */
struct dmu_returned {
	struct list_head notes;
	struct hlist_head found[1 << DMU_RETURNED_BITS];
	bool came;			/* one has come since the last look */
	u64 arrivals;			/* so far */
	struct delayed_work work;
};

struct dmu_device {
	struct kref ref;
	struct list_head list;
	char name[DMU_MAX_NAME + 1];
	int major;
	int minor;
	struct mapped_device *md;
	unsigned int users;		/* tables; under dmu_devices_mutex */
	struct list_head tables;
	struct dmu_table *table;
	unsigned int block_sectors;
	unsigned int block_shift;
	u64 sectors;
	u64 blocks;
	unsigned int fault_timeout;

	struct dmu_index __rcu *index;	/* on a line that is read only */
	struct dmu_layer *layer;	/* set once */
	u64 extents ____cacheline_aligned_in_smp;	/* changed under map_mutex */
	struct mutex map_mutex;
	unsigned long index_tables;	/* this and the hand under map_mutex */
	unsigned long index_looked;	/* with so many nothing is forgotten: none was to be found */
	u64 index_hand;			/* the block from which on the next to forget is looked for */
	struct mutex answer_mutex;

	struct dmu_epoch epochs[2];
	struct dmu_epoch *epoch;
	struct list_head invalidations;	/* for the next turn */
	struct list_head draining;	/* for this one */
	bool turning;
	struct work_struct epoch_work;

	/* Every request reads these; the lock is not on their line. */
	atomic_t busy ____cacheline_aligned_in_smp;	/* cells and deferred bios */
	atomic_t broad;			/* of them those of no one block: runs, deferred bios */
	unsigned int removals;		/* of cells, so far */
	atomic_t forcing;		/* forced writes */
	bool requeue;			/* a suspend wants every bio back that waits or comes */
	spinlock_t lock ____cacheline_aligned_in_smp;
	/* Changed under the lock, looked at without it. */
	struct hlist_head by_block[1 << DMU_HASH_BITS] ____cacheline_aligned_in_smp;
	struct hlist_head by_id[1 << DMU_HASH_BITS];
	struct list_head cells;
	struct list_head ranges;
	struct list_head unsent;
	struct bio_list deferred;
	struct delayed_work deferred_work;
	mempool_t cell_pool;
	u64 next_id;

	struct list_head placements;
	struct list_head writing;	/* those whose data is still being written, by mark */
	struct rb_root placed;
	atomic_t uncommitted;
	atomic_t touched;		/* blocks that touches have made present, uncommitted */
	u64 last_mark;			/* never lowered: no mark means two placements */
	struct dmu_flush flush;
	struct list_head forced;	/* forced writes that have not ended */
	struct dmu_failed failed;
	struct dmu_returned returned;

	struct dmu_grant grant;
	struct list_head granting;	/* cells for grant_work */
	struct work_struct grant_work;
	struct list_head standing;	/* cells that wait for touches */
	struct work_struct standing_work;
	struct list_head untold;	/* placements of it that the worker has not read of */
	unsigned int untold_count;
	bool telling;			/* they are worth a message, up to the last */

	struct list_head events;
	unsigned int event_count;
	bool dumping;
	struct list_head *dump_next;	/* of dev->placements, the first that is still to be told */
	u64 dump_last;			/* the mark of the last of them, and of bits */
	u64 dump_bits;			/* from which word of which round on they are to be told */
	unsigned int dump_round;	/* 0 and 1: those of a layer; 2: all are told */

	bool opened;
	bool knows_layers;		/* the opener does */
	u32 message_size;		/* what the opener reads as one */
	bool gone;
	bool failing;			/* nothing is to wait, until an opener comes */
	struct work_struct fail_work;
	u64 session;
	wait_queue_head_t wait;

	struct workqueue_struct *wq;
	struct dm_kcopyd_client *kcopyd;
	struct bio_set bios;
	struct delayed_work timeout_work;
	atomic64_t stats[DMU_STAT_LAST + 1];
};

extern struct kmem_cache *dmu_cell_cache;
extern struct kmem_cache *dmu_event_cache;
extern struct kmem_cache *dmu_placement_cache;

static inline void dmu_count(struct dmu_device *dev, enum dmu_stat which)
{
	atomic64_inc(&dev->stats[which]);
}

/* So many bios more, or less, are deferred. */
static inline void dmu_count_deferred(struct dmu_device *dev, int count)
{
	atomic_add(count, &dev->broad);
	atomic_add(count, &dev->busy);
}

static inline struct dmu_io *dmu_io(struct bio *bio)
{
	return dm_per_bio_data(bio, sizeof(struct dmu_io));
}

/* A suspend wants bios back, and the core takes them; after that it would fail them. */
static inline bool dmu_requeueing(struct dmu_device *dev)
{
	return READ_ONCE(dev->requeue) && dm_noflush_suspending(dev->table->ti);
}

static inline u64 dmu_block_of(struct dmu_device *dev, sector_t sector)
{
	return sector >> dev->block_shift;
}

/* Sectors of count blocks from block on: the last block of the device may be short. */
static inline u64 dmu_run_sectors(struct dmu_device *dev, u64 block, u64 count)
{
	u64 start = block << dev->block_shift;

	return min(count << dev->block_shift, dev->sectors - start);
}

/* The caller holds the RCU read lock: an epoch that is left by all is not entered again. */
static inline struct dmu_epoch *dmu_epoch_enter_rcu(struct dmu_device *dev)
{
	/* Who sees the new epoch sees the mapping without what was invalidated before. */
	struct dmu_epoch *epoch = smp_load_acquire(&dev->epoch);

	if (unlikely(!dmu_ref_tryget_live_rcu(&epoch->ref)))
		percpu_ref_get(&epoch->ref);
	return epoch;
}

static inline struct dmu_epoch *dmu_epoch_enter(struct dmu_device *dev)
{
	struct dmu_epoch *epoch;

	rcu_read_lock();
	epoch = dmu_epoch_enter_rcu(dev);
	rcu_read_unlock();
	return epoch;
}

static inline void dmu_epoch_leave(struct dmu_epoch *epoch)
{
	percpu_ref_put(&epoch->ref);
}

#endif
