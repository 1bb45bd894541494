// SPDX-License-Identifier: GPL-2.0-only
/*
 * The device-mapper side of the target "userspace": see dmu-core.h for the whole.
 *
 *   START LEN userspace NAME BLOCK_SECTORS NDEVS DEV... [COUNT FEATURE...]
 *
 * A DEV is a path or MAJOR:MINOR, with "ro:" before it when it is only read.
 * Features: fault_timeout SECONDS.
 */
#include <linux/ctype.h>
#include <linux/log2.h>
#include <linux/module.h>
#include <linux/slab.h>
#include "dmu-core.h"

DEFINE_MUTEX(dmu_devices_mutex);
struct kmem_cache *dmu_cell_cache;
struct kmem_cache *dmu_event_cache;
struct kmem_cache *dmu_placement_cache;
static LIST_HEAD(dmu_devices);		/* under dmu_devices_mutex */

static bool dmu_name_ok(const char *name)
{
	size_t length = strlen(name), i;

	if (!length || length > DMU_MAX_NAME || name[0] == '.')
		return false;
	for (i = 0; i < length; i++)
		if (!isalnum(name[i]) && !strchr("#+-.:=@_", name[i]))
			return false;
	return true;
}

static void dmu_device_destroy(struct dmu_device *dev)
{
	struct dmu_placement *placement, *next;
	struct dmu_event *event, *after;
	LIST_HEAD(events);

	dmu_node_remove(dev);
	list_del(&dev->list);
	mutex_lock(&dev->answer_mutex);
	dev->table = NULL;
	spin_lock_irq(&dev->lock);
	dev->gone = true;
	dev->fault_timeout = 0;
	spin_unlock_irq(&dev->lock);
	mutex_unlock(&dev->answer_mutex);
	wake_up(&dev->wait);
	cancel_delayed_work_sync(&dev->timeout_work);
	cancel_delayed_work_sync(&dev->deferred_work);
	cancel_work_sync(&dev->flush.work);
	dmu_epochs_exit(dev);
	dmu_free_cells(dev);
	destroy_workqueue(dev->wq);
	dm_kcopyd_client_destroy(dev->kcopyd);
	spin_lock_irq(&dev->lock);
	list_for_each_entry_safe(placement, next, &dev->placements, list)
		dmu_placed_drop(dev, placement);
	list_splice_init(&dev->events, &events);
	spin_unlock_irq(&dev->lock);
	list_for_each_entry_safe(event, after, &events, list)
		dmu_event_free(dev, event);
	WARN_ON(dev->event_count || atomic_read(&dev->busy));
	bioset_exit(&dev->bios);
	mempool_exit(&dev->cell_pool);
	mtree_destroy(&dev->extents);
	dmu_device_put(dev);
}

static void dmu_device_init(struct dmu_device *dev)
{
	unsigned int i;

	kref_init(&dev->ref);
	INIT_LIST_HEAD(&dev->tables);
	mt_init_flags(&dev->extents, MT_FLAGS_USE_RCU);
	mutex_init(&dev->map_mutex);
	mutex_init(&dev->answer_mutex);
	INIT_LIST_HEAD(&dev->invalidations);
	INIT_LIST_HEAD(&dev->draining);
	INIT_WORK(&dev->epoch_work, dmu_epoch_work);
	spin_lock_init(&dev->lock);
	for (i = 0; i < 1 << DMU_HASH_BITS; i++) {
		INIT_HLIST_HEAD(&dev->by_block[i]);
		INIT_HLIST_HEAD(&dev->by_id[i]);
	}
	INIT_LIST_HEAD(&dev->cells);
	INIT_LIST_HEAD(&dev->ranges);
	INIT_LIST_HEAD(&dev->unsent);
	INIT_DELAYED_WORK(&dev->deferred_work, dmu_deferred);
	INIT_DELAYED_WORK(&dev->timeout_work, dmu_timeout);
	dev->next_id = 1;
	INIT_LIST_HEAD(&dev->placements);
	dev->placed = RB_ROOT;
	INIT_WORK(&dev->flush.work, dmu_flush_work);
	INIT_LIST_HEAD(&dev->events);
	init_waitqueue_head(&dev->wait);
}

/* Makes the device and its node; under dmu_devices_mutex. */
static struct dmu_device *dmu_device_create(struct dm_target *ti, const char *name,
					    unsigned int block_sectors)
{
	struct dmu_device *dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	int error = -ENOMEM;

	ti->error = "out of memory";
	if (!dev)
		return ERR_PTR(error);
	dmu_device_init(dev);
	strscpy(dev->name, name, sizeof(dev->name));
	dev->md = dm_table_get_md(ti->table);
	dev->block_sectors = block_sectors;
	dev->block_shift = ilog2(block_sectors);
	dev->sectors = ti->len;
	dev->blocks = ((ti->len - 1) >> dev->block_shift) + 1;
	error = mempool_init_slab_pool(&dev->cell_pool, DMU_POOL_CELLS, dmu_cell_cache);
	if (error)
		goto no_pool;
	error = bioset_init(&dev->bios, BIO_POOL_SIZE, 0, BIOSET_NEED_BVECS | BIOSET_NEED_RESCUER);
	if (error)
		goto no_bios;
	dev->wq = alloc_workqueue("dmu/%s", WQ_MEM_RECLAIM | WQ_UNBOUND, 0, name);
	if (!dev->wq) {
		error = -ENOMEM;
		goto no_wq;
	}
	dev->kcopyd = dm_kcopyd_client_create(NULL);
	if (IS_ERR(dev->kcopyd)) {
		error = PTR_ERR(dev->kcopyd);
		goto no_kcopyd;
	}
	error = dmu_epochs_init(dev);
	if (error)
		goto no_epochs;
	error = dmu_node_add(dev);
	if (error) {
		ti->error = "the node in /dev/dmu cannot be made";
		goto no_node;
	}
	list_add_tail(&dev->list, &dmu_devices);
	return dev;

no_node:
	dmu_epochs_exit(dev);
no_epochs:
	dm_kcopyd_client_destroy(dev->kcopyd);
no_kcopyd:
	destroy_workqueue(dev->wq);
no_wq:
	bioset_exit(&dev->bios);
no_bios:
	mempool_exit(&dev->cell_pool);
no_pool:
	dmu_device_put(dev);
	return ERR_PTR(error);
}

/* The device of that name, if a new table may join it. */
static struct dmu_device *dmu_device_join(struct dm_target *ti, struct dmu_device *dev,
					  unsigned int block_sectors, unsigned int count)
{
	struct dmu_table *table;

	if (dev->md != dm_table_get_md(ti->table)) {
		ti->error = "NAME is in use by another device";
		return ERR_PTR(-EBUSY);
	}
	if (dev->block_sectors != block_sectors) {
		ti->error = "BLOCK_SECTORS differs from the table before";
		return ERR_PTR(-EINVAL);
	}
	list_for_each_entry(table, &dev->tables, list) {
		if (table->ti->table == ti->table) {
			ti->error = "NAME stands twice in this table";
			return ERR_PTR(-EINVAL);
		}
		if (table == dev->table && (count < table->count || ti->len < dev->sectors)) {
			ti->error = "a device neither shrinks nor loses backing devices";
			return ERR_PTR(-EINVAL);
		}
	}
	return dev;
}

static int dmu_attach(struct dmu_table *table, const char *name, unsigned int block_sectors)
{
	struct dm_target *ti = table->ti;
	struct dmu_device *dev = NULL, *at;

	mutex_lock(&dmu_devices_mutex);
	list_for_each_entry(at, &dmu_devices, list)
		if (!strcmp(at->name, name))
			dev = at;
	if (dev)
		dev = dmu_device_join(ti, dev, block_sectors, table->count);
	else
		dev = dmu_device_create(ti, name, block_sectors);
	if (!IS_ERR(dev)) {
		dev->users++;
		table->dev = dev;
		list_add_tail(&table->list, &dev->tables);
		mutex_lock(&dev->answer_mutex);
		if (!dev->table)
			dev->table = table;
		mutex_unlock(&dev->answer_mutex);
	}
	mutex_unlock(&dmu_devices_mutex);
	return PTR_ERR_OR_ZERO(dev);
}

static void dmu_detach(struct dmu_table *table)
{
	struct dmu_device *dev = table->dev;

	mutex_lock(&dmu_devices_mutex);
	list_del(&table->list);
	if (!--dev->users) {
		dmu_device_destroy(dev);
	} else {
		mutex_lock(&dev->answer_mutex);
		if (dev->table == table)
			dev->table = list_last_entry(&dev->tables, struct dmu_table, list);
		mutex_unlock(&dev->answer_mutex);
	}
	mutex_unlock(&dmu_devices_mutex);
}

static int dmu_parse_device(struct dmu_table *table, const char *argument,
			    unsigned int block_sectors)
{
	struct dmu_backing *backing = &table->devs[table->count];
	struct dm_target *ti = table->ti;
	dmu_mode_t mode = dm_table_get_mode(ti->table);
	int error;

	if (!argument) {
		ti->error = "fewer DEV than NDEVS says";
		return -EINVAL;
	}
	if (!strncmp(argument, "ro:", 3)) {
		argument += 3;
		mode = DMU_MODE_READ;
	}
	error = dm_get_device(ti, argument, mode, &backing->dm_dev);
	if (error) {
		ti->error = "a backing device cannot be opened";
		return error;
	}
	backing->writable = mode & DMU_MODE_WRITE;
	table->count++;
	table->writable += backing->writable;
	if (bdev_is_zoned(backing->dm_dev->bdev)) {
		ti->error = "a zoned device cannot be a backing device";
		return -EINVAL;
	}
	if (bdev_logical_block_size(backing->dm_dev->bdev) > block_sectors << SECTOR_SHIFT) {
		ti->error = "BLOCK_SECTORS is less than a sector of a backing device";
		return -EINVAL;
	}
	return 0;
}

static int dmu_parse_features(struct dmu_table *table, struct dm_arg_set *args)
{
	static const struct dm_arg group = {0, 2, "the count of features is not 0 or 2"};
	static const struct dm_arg seconds = {0, 86400, "fault_timeout is not 0 to 86400"};
	struct dm_target *ti = table->ti;
	unsigned int count;
	const char *word;

	if (!args->argc)
		return 0;
	if (dm_read_arg_group(&group, args, &count, &ti->error))
		return -EINVAL;
	while (count) {
		word = dm_shift_arg(args);
		if (strcasecmp(word, "fault_timeout")) {
			ti->error = "there is no such feature";
			return -EINVAL;
		}
		if (count < 2) {
			ti->error = "fault_timeout needs its seconds";
			return -EINVAL;
		}
		if (dm_read_arg(&seconds, args, &table->fault_timeout, &ti->error))
			return -EINVAL;
		count -= 2;
	}
	if (args->argc) {
		ti->error = "there are arguments too many";
		return -EINVAL;
	}
	return 0;
}

static int dmu_parse(struct dmu_table *table, struct dm_arg_set *args, const char **name,
		     unsigned int *block_sectors)
{
	static const struct dm_arg sizes = {1, 1 << 20, "BLOCK_SECTORS is not 1 to 1048576"};
	static const struct dm_arg counts = {1, DMU_MAX_DEVICES, "NDEVS is not 1 to 15"};
	struct dm_target *ti = table->ti;
	unsigned int count;
	int error;

	*name = dm_shift_arg(args);
	if (!*name || !dmu_name_ok(*name)) {
		ti->error = "NAME is not 1 to 63 letters, digits or #+-.:=@_";
		return -EINVAL;
	}
	if (dm_read_arg(&sizes, args, block_sectors, &ti->error))
		return -EINVAL;
	if (!is_power_of_2(*block_sectors)) {
		ti->error = "BLOCK_SECTORS is not a power of two";
		return -EINVAL;
	}
	if (dm_read_arg(&counts, args, &count, &ti->error))
		return -EINVAL;
	while (count--) {
		error = dmu_parse_device(table, dm_shift_arg(args), *block_sectors);
		if (error)
			return error;
	}
	return dmu_parse_features(table, args);
}

static void dmu_table_free(struct dmu_table *table)
{
	while (table->count--)
		dm_put_device(table->ti, table->devs[table->count].dm_dev);
	kfree(table);
}

static int dmu_ctr(struct dm_target *ti, unsigned int argc, char **argv)
{
	struct dm_arg_set args = { .argc = argc, .argv = argv };
	struct dmu_table *table = kzalloc(sizeof(*table), GFP_KERNEL);
	unsigned int block_sectors;
	const char *name;
	int error;

	if (!table) {
		ti->error = "out of memory";
		return -ENOMEM;
	}
	table->ti = ti;
	error = dmu_parse(table, &args, &name, &block_sectors);
	if (!error)
		error = dmu_attach(table, name, block_sectors);
	if (error) {
		dmu_table_free(table);
		return error;
	}
	ti->private = table;
	ti->per_io_data_size = sizeof(struct dmu_io);
	ti->num_flush_bios = 1;
	ti->flush_supported = true;
	ti->num_discard_bios = 1;
	ti->discards_supported = true;
	ti->num_write_zeroes_bios = 1;
	dmu_limit_swap(ti);
	return 0;
}

static void dmu_dtr(struct dm_target *ti)
{
	struct dmu_table *table = ti->private;

	dmu_detach(table);
	dmu_table_free(table);
}

/* A bio that needs more than the tree: true when it is held, else as dmu_hold() says. */
static int dmu_map_held(struct dmu_device *dev, struct bio *bio)
{
	bool requeue;

	if (dmu_hold(dev, bio, &requeue))
		return DM_MAPIO_SUBMITTED;
	return requeue ? DM_MAPIO_REQUEUE : -1;
}

static int dmu_map_flush(struct dmu_table *table, struct bio *bio)
{
	struct dmu_device *dev = table->dev;
	unsigned int i;

	if (atomic_read(&dev->uncommitted) || table->writable != 1 || dev->flush.failed) {
		if (dev->requeue)
			return DM_MAPIO_REQUEUE;
		dmu_flush_join(dev, bio);
		return DM_MAPIO_SUBMITTED;
	}
	for (i = 0; !table->devs[i].writable; i++)
		;
	bio_set_dev(bio, table->devs[i].dm_dev->bdev);
	return DM_MAPIO_REMAPPED;
}

/* Whole blocks are a run for the worker; a rest is ignored, or zeroed as a write is. */
static int dmu_map_discard(struct dmu_device *dev, struct bio *bio)
{
	unsigned int mask = dev->block_sectors - 1, count = bio_sectors(bio);
	u64 sector = bio->bi_iter.bi_sector, end = sector + count;
	unsigned int offset = sector & mask;
	int result;

	if (offset || (count < dev->block_sectors && end != dev->sectors)) {
		count = min(count, dev->block_sectors - offset);
		dm_accept_partial_bio(bio, count);
		if (bio_op(bio) == REQ_OP_DISCARD) {
			bio_endio(bio);
			return DM_MAPIO_SUBMITTED;
		}
	} else if (end & mask && end != dev->sectors) {
		dm_accept_partial_bio(bio, count & ~mask);
	}
	for (;;) {
		result = dmu_map_held(dev, bio);
		if (result >= 0)
			return result;
		if (dmu_try_issue(dev, bio))
			return DM_MAPIO_SUBMITTED;
	}
}

/*
 * The fast path: how many sectors of the bio go where word says, 0 when it has to wait.
 * The caller has entered the epoch.
 */
static unsigned int dmu_lookup(struct dmu_table *table, struct bio *bio, unsigned long *word)
{
	struct dmu_device *dev = table->dev;
	u64 sector = bio->bi_iter.bi_sector, block = dmu_block_of(dev, sector), last, size;
	unsigned int count = bio_sectors(bio), blocks, free;

	*word = dmu_extent_find(dev, block, &last);
	if (!*word || (op_is_write(bio_op(bio)) && !dmu_word_writable(*word)))
		return 0;
	count = min_t(u64, count, ((last + 1) << dev->block_shift) - sector);
	if (dmu_word_device(*word) != DMU_WORD_ZERO) {
		size = dmu_bdev_sectors(table->devs[dmu_word_device(*word)].dm_dev->bdev);
		sector += dmu_word_shift(*word);
		if (unlikely(sector + count > size)) {
			if (sector < size)
				count = size - sector;
			else
				*word = dmu_word(DMU_WORD_ZERO, false, 0);
		}
	}
	smp_rmb();	/* see dmu-core.h: the tree before the cells */
	if (unlikely(atomic_read(&dev->busy))) {
		blocks = dmu_block_of(dev, bio->bi_iter.bi_sector + count - 1) - block + 1;
		free = dmu_free_run(dev, block, blocks);
		if (!free)
			return 0;
		if (free < blocks)
			count = ((block + free) << dev->block_shift) - bio->bi_iter.bi_sector;
	}
	return count;
}

static int dmu_remap(struct dmu_table *table, struct bio *bio, unsigned long word,
		     struct dmu_epoch *epoch)
{
	struct dmu_io *io = dmu_io(bio);

	io->epoch = epoch;
	if (dmu_word_device(word) == DMU_WORD_ZERO) {
		zero_fill_bio(bio);
		bio_endio(bio);
		return DM_MAPIO_SUBMITTED;
	}
	if (unlikely(bio->bi_opf & REQ_FUA) && atomic_read(&table->dev->uncommitted)) {
		bio->bi_opf &= ~REQ_FUA;
		io->fua = true;
	}
	bio_set_dev(bio, table->devs[dmu_word_device(word)].dm_dev->bdev);
	bio->bi_iter.bi_sector += dmu_word_shift(word);
	return DM_MAPIO_REMAPPED;
}

static int dmu_map(struct dm_target *ti, struct bio *bio)
{
	struct dmu_table *table = ti->private;
	struct dmu_device *dev = table->dev;
	struct dmu_io *io = dmu_io(bio);
	struct dmu_epoch *epoch;
	unsigned int count, rest;
	unsigned long word;
	int result;

	io->dev = dev;
	io->epoch = NULL;
	io->fua = false;
	if (bio->bi_opf & REQ_PREFLUSH)
		return dmu_map_flush(table, bio);
	bio->bi_iter.bi_sector = dm_target_offset(ti, bio->bi_iter.bi_sector);
	switch (bio_op(bio)) {
	case REQ_OP_READ:
	case REQ_OP_WRITE:
		break;
	case REQ_OP_DISCARD:
	case REQ_OP_WRITE_ZEROES:
		return dmu_map_discard(dev, bio);
	default:
		return DM_MAPIO_KILL;
	}
	for (;;) {
		epoch = dmu_epoch_enter(dev);
		count = dmu_lookup(table, bio, &word);
		if (likely(count)) {
			if (count < bio_sectors(bio))
				dm_accept_partial_bio(bio, count);
			return dmu_remap(table, bio, word, epoch);
		}
		dmu_epoch_leave(epoch);
		rest = dev->block_sectors - (bio->bi_iter.bi_sector & (dev->block_sectors - 1));
		if (rest < bio_sectors(bio))
			dm_accept_partial_bio(bio, rest);
		result = dmu_map_held(dev, bio);
		if (result >= 0)
			return result;
	}
}

static void dmu_io_failed(struct dmu_device *dev, struct bio *bio, int error)
{
	struct dmu_event *event = dmu_event_alloc(dev, GFP_ATOMIC | __GFP_NOWARN);

	if (!event)
		return;
	event->session = READ_ONCE(dev->session);
	dmu_map_error(dev, event, ~0ULL, 0, error);
}

static int dmu_end_io(struct dm_target *ti, struct bio *bio, blk_status_t *error)
{
	struct dmu_io *io = dmu_io(bio);
	bool issued = io->epoch;

	if (issued) {
		dmu_epoch_leave(io->epoch);
		io->epoch = NULL;
	}
	if (unlikely(*error)) {
		if (issued && *error != BLK_STS_DM_REQUEUE && op_is_write(bio_op(bio)))
			dmu_io_failed(io->dev, bio, -blk_status_to_errno(*error));
	} else if (unlikely(io->fua)) {
		io->fua = false;
		dmu_flush_join(io->dev, bio);
		return DM_ENDIO_INCOMPLETE;
	}
	return DM_ENDIO_DONE;
}

static void dmu_presuspend(struct dm_target *ti)
{
	struct dmu_table *table = ti->private;

	if (dm_noflush_suspending(ti))
		dmu_requeue_all(table->dev);
}

static void dmu_go_on(struct dm_target *ti)
{
	struct dmu_device *dev = ((struct dmu_table *)ti->private)->dev;

	spin_lock_irq(&dev->lock);
	dev->requeue = false;
	spin_unlock_irq(&dev->lock);
	queue_work(dev->wq, &dev->flush.work);
}

/* No bio is under way: the table that resumes becomes the one in use. */
static int dmu_preresume(struct dm_target *ti)
{
	struct dmu_table *table = ti->private;
	struct dmu_device *dev = table->dev;

	mutex_lock(&dev->answer_mutex);
	spin_lock_irq(&dev->lock);
	dev->table = table;
	dev->sectors = ti->len;
	dev->blocks = ((ti->len - 1) >> dev->block_shift) + 1;
	dev->fault_timeout = table->fault_timeout;
	spin_unlock_irq(&dev->lock);
	mutex_unlock(&dev->answer_mutex);
	if (table->fault_timeout)
		queue_delayed_work(dev->wq, &dev->timeout_work, HZ / 2);
	return 0;
}

static void dmu_status(struct dm_target *ti, status_type_t type, unsigned int flags,
		       char *result, unsigned int maxlen)
{
	struct dmu_table *table = ti->private;
	struct dmu_device *dev = table->dev;
	unsigned int sz = 0, i;

	switch (type) {
	case STATUSTYPE_INFO:
		DMEMIT("%s %d:%d %s %llu %d %d %s", dev->name, dev->major, dev->minor,
		       dev->opened ? "worker" : "no-worker", dmu_extent_count(dev),
		       atomic_read(&dev->uncommitted), atomic_read(&dev->busy),
		       dev->flush.failed ? "flush-failed" : "ok");
		break;
	case STATUSTYPE_TABLE:
		DMEMIT("%s %u %u", dev->name, dev->block_sectors, table->count);
		for (i = 0; i < table->count; i++)
			DMEMIT(" %s%s", table->devs[i].writable ? "" : "ro:",
			       table->devs[i].dm_dev->name);
		if (table->fault_timeout)
			DMEMIT(" 2 fault_timeout %u", table->fault_timeout);
		break;
	default:
		*result = 0;
		break;
	}
}

static int dmu_message(struct dm_target *ti, unsigned int argc, char **argv, char *result,
		       unsigned int maxlen)
{
	static const char * const names[] = {
		"", "faults", "answers", "refused", "copies", "flushes", "invalidates",
		"uncommitted", "waiting", "errors",
	};
	struct dmu_device *dev = ((struct dmu_table *)ti->private)->dev;
	unsigned int sz = 0, i;

	if (argc != 1)
		return -EINVAL;
	if (!strcasecmp(argv[0], "fail_faults")) {
		dmu_fail_all(dev, -EIO);
		return 0;
	}
	if (!strcasecmp(argv[0], "clear_error")) {
		spin_lock_irq(&dev->lock);
		dev->flush.failed = false;
		spin_unlock_irq(&dev->lock);
		return 0;
	}
	if (strcasecmp(argv[0], "stats"))
		return -EINVAL;
	for (i = 1; i <= DMU_STAT_LAST; i++) {
		u64 value = atomic64_read(&dev->stats[i]);

		if (i == DMU_STAT_UNCOMMITTED)
			value = atomic_read(&dev->uncommitted);
		else if (i == DMU_STAT_WAITING)
			value = atomic_read(&dev->busy);
		DMEMIT("%s%s=%llu", i > 1 ? " " : "", names[i], value);
	}
	return 1;
}

static int dmu_iterate_devices(struct dm_target *ti, iterate_devices_callout_fn fn, void *data)
{
	struct dmu_table *table = ti->private;
	unsigned int i;
	int result = 0;

	for (i = 0; i < table->count && !result; i++) {
		struct dm_dev *dm_dev = table->devs[i].dm_dev;

		result = fn(ti, dm_dev, 0, dmu_bdev_sectors(dm_dev->bdev), data);
	}
	return result;
}

static void dmu_io_hints(struct dm_target *ti, struct queue_limits *limits)
{
	struct dmu_device *dev = ((struct dmu_table *)ti->private)->dev;
	unsigned int most = round_down(UINT_MAX >> SECTOR_SHIFT, dev->block_sectors);

	dmu_set_limits(limits, most, most, dev->block_sectors << SECTOR_SHIFT);
}

static struct target_type dmu_target = {
	.name = "userspace",
	.version = {1, 0, 0},
	.module = THIS_MODULE,
	.ctr = dmu_ctr,
	.dtr = dmu_dtr,
	.map = dmu_map,
	.end_io = dmu_end_io,
	.presuspend = dmu_presuspend,
	.presuspend_undo = dmu_go_on,
	.preresume = dmu_preresume,
	.resume = dmu_go_on,
	.status = dmu_status,
	.message = dmu_message,
	.iterate_devices = dmu_iterate_devices,
	.io_hints = dmu_io_hints,
};

static void dmu_caches_destroy(void)
{
	kmem_cache_destroy(dmu_placement_cache);
	kmem_cache_destroy(dmu_event_cache);
	kmem_cache_destroy(dmu_cell_cache);
}

static int __init dmu_init(void)
{
	int error = -ENOMEM;

	dmu_cell_cache = KMEM_CACHE(dmu_cell, 0);
	dmu_event_cache = KMEM_CACHE(dmu_event, 0);
	dmu_placement_cache = KMEM_CACHE(dmu_placement, 0);
	if (!dmu_cell_cache || !dmu_event_cache || !dmu_placement_cache)
		goto no_caches;
	error = dmu_node_init();
	if (error)
		goto no_caches;
	error = dm_register_target(&dmu_target);
	if (error)
		goto no_target;
	return 0;

no_target:
	dmu_node_exit();
no_caches:
	dmu_caches_destroy();
	return error;
}

static void __exit dmu_exit(void)
{
	dm_unregister_target(&dmu_target);
	dmu_node_exit();
	dmu_caches_destroy();
}

module_init(dmu_init);
module_exit(dmu_exit);

MODULE_DESCRIPTION("device-mapper target whose mapping is decided in user space");
MODULE_AUTHOR("the dmu-xen project");
MODULE_LICENSE("GPL");
