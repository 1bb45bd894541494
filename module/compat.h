/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels that the module is built for, and nothing else.
 * Tried: 6.1, 6.12, 7.3. Built (lab/module-builds): these, 5.10. The branches for older kernels
 * follow their headers.
 */
#ifndef DMU_COMPAT_H
#define DMU_COMPAT_H

#include <linux/bio.h>
#include <linux/blkdev.h>
#include <linux/device-mapper.h>
#include <linux/device.h>
#include <linux/highmem.h>
#include <linux/percpu-refcount.h>
#include <linux/shrinker.h>
#include <linux/slab.h>
#include <linux/version.h>

#define DMU_KERNEL(major, minor) (LINUX_VERSION_CODE >= KERNEL_VERSION(major, minor, 0))

#if BITS_PER_LONG < 64
#error "an extent is packed into a long of 64 bits"
#endif

#if !DMU_KERNEL(6, 0)
typedef unsigned int blk_opf_t;
#endif

#if DMU_KERNEL(6, 5)
typedef blk_mode_t dmu_mode_t;
#define DMU_MODE_READ	BLK_OPEN_READ
#define DMU_MODE_WRITE	BLK_OPEN_WRITE
#else
typedef fmode_t dmu_mode_t;
#define DMU_MODE_READ	FMODE_READ
#define DMU_MODE_WRITE	FMODE_WRITE
#endif

static inline struct class *dmu_class_create(const char *name)
{
#if DMU_KERNEL(6, 4)
	return class_create(name);
#else
	return class_create(THIS_MODULE, name);
#endif
}

/* Stable kernels took over at some time that what is compared is const; the calls are alike. */
#if DMU_KERNEL(5, 13)
#define dmu_list_sort(list, compare) list_sort(NULL, list, compare)
#else
#define dmu_list_sort(list, compare) list_sort(NULL, list, (void *)(compare))
#endif

#ifndef BIO_MAX_VECS
#define BIO_MAX_VECS BIO_MAX_PAGES
#endif

#if DMU_KERNEL(6, 2)
#define DMU_DEVNODE_CONST const
#else
#define DMU_DEVNODE_CONST
#endif

static inline sector_t dmu_bdev_sectors(struct block_device *bdev)
{
#if DMU_KERNEL(5, 16)
	return bdev_nr_sectors(bdev);
#else
	return i_size_read(bdev->bd_inode) >> SECTOR_SHIFT;
#endif
}

/* A bio of op for bdev from the pool; waits, never fails. */
static inline struct bio *dmu_bio_alloc(struct block_device *bdev, unsigned short vecs,
					blk_opf_t op, struct bio_set *pool)
{
#if DMU_KERNEL(5, 18)
	return bio_alloc_bioset(bdev, vecs, op, GFP_NOIO, pool);
#else
	struct bio *bio = bio_alloc_bioset(GFP_NOIO, vecs, pool);

	bio_set_dev(bio, bdev);
	bio->bi_opf = op;
	return bio;
#endif
}

/* Whether the bio was sent to bdev; of partitions of one disk older kernels do not tell which. */
static inline bool dmu_bio_is_on(struct bio *bio, struct block_device *bdev)
{
#if DMU_KERNEL(5, 12)
	return bio->bi_bdev == bdev;
#else
	return bio->bi_disk == bdev->bd_disk &&
	       (!bio->bi_partno || bio->bi_partno == bdev->bd_partno);
#endif
}

static inline void dmu_submit_bio(struct bio *bio)
{
#if DMU_KERNEL(5, 9)
	submit_bio_noacct(bio);
#else
	generic_make_request(bio);
#endif
}

#if DMU_KERNEL(5, 5)
#define DMU_COMPAT_IOCTL(ioctl) compat_ptr_ioctl
#else
#define DMU_COMPAT_IOCTL(ioctl) (ioctl)
#endif

static inline void dmu_set_limits(struct queue_limits *limits, unsigned int discard_sectors,
				  unsigned int zeroes_sectors, unsigned int granularity)
{
#if DMU_KERNEL(6, 8)
	limits->max_hw_discard_sectors = discard_sectors;
#else
	limits->max_discard_sectors = discard_sectors;
	limits->max_hw_discard_sectors = discard_sectors;
#endif
	limits->max_write_zeroes_sectors = zeroes_sectors;
	limits->discard_granularity = granularity;
}

static inline void dmu_limit_swap(struct dm_target *ti)
{
#if DMU_KERNEL(5, 12)
	ti->limit_swap_bios = true;
#endif
}

/* Pins pages of the caller's memory for reading from them. */
#if DMU_KERNEL(5, 6)
#define dmu_pin_pages(address, count, pages) pin_user_pages_fast(address, count, 0, pages)
#define dmu_unpin_page(page) unpin_user_page(page)
#else
#define dmu_pin_pages(address, count, pages) get_user_pages_fast(address, count, 0, pages)
#define dmu_unpin_page(page) put_page(page)
#endif

/* A page's bytes, for a while in which the caller may sleep. */
#if DMU_KERNEL(5, 11)
#define dmu_kmap(page) kmap_local_page(page)
#define dmu_kunmap(page, address) kunmap_local(address)
#else
#define dmu_kmap(page) kmap(page)
#define dmu_kunmap(page, address) kunmap(page)
#endif

/* percpu_ref_reinit() has to be announced since 5.3. */
#if DMU_KERNEL(5, 3)
#define DMU_REF_FLAGS PERCPU_REF_ALLOW_REINIT
#else
#define DMU_REF_FLAGS 0
#endif

/* A shrinker that is asked from now on; NULL without memory. */
static inline struct shrinker *
dmu_shrinker_add(unsigned long (*count)(struct shrinker *shrinker, struct shrink_control *control),
		 unsigned long (*scan)(struct shrinker *shrinker, struct shrink_control *control),
		 int seeks)
{
#if DMU_KERNEL(6, 7)
	struct shrinker *shrinker = shrinker_alloc(0, "dmu");
#else
	struct shrinker *shrinker = kzalloc(sizeof(*shrinker), GFP_KERNEL);
#endif

	if (!shrinker)
		return NULL;
	shrinker->count_objects = count;
	shrinker->scan_objects = scan;
	shrinker->seeks = seeks;
#if DMU_KERNEL(6, 7)
	shrinker_register(shrinker);
#else
#if DMU_KERNEL(6, 0)
	if (register_shrinker(shrinker, "dmu")) {
#else
	if (register_shrinker(shrinker)) {
#endif
		kfree(shrinker);
		return NULL;
	}
#endif
	return shrinker;
}

static inline void dmu_shrinker_remove(struct shrinker *shrinker)
{
#if DMU_KERNEL(6, 7)
	shrinker_free(shrinker);
#else
	unregister_shrinker(shrinker);
	kfree(shrinker);
#endif
}

/* A request that must not wait is mapped, or held, without waiting. */
#ifdef DM_TARGET_NOWAIT
#define DMU_TARGET_NOWAIT DM_TARGET_NOWAIT
#else
#define DMU_TARGET_NOWAIT 0
#endif

/* For who holds the RCU read lock already. */
#if DMU_KERNEL(5, 18)
#define dmu_ref_tryget_live_rcu(ref) percpu_ref_tryget_live_rcu(ref)
#else
#define dmu_ref_tryget_live_rcu(ref) percpu_ref_tryget_live(ref)
#endif

#endif
