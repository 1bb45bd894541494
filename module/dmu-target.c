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
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include "dmu-core.h"

struct kmem_cache *dmu_cell_cache;
struct kmem_cache *dmu_event_cache;
struct kmem_cache *dmu_placement_cache;
struct kmem_cache *dmu_index_cache;

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
	dev->requeue = false;
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
		       atomic_read(&dev->uncommitted), atomic_read(&dev->busy),
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
	/* What dmu-index.c has given up may still be on its way. */
	rcu_barrier();
	kmem_cache_destroy(dmu_index_cache);
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
	dmu_index_cache = dmu_index_cache_create();
	if (!dmu_cell_cache || !dmu_event_cache || !dmu_placement_cache || !dmu_index_cache)
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
