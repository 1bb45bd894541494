// SPDX-License-Identifier: GPL-2.0-only
/*
 * The device behind the tables of one NAME: made with the first table, gone with the last.
 */
#include <linux/log2.h>
#include <linux/moduleparam.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include "dmu-core.h"

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

int dmu_devices_init(void)
{
	/* What is forgotten costs a question, which is dearer than a page that is read again. */
	dmu_shrinker = dmu_shrinker_add(dmu_shrink_count, dmu_shrink_scan, 4 * DEFAULT_SEEKS);
	return dmu_shrinker ? 0 : -ENOMEM;
}

void dmu_devices_exit(void)
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
	struct dmu_placement *placement, *next;
	struct dmu_event *event, *after;
	LIST_HEAD(events);

	dmu_stop(DMU_STOP_HIDDEN);
	wake_up(&dev->wait);
	cancel_delayed_work_sync(&dev->timeout_work);
	cancel_delayed_work_sync(&dev->deferred_work);
	cancel_work_sync(&dev->grant_work);
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
	list_for_each_entry_safe(placement, next, &dev->placements, list)
		dmu_placed_drop(dev, placement);
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
	dev->kcopyd = dm_kcopyd_client_create(&dm_kcopyd_throttle);
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

int dmu_attach(struct dmu_table *table, const char *name, unsigned int block_sectors)
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

void dmu_detach(struct dmu_table *table)
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
