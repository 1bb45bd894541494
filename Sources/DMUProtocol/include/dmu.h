/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR Apache-2.0 */
/*
 * The messages of /dev/dmu/NAME: what the device-mapper target "userspace" and its
 * worker say to each other. The one place where the layout is written down; the module
 * and user space both include this file.
 *
 * read(2) hands out whole struct dmu_message records, as many as fit. DMU_IOC_ANSWER takes
 * a batch of struct dmu_answer records and gives each its own result; write(2) takes the
 * same records, stops at the first that is refused and returns the bytes before it, or
 * the refusal when that was the first. poll(2) says when there is something to read.
 *
 * Units: a block is the device's block size, a sector is 512 bytes. Byte order and
 * alignment are the machine's own. What is reserved is zero, and checked to be.
 *
 * Growth: DMU_VERSION changes when programs have to. Short of that a structure grows at its end,
 * by fields that mean nothing new when they are 0, and each side says how large those are that it
 * was compiled with: an ioctl by its number, a batch by answer_size, who reads by DMU_IOC_ABI. Of
 * two sizes the shorter is taken as if zeros followed; what an older module does not know of a
 * longer one has to be zero, or it is refused with E2BIG. An unknown type or flag is refused with
 * EINVAL. A reader passes over messages of a type that it does not know.
 */
#ifndef DMU_H
#define DMU_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define DMU_VERSION		1

/* The most backing devices of a device, and the place that is no device: zeroes. */
#define DMU_MAX_DEVICES		15
#define DMU_DEVICE_ZERO		0xffff

/* The longest NAME, without its closing zero. */
#define DMU_MAX_NAME		63

/* The most answers that one DMU_IOC_ANSWER may carry. */
#define DMU_MAX_BATCH		4096

/* The most placements that a grant may have that the worker has not read of. */
#define DMU_MAX_BUDGET		65536

/* The most blocks of one DMU_BITS. */
#define DMU_MAX_BITS		(8ULL << 20)

/* The greatest mark. */
#define DMU_MAX_MARK		(1ULL << 62)

/* The most bytes that one DMU_DATA may carry. */
#define DMU_MAX_DATA		(1 << 20)

/* From the kernel: struct dmu_message.type. */
enum dmu_message_type {
	/*
	 * A request finds no mapping for block, or none with the right it needs. sector and
	 * block_sectors say what it wants: no more than a DMU_MAX_DATA holds, when it reads.
	 */
	DMU_FAULT = 1,
	/* A flush is held; every mapping with a mark up to mark may be made durable. */
	DMU_FLUSH = 2,
	/* A discard (or, with DMU_ZEROING, a write of zeroes) of whole blocks. */
	DMU_DISCARD = 3,
	/* The placement of block that asked for DMU_SYNC is copied and written. */
	DMU_SYNC_DONE = 4,
	/* The placement of block with this mark came to nothing; code says why. */
	DMU_MAP_ERROR = 5,
	/* No request can reach the old place of block, count any more. */
	DMU_INVALIDATE_DONE = 6,
	/* The reply to DMU_GET_VERSION. */
	DMU_VERSION_IS = 7,
	/* One reply to DMU_STATS; id says which counter, mark its value. */
	DMU_STATS_ARE = 8,
	/* One reply to DMU_DUMP: an uncommitted placement, in the order of marks. */
	DMU_UNCOMMITTED_IS = 9,
	/* The end of a dump; mark is the highest ever given: new marks must be greater. */
	DMU_DUMP_DONE = 10,
	/*
	 * A placement made by what was granted, uncommitted. Told before every question that is
	 * read later, and, among the events, as it happened.
	 */
	DMU_PLACED = 11,
	/*
	 * A flush has failed, and every one will from now on; with code 0: the administrator lets
	 * them be tried again. A new opener is told while it stands.
	 */
	DMU_FLUSH_FAILED = 12,
	/*
	 * A request failed on its backing device (DMU_READ or DMU_WRITE): device and code say
	 * which and how. Told beside whatever else comes of it, for whoever counts.
	 */
	DMU_DEVICE_ERROR = 13,
	/*
	 * After DMU_HOLD_FAILED: writes have failed on their devices, the last with code, and
	 * wait. DMU_FAIL ends all of them, DMU_RETRY sends all of them again.
	 */
	DMU_WRITES_FAILED = 14,
	/*
	 * Of the count blocks of a layer from block on those whose bit in sector is set (the first's
	 * is the lowest) have become present, uncommitted under mark. Told before the DMU_FLUSH
	 * that covers them, before a DMU_DISCARD of blocks around them, and by a dump; perhaps more
	 * than once. Only to who has said DMU_LAYER.
	 */
	DMU_PRESENT = 15,
};

/* From the kernel: struct dmu_message.flags. */
#define DMU_READ		0x01	/* fault: a read wants block */
#define DMU_WRITE		0x02	/* fault: a write wants block; dump: writable */
#define DMU_WHOLE		0x04	/* fault: the write covers the block entirely */
#define DMU_ZEROING		0x08	/* discard: the blocks must read as zeroes */
#define DMU_IN_FLIGHT		0x10	/* dump: its data is still being written */
#define DMU_AGAIN		0x20	/* an earlier opener was told this already */
#define DMU_TAKES_GRANTS	0x40	/* version: DMU_GRANT is known */
#define DMU_TAKES_LAYERS	0x80	/* version: and DMU_LAYER */
#define DMU_TAKES_POOLS		0x100	/* version: and DMU_POOL, and placements without a mark */

/* One record of read(2). */
struct dmu_message {
	__u32 type;		/* enum dmu_message_type */
	__u32 flags;
	__u64 id;		/* what an answer has to name; 0 where none is due */
	__u64 block;		/* the first block */
	__u64 count;		/* how many blocks; version: length in sectors */
	__u64 mark;		/* flush, errors, dump, placed, present: a mark */
	__u64 sector;		/* dump, placed: of the first; fault: of the request; present: bits */
	__u16 device;		/* dump, placed: its device; version: how many */
	__u16 version;		/* version: DMU_VERSION */
	__s32 code;		/* errors: a positive errno */
	__u32 block_sectors;	/* version: sectors of a block; fault: of the request */
	__u32 reserved;
};

/* To the kernel: struct dmu_answer.type. */
enum dmu_answer_type {
	DMU_MAP = 1,		/* the extent; id 0: not asked for */
	DMU_DATA = 2,		/* the bytes of a read, or (id 0) bytes to write */
	DMU_ZERO = 3,		/* a read: zeroes, not remembered */
	DMU_FAIL = 4,		/* fail what waits with errno code */
	DMU_WAIT = 5,		/* keep what waits until DMU_RETRY */
	DMU_RETRY = 6,		/* ask again what was told to wait; id 0: all of it */
	DMU_DONE = 7,		/* a discard: count blocks need nothing more */
	DMU_FLUSH_DONE = 8,	/* everything up to the flush's mark is durable */
	DMU_INVALIDATE = 9,	/* forget block, count */
	DMU_GET_VERSION = 10,
	DMU_STATS = 11,
	DMU_DUMP = 12,		/* every uncommitted placement, please */
	/*
	 * A first write to blocks that are mapped to be read need not ask: they go to the place,
	 * which is in a row as the blocks are. There is one grant at a time; with count 0 none.
	 * With DMU_POOL they go to the next of length places, which lie from_sector sectors apart;
	 * a pool for the same blocks while one has places left follows it, and only one does.
	 */
	DMU_GRANT = 13,
	/*
	 * With code 1: a write that fails on its device waits, and DMU_WRITES_FAILED asks what
	 * becomes of it. Stays so when the node is closed. With code 0: it fails.
	 */
	DMU_HOLD_FAILED = 14,
	/*
	 * Each of the count blocks from block 0 on has one place, which are in a row, and is there
	 * or not: one bit says. There is one layer, which stays for as long as the device, and may
	 * become longer. Whoever says this takes DMU_PRESENT; with count 0 that is all it says.
	 */
	DMU_LAYER = 15,
	/* Of the blocks of a layer those are present, and committed, whose bits are set. */
	DMU_BITS = 16,
};

/* To the kernel: struct dmu_answer.flags. */
#define DMU_WRITABLE		0x01	/* map: writes may go there too */
#define DMU_COPY_FIRST		0x02	/* map: carry the block along from from_* */
#define DMU_ZERO_FIRST		0x04	/* map: what the write does not cover is zeroes */
#define DMU_TEMPORARY		0x08	/* map: for this request only */
#define DMU_HOLD_FLUSH		0x10	/* map: uncommitted, mark is its mark */
#define DMU_SYNC		0x20	/* map: say DMU_SYNC_DONE */
#define DMU_LINKED		0x40	/* the next answer belongs to this one */
#define DMU_POOL		0x80	/* grant: to whichever place is next */
#define DMU_ALL_ANSWER_FLAGS	0xff

/* One answer. */
struct dmu_answer {
	__u32 type;		/* enum dmu_answer_type */
	__u32 flags;
	__u64 id;		/* the fault that is answered, or 0 */
	__u64 block;		/* map, invalidate, grant, bits: the first block */
	__u64 count;		/* map, invalidate, done, grant, layer, bits: how many blocks */
	__u64 sector;		/* map, grant, layer: the first's place; data with id 0: where */
	__u64 from_sector;	/* map with DMU_COPY_FIRST; grant with DMU_POOL: the distance */
	/*
	 * map with DMU_HOLD_FLUSH: greater than all before, or 0: then DMU_IOC_ANSWER sets it to the
	 * one after the last; 0 still: the placement has come to nothing, and DMU_MAP_ERROR says so
	 */
	__u64 mark;
	__u64 address;		/* data, bits: where they are, in the caller's memory */
	__u32 length;		/* data: bytes, whole sectors; grant: untold at most, or places */
	__u32 offset;		/* data: where in the block they begin, in bytes */
	__u16 device;		/* map, grant, layer; data with id 0 */
	__u16 from_device;	/* map with DMU_COPY_FIRST */
	__s32 code;		/* fail: a positive errno */
	__s32 result;		/* set by DMU_IOC_ANSWER: 0 or a negative errno */
	__u32 reserved[3];
};

/*
 * The argument of DMU_IOC_ANSWER, which takes the first 16 bytes of it, as every module does, and of
 * DMU_IOC_ANSWER_SIZED, which takes all.
 */
struct dmu_batch {
	__u64 answers;		/* address of an array of struct dmu_answer */
	__u32 count;		/* how many, at most DMU_MAX_BATCH */
	__u32 refused;		/* set: how many have a result other than 0 */
	__u32 answer_size;	/* bytes of each, a multiple of 8; 0: 96 */
	__u32 reserved;
};

#define DMU_IOC_ANSWER_OF(size)	_IOC(_IOC_READ | _IOC_WRITE, 'u', 0xd0, size)
#define DMU_IOC_ANSWER		DMU_IOC_ANSWER_OF(16)
#define DMU_IOC_ANSWER_SIZED	DMU_IOC_ANSWER_OF(sizeof(struct dmu_batch))

/*
 * The argument of DMU_IOC_ABI: what the module speaks. One that answers ENOTTY speaks version 1,
 * with messages of 64 and answers of 96 bytes.
 */
struct dmu_abi {
	__u32 version;		/* set: DMU_VERSION */
	/*
	 * Of the records of read(2) from now on until the node is closed: 64 to 4096, a multiple
	 * of 8; 0: as before. Set: what it is.
	 */
	__u32 message_size;
	__u32 message_known;	/* set: bytes of the module's own struct dmu_message */
	__u32 answer_known;	/* set: and of its struct dmu_answer */
	__u64 features;		/* set: DMU_FEATURE_ */
};

#define DMU_IOC_ABI		_IOWR('u', 0xd1, struct dmu_abi)

#define DMU_FEATURE_GRANTS	0x01	/* DMU_GRANT is known */
#define DMU_FEATURE_HOLD_FAILED	0x02	/* and DMU_HOLD_FAILED */
#define DMU_FEATURE_MARKS_RISE	0x04	/* no mark is given twice, whoever has the node open */
#define DMU_FEATURE_COMMITS	0x08	/* DMU_FLUSH is asked after a time without any flush, too */
#define DMU_FEATURE_LAYERS	0x10	/* DMU_LAYER and DMU_BITS are known */
#define DMU_FEATURE_POOLS	0x20	/* DMU_POOL is known, and the module gives marks */

/* The largest record of either kind, and the least of read(2), which it has unless it is told. */
#define DMU_MAX_RECORD		4096
#define DMU_MIN_MESSAGE		64

/* Which counter a DMU_STATS_ARE carries: its id. */
enum dmu_stat {
	DMU_STAT_FAULTS = 1,	/* faults raised */
	DMU_STAT_ANSWERS,	/* answers taken */
	DMU_STAT_REFUSED,	/* answers refused */
	DMU_STAT_COPIES,	/* blocks copied or zeroed before a first write */
	DMU_STAT_FLUSHES,	/* flushes that the worker was asked about */
	DMU_STAT_INVALIDATES,	/* invalidations completed */
	DMU_STAT_UNCOMMITTED,	/* placements, and blocks of a layer, uncommitted now */
	DMU_STAT_WAITING,	/* blocks with a question or a preparation now */
	DMU_STAT_ERRORS,	/* placements that came to nothing */
	DMU_STAT_GRANTED,	/* blocks placed by what was granted */
	DMU_STAT_LAST = DMU_STAT_GRANTED,
};

#if !defined(__cplusplus) && !defined(__KERNEL__)
#define DMU_ASSERT(what)	_Static_assert(what, #what)
#elif defined(__cplusplus)
#define DMU_ASSERT(what)	static_assert(what, #what)
#else
#define DMU_ASSERT(what)	_Static_assert(what, #what)
#endif

#define DMU_AT(record, field, offset) \
	DMU_ASSERT(__builtin_offsetof(struct record, field) == (offset))

DMU_ASSERT(sizeof(struct dmu_message) == 64);
DMU_AT(dmu_message, type, 0);
DMU_AT(dmu_message, flags, 4);
DMU_AT(dmu_message, id, 8);
DMU_AT(dmu_message, block, 16);
DMU_AT(dmu_message, count, 24);
DMU_AT(dmu_message, mark, 32);
DMU_AT(dmu_message, sector, 40);
DMU_AT(dmu_message, device, 48);
DMU_AT(dmu_message, version, 50);
DMU_AT(dmu_message, code, 52);
DMU_AT(dmu_message, block_sectors, 56);
DMU_AT(dmu_message, reserved, 60);

DMU_ASSERT(sizeof(struct dmu_answer) == 96);
DMU_AT(dmu_answer, type, 0);
DMU_AT(dmu_answer, flags, 4);
DMU_AT(dmu_answer, id, 8);
DMU_AT(dmu_answer, block, 16);
DMU_AT(dmu_answer, count, 24);
DMU_AT(dmu_answer, sector, 32);
DMU_AT(dmu_answer, from_sector, 40);
DMU_AT(dmu_answer, mark, 48);
DMU_AT(dmu_answer, address, 56);
DMU_AT(dmu_answer, length, 64);
DMU_AT(dmu_answer, offset, 68);
DMU_AT(dmu_answer, device, 72);
DMU_AT(dmu_answer, from_device, 74);
DMU_AT(dmu_answer, code, 76);
DMU_AT(dmu_answer, result, 80);
DMU_AT(dmu_answer, reserved, 84);

DMU_ASSERT(sizeof(struct dmu_batch) == 24);
DMU_AT(dmu_batch, answers, 0);
DMU_AT(dmu_batch, count, 8);
DMU_AT(dmu_batch, refused, 12);
DMU_AT(dmu_batch, answer_size, 16);
DMU_AT(dmu_batch, reserved, 20);

DMU_ASSERT(sizeof(struct dmu_abi) == 24);
DMU_AT(dmu_abi, version, 0);
DMU_AT(dmu_abi, message_size, 4);
DMU_AT(dmu_abi, message_known, 8);
DMU_AT(dmu_abi, answer_known, 12);
DMU_AT(dmu_abi, features, 16);

#endif
