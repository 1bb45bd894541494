// SPDX-License-Identifier: GPL-2.0-only
/*
 * DATA: bytes of the worker's memory, into a read or onto a device.
 */
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/uaccess.h>
#include "dmu-answer.h"

/* Fills a read from the caller's memory, which holds [start, start + length) of the disk. */
static int dmu_copy_in(struct bio *bio, u64 address, u64 start)
{
	u64 from = address + ((bio->bi_iter.bi_sector << SECTOR_SHIFT) - start);
	struct bvec_iter iter;
	struct bio_vec vec;

	bio_for_each_segment(vec, bio, iter) {
		char *to = dmu_kmap(vec.bv_page);
		unsigned long left;

		left = copy_from_user(to + vec.bv_offset, u64_to_user_ptr(from), vec.bv_len);
		flush_dcache_page(vec.bv_page);
		dmu_kunmap(vec.bv_page, to);
		if (left)
			return -EFAULT;
		from += vec.bv_len;
	}
	return 0;
}

/* DATA for a read: every read at the head of the queue that the bytes cover. */
static int dmu_data_read(struct dmu_device *dev, struct dmu_answer *a)
{
	struct dmu_cell *cell;
	struct bio *bio;
	u64 start, end;
	int error, served = 0;

	if (a->offset >= dev->block_sectors << SECTOR_SHIFT)
		return -ERANGE;
	error = dmu_claim(dev, a, &cell);
	if (error)
		return error;
	if (cell->type != DMU_FAULT || !(cell->flags & DMU_READ)) {
		dmu_unclaim(cell);
		return -ENOENT;
	}
	start = ((cell->block << dev->block_shift) << SECTOR_SHIFT) + a->offset;
	end = start + a->length;
	while ((bio = dmu_pop_read(cell))) {
		if (bio->bi_iter.bi_sector << SECTOR_SHIFT < start ||
		    bio_end_sector(bio) << SECTOR_SHIFT > end)
			error = -ERANGE;
		else
			error = dmu_copy_in(bio, a->address, start);
		if (error) {
			cell->active = bio;
			break;
		}
		dmu_end_bio(bio, BLK_STS_OK);
		served++;
	}
	if (error && !served) {
		dmu_unclaim(cell);
		return error;
	}
	if (error) {
		spin_lock_irq(&dev->lock);
		bio_list_add_head(&cell->bios, cell->active);
		cell->active = NULL;
		spin_unlock_irq(&dev->lock);
	}
	dmu_process(cell);
	return 0;
}

/* Writes from the caller's pages, without a copy of ours. */
static int dmu_write_pages(struct dmu_device *dev, struct block_device *bdev, u64 sector,
			   u64 address, unsigned int length)
{
	unsigned int offset = offset_in_page(address), done = 0;
	unsigned int count = DIV_ROUND_UP(offset + length, PAGE_SIZE);
	struct page **pages = kvmalloc_array(count, sizeof(*pages), GFP_NOIO | __GFP_NOWARN);
	struct bio *bio;
	int error = 0, pinned;
	unsigned int i;

	if (!pages)
		return -ENOMEM;
	pinned = dmu_pin_pages(address & PAGE_MASK, count, pages);
	if (pinned < (int)count) {
		error = -EFAULT;
		count = max(pinned, 0);
	}
	for (i = 0; i < count && !error;) {
		bio = dmu_bio_alloc(bdev, min_t(unsigned int, count - i, BIO_MAX_VECS),
				    REQ_OP_WRITE | REQ_SYNC, &dev->bios);
		bio->bi_iter.bi_sector = sector + (done >> SECTOR_SHIFT);
		for (; i < count; i++) {
			unsigned int part = min_t(unsigned int, PAGE_SIZE - offset,
						  length - done);

			if (bio_add_page(bio, pages[i], part, offset) != part)
				break;
			done += part;
			offset = 0;
		}
		error = submit_bio_wait(bio);
		bio_put(bio);
	}
	for (i = 0; i < count; i++)
		dmu_unpin_page(pages[i]);
	kvfree(pages);
	return error;
}

/* DATA to write: it is on the device when this returns. */
static int dmu_data_write(struct dmu_device *dev, struct dmu_answer *a)
{
	struct block_device *bdev;
	unsigned int unit;
	int error;

	error = dmu_check_place(dev, a->device, a->sector, a->length >> SECTOR_SHIFT, true);
	if (error)
		return error;
	bdev = dev->table->devs[a->device].dm_dev->bdev;
	unit = bdev_logical_block_size(bdev);
	if ((a->length | a->address | (a->sector << SECTOR_SHIFT)) & (unit - 1))
		return -EINVAL;
	return dmu_write_pages(dev, bdev, a->sector, a->address, a->length);
}

int dmu_take_data(struct dmu_device *dev, struct dmu_answer *a)
{
	if (!a->length || a->length > DMU_MAX_DATA || a->length & (SECTOR_SIZE - 1) ||
	    a->offset & (SECTOR_SIZE - 1) || !access_ok(u64_to_user_ptr(a->address), a->length))
		return -EINVAL;
	return a->id ? dmu_data_read(dev, a) : dmu_data_write(dev, a);
}
