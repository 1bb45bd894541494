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
#include <linux/moduleparam.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include "dmu-cell.h"
#include "dmu-commit.h"
#include "dmu-core.h"
#include "dmu-grant.h"
#include "dmu-io.h"
#include "dmu-layer.h"
#include "dmu-map.h"
#include "dmu-node.h"
#include "dmu-place.h"
#include "dmu-target.h"

struct kmem_cache *dmu_cell_cache;
struct kmem_cache *dmu_event_cache;
struct kmem_cache *dmu_placement_cache;

/*
 * The device behind the tables of one NAME: made with the first table, gone with the last.
 */

DECLARE_DM_KCOPYD_THROTTLE_WITH_MODULE_PARM(copy_throttle,
	"Of the time in which blocks are carried along, so many percent are used (100: all)");

DEFINE_MUTEX(dmu_devices_mutex);
static LIST_HEAD(dmu_devices);		/* under dmu_devices_mutex */

static unsigned long dmu_shrink_count(struct shrinker *shrinker, struct shrink_control *control)
{
	return dmu_index_count() ?: SHRINK_EMPTY;
}

/* Waits for nobody: who needs memory may hold what it would wait for. */
static unsigned long dmu_shrink_scan(struct shrinker *shrinker, struct shrink_control *control)
{
	unsigned long done = 0;
	struct dmu_device *dev;

	if (!mutex_trylock(&dmu_devices_mutex))
		return SHRINK_STOP;
	list_for_each_entry(dev, &dmu_devices, list) {
		if (done >= control->nr_to_scan)
			break;
		done += dmu_index_shrink(dev, control->nr_to_scan - done);
	}
	list_rotate_left(&dmu_devices);
	mutex_unlock(&dmu_devices_mutex);
	return done ?: SHRINK_STOP;
}

static struct shrinker *dmu_shrinker;

static int dmu_devices_init(void)
{
	/* What is forgotten costs a question, which is dearer than a page that is read again. */
	dmu_shrinker = dmu_shrinker_add(dmu_shrink_count, dmu_shrink_scan, 4 * DEFAULT_SEEKS);
	return dmu_shrinker ? 0 : -ENOMEM;
}

static void dmu_devices_exit(void)
{
	dmu_shrinker_remove(dmu_shrinker);
}

/* Takes the device from those who look for it; under answer_mutex and dmu_devices_mutex. */
static void dmu_device_hide(struct dmu_device *dev)
{
	dmu_node_remove(dev);
	list_del(&dev->list);
	dev->table = NULL;
	spin_lock_irq(&dev->lock);
	dev->gone = true;
	dev->fault_timeout = 0;
	spin_unlock_irq(&dev->lock);
}

/* Ends all that is under way in a hidden device, however long that takes, and frees it. */
static void dmu_device_destroy(struct dmu_device *dev)
{
	struct dmu_placement *placement;
	struct dmu_event *event, *after;
	LIST_HEAD(events);

	dmu_stop(DMU_STOP_HIDDEN);
	wake_up(&dev->wait);
	cancel_delayed_work_sync(&dev->timeout_work);
	cancel_delayed_work_sync(&dev->deferred_work);
	cancel_work_sync(&dev->grant_work);
	cancel_work_sync(&dev->standing_work);
	cancel_work_sync(&dev->fail_work);
	cancel_delayed_work_sync(&dev->failed.work);
	cancel_delayed_work_sync(&dev->returned.work);
	dmu_returned_drop(dev);
	cancel_delayed_work_sync(&dev->flush.late);
	cancel_work_sync(&dev->flush.work);
	dmu_epochs_exit(dev);
	/* The request of a cell may have ended while its work goes on. */
	destroy_workqueue(dev->wq);
	dmu_free_cells(dev);
	dm_kcopyd_client_destroy(dev->kcopyd);
	spin_lock_irq(&dev->lock);
	while ((placement = list_first_entry_or_null(&dev->placements, struct dmu_placement,
						     list))) {
		dmu_placed_drop(dev, placement);
		/* There may be hundreds of thousands. */
		spin_unlock_irq(&dev->lock);
		cond_resched();
		spin_lock_irq(&dev->lock);
	}
	list_splice_init(&dev->events, &events);
	spin_unlock_irq(&dev->lock);
	list_for_each_entry_safe(event, after, &events, list)
		dmu_event_free(dev, event);
	WARN_ON(dev->event_count || atomic_read(&dev->busy) || atomic_read(&dev->forcing));
	bioset_exit(&dev->bios);
	mempool_exit(&dev->cell_pool);
	dmu_index_free(dev);
	dmu_device_put(dev);
}

static void dmu_device_init(struct dmu_device *dev)
{
	unsigned int i;

	kref_init(&dev->ref);
	INIT_LIST_HEAD(&dev->tables);
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
	INIT_LIST_HEAD(&dev->granting);
	INIT_WORK(&dev->grant_work, dmu_grant_work);
	INIT_LIST_HEAD(&dev->standing);
	INIT_WORK(&dev->standing_work, dmu_standing_work);
	INIT_LIST_HEAD(&dev->untold);
	INIT_LIST_HEAD(&dev->placements);
	INIT_LIST_HEAD(&dev->writing);
	dev->placed = RB_ROOT;
	INIT_WORK(&dev->flush.work, dmu_flush_work);
	INIT_DELAYED_WORK(&dev->flush.late, dmu_flush_late);
	dev->flush.suspended = true;	/* not resumed yet */
	INIT_LIST_HEAD(&dev->forced);
	INIT_WORK(&dev->fail_work, dmu_fail_work);
	INIT_DELAYED_WORK(&dev->failed.work, dmu_failed_work);
	INIT_LIST_HEAD(&dev->returned.notes);
	for (i = 0; i < 1 << DMU_RETURNED_BITS; i++)
		INIT_HLIST_HEAD(&dev->returned.found[i]);
	INIT_DELAYED_WORK(&dev->returned.work, dmu_returned_work);
	INIT_LIST_HEAD(&dev->events);
	init_waitqueue_head(&dev->wait);
}

/* Makes the device and its node; under dmu_devices_mutex. */
static struct dmu_device *dmu_device_create(struct dm_target *ti, const char *name,
					    unsigned int block_sectors)
{
	struct dmu_device *dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	int error = -ENOMEM;
	bool limited;

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
	/* Looking at the limit costs each first write a hundredth: only who has one pays. */
	limited = READ_ONCE(dm_kcopyd_throttle.throttle) < 100;
	dev->kcopyd = dm_kcopyd_client_create(limited ? &dm_kcopyd_throttle : NULL);
	if (IS_ERR(dev->kcopyd)) {
		error = PTR_ERR(dev->kcopyd);
		goto no_kcopyd;
	}
	error = dmu_epochs_init(dev);
	if (error)
		goto no_epochs;
	error = dmu_index_reach(dev, dev->blocks);
	if (error == -EFBIG)
		ti->error = "the device has too many blocks";
	if (error)
		goto no_index;
	error = dmu_node_add(dev);
	if (error) {
		ti->error = "the node in /dev/dmu cannot be made";
		goto no_node;
	}
	list_add_tail(&dev->list, &dmu_devices);
	return dev;

no_node:
	dmu_index_free(dev);
no_index:
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

/* Why a table may not follow the one in use, whose mapping stays; NULL when it may. */
static char *dmu_follows_not(struct dmu_device *dev, struct dmu_table *next)
{
	struct dmu_table *table = dev->table;
	unsigned int i;

	if (next->count < table->count || next->ti->len < dev->sectors)
		return "a device neither shrinks nor loses backing devices";
	for (i = 0; i < table->count; i++)
		if (table->devs[i].writable && !next->devs[i].writable)
			return "a backing device was writable in the table before";
	return NULL;
}

/* The device of that name, if a new table may join it. */
static struct dmu_device *dmu_device_join(struct dmu_table *next, struct dmu_device *dev,
					  unsigned int block_sectors)
{
	struct dm_target *ti = next->ti;
	struct dmu_table *table;
	char *reason;

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
	}
	reason = dmu_follows_not(dev, next);
	if (reason) {
		ti->error = reason;
		return ERR_PTR(-EINVAL);
	}
	return dev;
}

static int dmu_attach(struct dmu_table *table, const char *name, unsigned int block_sectors)
{
	struct dm_target *ti = table->ti;
	struct dmu_device *dev = NULL, *at;
	unsigned int noio;

	mutex_lock(&dmu_devices_mutex);
	/* Whoever waits for the mutex must not wait for writeback, which may need this very target. */
	noio = memalloc_noio_save();
	list_for_each_entry(at, &dmu_devices, list)
		if (!strcmp(at->name, name))
			dev = at;
	if (dev)
		dev = dmu_device_join(table, dev, block_sectors);
	else
		dev = dmu_device_create(ti, name, block_sectors);
	if (!IS_ERR(dev)) {
		dev->users++;
		table->dev = dev;
		list_add_tail(&table->list, &dev->tables);
		if (!dev->table)
			smp_store_release(&dev->table, table);	/* whose answers were refused so far */
	}
	memalloc_noio_restore(noio);
	mutex_unlock(&dmu_devices_mutex);
	return PTR_ERR_OR_ZERO(dev);
}

static void dmu_detach(struct dmu_table *table)
{
	struct dmu_device *dev = table->dev;
	bool last;

	/* A worker may keep this one's answers busy: that is waited for before what all others need. */
	mutex_lock(&dev->answer_mutex);
	mutex_lock(&dmu_devices_mutex);
	list_del(&table->list);
	last = !--dev->users;
	if (last)
		dmu_device_hide(dev);
	else if (dev->table == table)
		dev->table = list_last_entry(&dev->tables, struct dmu_table, list);
	mutex_unlock(&dmu_devices_mutex);
	mutex_unlock(&dev->answer_mutex);
	if (last)
		dmu_device_destroy(dev);
}

/* The constructor. */

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

/*
 * A suspend that a signal ends lets the core fail what is on its way back to it just then. Without
 * flush there is nothing to wait for but the backing devices: signals wait until that is over.
 */
static void dmu_signals_block(struct dmu_table *table)
{
	sigset_t all;

	sigfillset(&all);
	/* Another target of the same table has been here. */
	if (sigequalsets(&current->blocked, &all))
		return;
	sigprocmask(SIG_BLOCK, &all, &table->signals);
	table->blocked = true;
}

static void dmu_signals_restore(struct dmu_table *table)
{
	if (table->blocked)
		sigprocmask(SIG_SETMASK, &table->signals, NULL);
	table->blocked = false;
}

static void dmu_presuspend(struct dm_target *ti)
{
	struct dmu_table *table = ti->private;

	if (dm_noflush_suspending(ti)) {
		dmu_signals_block(table);
		dmu_requeue_all(table->dev);
	}
	dmu_stop(DMU_STOP_SUSPENDING);
}

static void dmu_go_on(struct dmu_device *dev, bool whole)
{
	spin_lock_irq(&dev->lock);
	WRITE_ONCE(dev->requeue, false);
	dev->flush.suspended = false;
	if (whole)
		dmu_returned_expect(dev);
	spin_unlock_irq(&dev->lock);
	if (!whole)
		dmu_returned_drop(dev);
	queue_work(dev->wq, &dev->flush.work);
}

static void dmu_presuspend_undo(struct dm_target *ti)
{
	dmu_stop(DMU_STOP_UNDOING);
	dmu_go_on(((struct dmu_table *)ti->private)->dev, false);
	dmu_signals_restore(ti->private);
}

/* No request is left. */
static void dmu_postsuspend(struct dm_target *ti)
{
	struct dmu_table *table = ti->private;

	dmu_flush_suspend(table->dev);
	dmu_signals_restore(table);
}

static void dmu_resume(struct dm_target *ti)
{
	dmu_go_on(((struct dmu_table *)ti->private)->dev, true);
}

/* No bio is under way: the table that resumes becomes the one in use. */
static int dmu_preresume(struct dm_target *ti)
{
	struct dmu_table *table = ti->private;
	struct dmu_device *dev = table->dev;
	int error;

	error = dmu_index_reach(dev, ((ti->len - 1) >> dev->block_shift) + 1);
	if (error)
		return error;
	mutex_lock(&dev->answer_mutex);
	if (dev->table->ti->begin != ti->begin)
		dmu_returned_drop(dev);
	spin_lock_irq(&dev->lock);
	dev->table = table;
	dev->sectors = ti->len;
	dev->blocks = ((ti->len - 1) >> dev->block_shift) + 1;
	dev->fault_timeout = table->fault_timeout;
	dmu_grant_renew(dev);
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
		       dev->opened ? "worker" : "no-worker", READ_ONCE(dev->extents),
		       atomic_read(&dev->uncommitted) + atomic_read(&dev->touched),
		       atomic_read(&dev->busy),
		       READ_ONCE(dev->flush.failed) ? "flush-failed" : "ok");
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
		"uncommitted", "waiting", "errors", "granted",
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
		WRITE_ONCE(dev->flush.failed, false);
		spin_unlock_irq(&dev->lock);
		wake_up(&dev->wait);
		return 0;
	}
	if (strcasecmp(argv[0], "stats"))
		return -EINVAL;
	for (i = 1; i <= DMU_STAT_LAST; i++) {
		u64 value = atomic64_read(&dev->stats[i]);

		if (i == DMU_STAT_UNCOMMITTED)
			value = atomic_read(&dev->uncommitted) + atomic_read(&dev->touched);
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
	unsigned int size = dev->block_sectors << SECTOR_SHIFT, whole = limits->max_sectors;

	dmu_set_limits(limits, most, most, size);
	/* Less than a block may have to be copied first; what is larger than a request cannot be. */
	if (dev->block_sectors <= whole && size > limits->io_min)
		limits->io_min = size;
	if (limits->io_opt % size || !limits->io_opt)
		limits->io_opt = max(limits->io_min, size);
}

static struct target_type dmu_target = {
	.name = "userspace",
	.version = {1, 0, 0},
	.features = DMU_TARGET_NOWAIT,
	.module = THIS_MODULE,
	.ctr = dmu_ctr,
	.dtr = dmu_dtr,
	.map = dmu_map,
	.end_io = dmu_end_io,
	.presuspend = dmu_presuspend,
	.presuspend_undo = dmu_presuspend_undo,
	.postsuspend = dmu_postsuspend,
	.preresume = dmu_preresume,
	.resume = dmu_resume,
	.status = dmu_status,
	.message = dmu_message,
	.iterate_devices = dmu_iterate_devices,
	.io_hints = dmu_io_hints,
};

static void dmu_caches_destroy(void)
{
	dmu_index_exit();
	kmem_cache_destroy(dmu_placement_cache);
	kmem_cache_destroy(dmu_event_cache);
	kmem_cache_destroy(dmu_cell_cache);
}

static int __init dmu_init(void)
{
	int error = -ENOMEM;

	dmu_cell_cache = KMEM_CACHE(dmu_cell, 0);
	dmu_event_cache = KMEM_CACHE(dmu_event, 0);
	/* What a worker can make the kernel keep counts as its cgroup's. */
	dmu_placement_cache = KMEM_CACHE(dmu_placement, SLAB_ACCOUNT);
	if (dmu_index_init() || !dmu_cell_cache || !dmu_event_cache || !dmu_placement_cache)
		goto no_caches;
	error = dmu_devices_init();
	if (error)
		goto no_caches;
	error = dmu_node_init();
	if (error)
		goto no_node;
	error = dm_register_target(&dmu_target);
	if (error)
		goto no_target;
	return 0;

no_target:
	dmu_node_exit();
no_node:
	dmu_devices_exit();
no_caches:
	dmu_caches_destroy();
	return error;
}

static void __exit dmu_exit(void)
{
	dm_unregister_target(&dmu_target);
	dmu_node_exit();
	dmu_devices_exit();
	dmu_caches_destroy();
}

module_init(dmu_init);
module_exit(dmu_exit);

MODULE_DESCRIPTION("device-mapper target whose mapping is decided in user space");
MODULE_AUTHOR("the dmu-xen project");
MODULE_LICENSE("GPL");
