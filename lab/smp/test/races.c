// SPDX-License-Identifier: Apache-2.0
/*
 * Everything at once, with random delays at the module's stop points: guests, a worker that dies
 * and is replaced, suspends, reloads, fail_faults, status, removal. What is read has to be what
 * was written there, or what a write that has failed may have left. DMU_SEED is the seed,
 * DMU_ROUNDS times ROUND seconds is how long.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "stops.h"

#define BLOCK 8
#define BLOCKS 6
#define SECTORS (BLOCKS * BLOCK)
#define PLACE(block) (32 * BLOCK + (block) * BLOCK)
#define OTHER(block) (64 * BLOCK + SECTORS + (block) * BLOCK)
#define GUESTS 8
#define ROUND 20

static struct rig rig;
static volatile bool over, unserved;
static volatile unsigned int reads, writes, failures, deaths, suspends, reloads, sweeps, removals,
	moves;

static uint64_t draw(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state * 0x2545f4914f6cdd1dull >> 11;
}

static int number_of(const char *name, int otherwise)
{
	const char *text = getenv(name);

	return text ? atoi(text) : otherwise;
}

/* A command of the device-mapper's for the device of the rig, with a message or a target's table. */
static int dm_target(int command, uint32_t flags, const char *type, const char *table, uint64_t *dev)
{
	static __thread char buffer[4096];
	struct dm_ioctl *io = (void *)buffer;
	struct dm_target_spec *spec = (void *)(io + 1);
	struct dm_target_msg *message = (void *)(io + 1);
	int control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC), result;

	CHECK(control >= 0, "errno %d", errno);
	memset(buffer, 0, sizeof(buffer));
	io->version[0] = DM_VERSION_MAJOR;
	io->data_size = sizeof(buffer);
	io->data_start = sizeof(*io);
	io->flags = flags;
	strcpy(io->name, "lab");
	if (command == (int)DM_TARGET_MSG) {
		strcpy(message->message, table);
	} else if (table) {
		io->target_count = 1;
		spec->length = SECTORS;
		strcpy(spec->target_type, type);
		strcpy((char *)(spec + 1), table);
	}
	result = ioctl(control, command, io) ? -errno : 0;
	if (dev)
		*dev = io->dev;
	close(control);
	return result;
}

static int dm(int command, uint32_t flags, const char *table)
{
	return dm_target(command, flags, "userspace", table, NULL);
}

/* What a sector may hold: 0 is the base's bytes. */
static bool may[SECTORS][256];

struct guest_state {
	pthread_t thread;
	unsigned int number;
	uint64_t state;
};

/* The fill of a sector, 0 when it is the base's, -1 when it is neither. */
static int fill_of(const uint8_t *data, uint64_t sector)
{
	bool base = true, fill = true;
	unsigned int i;

	for (i = 0; i < SECTOR; i++) {
		base &= data[i] == pattern(0, sector * SECTOR + i);
		fill &= data[i] == data[0];
	}
	return base ? 0 : fill ? data[0] : -1;
}

static void look(const uint8_t *data, uint64_t sector)
{
	int fill = fill_of(data, sector);

	CHECK(fill >= 0 && may[sector][fill], "sector %llu reads as %d (first byte %02x)",
	      (unsigned long long)sector, fill, data[0]);
}

/* Each guest has the sectors of its own number in every block. */
static void *guest_main(void *argument)
{
	struct guest_state *guest = argument;
	int disk = open(DISK, O_RDWR | O_DIRECT | O_CLOEXEC);
	int sync = open(DISK, O_RDWR | O_DIRECT | O_DSYNC | O_CLOEXEC);
	uint8_t *data;

	CHECK(disk >= 0 && sync >= 0 && posix_memalign((void **)&data, 4096, 4096) == 0);
	while (!over) {
		uint64_t what = draw(&guest->state) % 16;
		uint64_t sector = draw(&guest->state) % BLOCKS * BLOCK + guest->number +
				  GUESTS * (draw(&guest->state) % (BLOCK / GUESTS));

		if (what < 8) {
			uint8_t fill = 1 + draw(&guest->state) % 250;
			bool done;

			memset(data, fill, SECTOR);
			may[sector][fill] = true;
			done = pwrite(what ? disk : sync, data, SECTOR, sector * SECTOR) == SECTOR;
			if (done)
				memset(may[sector], 0, sizeof(may[sector]));
			may[sector][fill] = true;
			done ? writes++ : failures++;
		} else if (what < 15) {
			if (pread(disk, data, SECTOR, sector * SECTOR) == SECTOR) {
				look(data, sector);
				reads++;
			} else {
				failures++;
			}
		} else if (fsync(disk)) {
			failures++;
		}
	}
	close(disk);
	close(sync);
	free(data);
	return NULL;
}

/*
 * The worker and what it knows. A block is in the base, or in one of two places, from which it
 * moves to the other one, again and again: INVALIDATE; when that is through, and nobody has asked for
 * the block meanwhile, it is mapped to be read, and the next write goes to the other place, carrying
 * the block along. One INVALIDATE of a block at a time: what has ended one says nothing of another,
 * which waits for writes that have come in between.
 */
static struct {
	uint64_t at[BLOCKS], committed[BLOCKS];	/* sectors of the store, 0: in the base */
	uint64_t mark[BLOCKS];
	bool leaving[BLOCKS];			/* INVALIDATE is under way */
	bool stays[BLOCKS];			/* it was asked for meanwhile */
	bool moves[BLOCKS];			/* it is mapped nowhere to be written */
	uint64_t last_mark;
} format;

static struct dmu_answer place(struct dmu_message *m)
{
	uint64_t block = m->block, at = format.at[block];
	struct dmu_answer a = map(m->id, block, 1, 0, at, DMU_WRITABLE);

	if (at && !format.moves[block])
		return a;
	a.sector = at == PLACE(block) ? OTHER(block) : PLACE(block);
	a.mark = ++format.last_mark;
	a.flags |= DMU_HOLD_FLUSH | DMU_COPY_FIRST;
	a.from_device = at ? 0 : 1;
	a.from_sector = at ? at : block * BLOCK;
	return a;
}

static void answer_fault(int node, struct dmu_message *m)
{
	uint64_t block = m->block, at = format.at[block];
	struct dmu_answer a;
	int result;

	format.stays[block] = true;
	if (m->flags & DMU_WRITE)
		a = place(m);
	else if (at)
		a = map(m->id, block, 1, 0, at, format.moves[block] ? 0 : DMU_WRITABLE);
	else
		a = map(m->id, block, 1, 1, block * BLOCK, block % 2 ? DMU_TEMPORARY : 0);
	result = answer(node, a);
	/* Whoever asked may have been failed meanwhile. */
	CHECK(result == 0 || result == -ENOENT, "MAP of block %llu: %d",
	      (unsigned long long)block, result);
	if (result || !a.mark)
		return;
	moves++;
	format.moves[block] = false;
	format.at[block] = a.sector;
	format.mark[block] = a.mark;
}

static void take(int node, struct dmu_message *m)
{
	uint64_t block = m->block, i;

	switch (m->type) {
	case DMU_FAULT:
		answer_fault(node, m);
		break;
	case DMU_FLUSH:
		/* Whoever asked may have been failed: then all of it is uncommitted still. */
		if (answer(node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m->id }))
			break;
		for (i = 0; i < BLOCKS; i++)
			if (format.at[i] != format.committed[i] && format.mark[i] <= m->mark)
				format.committed[i] = format.at[i];
		break;
	case DMU_UNCOMMITTED_IS:
		format.at[block] = m->sector;
		format.mark[block] = m->mark;
		if (m->mark > format.last_mark)
			format.last_mark = m->mark;
		break;
	case DMU_MAP_ERROR:
		if (format.mark[block] != m->mark || format.at[block] == format.committed[block])
			break;
		format.at[block] = format.committed[block];
		format.moves[block] = format.at[block];
		break;
	case DMU_INVALIDATE_DONE:
		if (!format.leaving[block])
			break;
		format.leaving[block] = false;
		if (format.stays[block])
			break;
		format.moves[block] = true;
		answer(node, map(0, block, 1, 0, format.at[block], 0));
		break;
	default:
		break;
	}
}

/* A worker's beginning: what is uncommitted. */
static int open_node(void)
{
	struct dmu_message m = { 0 };
	uint64_t i;
	int node;

	/* Its last opener may be in a call still. */
	while ((node = open(NODE, O_RDWR | O_CLOEXEC)) < 0) {
		CHECK(errno == EBUSY, "errno %d", errno);
		sleep_ms(1);
	}
	for (i = 0; i < BLOCKS; i++) {
		format.at[i] = format.committed[i];
		format.leaving[i] = format.moves[i] = false;
	}
	CHECK(answer(node, (struct dmu_answer){ .type = DMU_DUMP }) == 0);
	while (m.type != DMU_DUMP_DONE) {
		CHECK(next_message(node, &m, 20000), "a dump does not end");
		take(node, &m);
	}
	if (m.mark > format.last_mark)
		format.last_mark = m.mark;
	return node;
}

static void leave_place(int node, uint64_t block)
{
	if (!format.at[block] || format.at[block] != format.committed[block] ||
	    format.leaving[block] || format.moves[block])
		return;
	CHECK(answer(node, (struct dmu_answer){ .type = DMU_INVALIDATE, .block = block,
						.count = 1 }) == 0);
	format.leaving[block] = true;
	format.stays[block] = false;
}

static void *worker_main(void *argument)
{
	uint64_t state = *(uint64_t *)argument;
	int node = open_node();
	struct dmu_message m;

	while (!unserved) {
		if (next_message(node, &m, 5))
			take(node, &m);
		leave_place(node, draw(&state) % BLOCKS);
		if (draw(&state) % 200)
			continue;
		close(node);
		deaths++;
		node = open_node();
	}
	close(node);
	return NULL;
}

static void *admin_main(void *argument)
{
	uint64_t state = *(uint64_t *)argument;
	char table[256];

	snprintf(table, sizeof(table), "lab %d 2 %s ro:%s", BLOCK, rig.store, rig.base);
	while (!over) {
		uint32_t flags = DM_SUSPEND_FLAG | DM_SKIP_LOCKFS_FLAG;
		bool reload = draw(&state) % 2;

		if (draw(&state) % 4)
			flags |= DM_NOFLUSH_FLAG;
		if (reload)
			CHECK(dm(DM_TABLE_LOAD, 0, table) == 0);
		CHECK(dm(DM_DEV_SUSPEND, flags, NULL) == 0);
		sleep_ms(draw(&state) % 8);
		CHECK(dm(DM_DEV_SUSPEND, 0, NULL) == 0);
		suspends++;
		reloads += reload;
		sleep_ms(draw(&state) % 40);
	}
	return NULL;
}

static void *sweep_main(void *argument)
{
	uint64_t state = *(uint64_t *)argument;

	while (!over) {
		CHECK(dm(DM_TARGET_MSG, 0, draw(&state) % 4 ? "fail_faults" : "stats") == 0);
		CHECK(dm(DM_TABLE_STATUS, DM_NOFLUSH_FLAG, NULL) == 0);
		sweeps++;
		sleep_ms(draw(&state) % 4);
	}
	return NULL;
}

/* The whole disk, when nothing is under way: what the last worker serves. */
static void look_at_all(void)
{
	int node = open_node();
	struct guest *g = begin(&rig, READ_IT, 0, SECTORS, 0);
	struct dmu_message m;
	uint64_t i;

	while (!g->done)
		if (next_message(node, &m, 20))
			take(node, &m);
	end(g, 0);
	for (i = 0; i < SECTORS; i++)
		look(g->data + i * SECTOR, i);
	close(node);
}

static void race(bool sweep)
{
	uint64_t seed = number_of("DMU_SEED", 1) * 2654435761u + 1, states[3];
	int seconds = ROUND * number_of("DMU_ROUNDS", 1);
	struct guest_state guests[GUESTS];
	pthread_t others[3];
	unsigned int i;

	rig = (struct rig){ .block = BLOCK, .sectors = SECTORS, .quiet = true };
	rig_up(&rig);
	for (i = 0; i < SECTORS; i++)
		may[i][0] = true;
	stop_delay(2000, 8);
	for (i = 0; i < 3; i++)
		states[i] = draw(&seed) | 1;
	CHECK(pthread_create(&others[0], NULL, worker_main, &states[0]) == 0);
	for (i = 0; i < GUESTS; i++) {
		guests[i] = (struct guest_state){ .number = i, .state = draw(&seed) | 1 };
		CHECK(pthread_create(&guests[i].thread, NULL, guest_main, &guests[i]) == 0);
	}
	CHECK(pthread_create(&others[1], NULL, admin_main, &states[1]) == 0);
	if (sweep)
		CHECK(pthread_create(&others[2], NULL, sweep_main, &states[2]) == 0);
	for (i = 0; i < (unsigned int)seconds * 10; i++)
		sleep_ms(100);
	over = true;
	/* A suspend that is not noflush ends when all requests have ended, which takes the worker. */
	pthread_join(others[1], NULL);
	if (sweep)
		pthread_join(others[2], NULL);
	unserved = true;
	pthread_join(others[0], NULL);
	/* Nobody answers any more: what waits fails. */
	CHECK(dm(DM_TARGET_MSG, 0, "fail_faults") == 0);
	for (i = 0; i < GUESTS; i++)
		pthread_join(guests[i].thread, NULL);
	CHECK(sweep || failures <= GUESTS, "%u requests have failed", failures);
	stop_delay(0, 4);
	look_at_all();
	printf("# %u reads, %u writes, %u failed, %u moves; %u deaths, %u suspends, %u reloads, "
	       "%u sweeps\n", reads, writes, failures, moves, deaths, suspends, reloads, sweeps);
	rig_down(&rig);
}

static void race_suspends(void)
{
	race(false);
}

static void race_sweeps(void)
{
	race(true);
}

/* Makes the device over the rig's loop devices, without udev, and opens it. */
static void make(void)
{
	char table[256], path[64];
	uint64_t dev;

	snprintf(table, sizeof(table), "lab %d 2 %s ro:%s", BLOCK, rig.store, rig.base);
	CHECK(dm_target(DM_DEV_CREATE, 0, NULL, NULL, &dev) == 0);
	CHECK(dm(DM_TABLE_LOAD, 0, table) == 0);
	CHECK(dm(DM_DEV_SUSPEND, 0, NULL) == 0);
	snprintf(path, sizeof(path), "/dev/dm-%u", minor(dev));
	rig.disk = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
	CHECK(rig.disk >= 0, "%s: errno %d", path, errno);
	rig.node = open(NODE, O_RDWR | O_CLOEXEC);
	CHECK(rig.node >= 0, "errno %d", errno);
}

static struct dmu_answer zero_first(struct dmu_message m)
{
	return map(m.id, m.block, 1, 0, PLACE(m.block), DMU_WRITABLE | DMU_ZERO_FIRST);
}

/* Takes it away as `dmsetup remove --force` does, under its requests and its worker's answer. */
static void remove_by_force(struct guest **guests, unsigned int count)
{
	unsigned int i;

	CHECK(dm_target(DM_TABLE_LOAD, 0, "error", "", NULL) == 0);
	CHECK(dm(DM_DEV_SUSPEND, DM_SUSPEND_FLAG | DM_NOFLUSH_FLAG | DM_SKIP_LOCKFS_FLAG,
		 NULL) == 0);
	CHECK(dm(DM_DEV_SUSPEND, 0, NULL) == 0);
	for (i = 0; i < count; i++) {
		uint64_t until = now_ms() + 20000;

		while (!guests[i]->done)
			CHECK(now_ms() < until, "a request does not end");
		end(guests[i], guests[i]->error);
		free(guests[i]->data);
		free(guests[i]);
	}
	close(rig.disk);
	CHECK(dm(DM_DEV_REMOVE, 0, NULL) == 0);
	CHECK(access(NODE, F_OK) != 0, "the node is left");
}

/* A device that is made, used and taken away by force while requests and answers are under way. */
static void race_removal(void)
{
	uint64_t state = number_of("DMU_SEED", 1) * 2654435761u + 1;
	uint64_t until = now_ms() + ROUND * 1000ull * number_of("DMU_ROUNDS", 1);
	struct dmu_message m;
	struct guest *g[6];
	unsigned int i;

	rig = (struct rig){ .block = BLOCK, .sectors = SECTORS };
	rig_up(&rig);
	rig_down_but_loops(&rig);
	stop_delay(2000, 2);
	while (now_ms() < until) {
		struct answering *answering = NULL;

		make();
		for (i = 0; i < 6; i++)
			g[i] = begin(&rig, draw(&state) % 2 ? WRITE_IT : READ_IT,
				     draw(&state) % SECTORS, 1, 7);
		for (i = draw(&state) % 5; i && next_message(rig.node, &m, 100); i--)
			if (m.type == DMU_FAULT)
				answer(rig.node, zero_first(m));
		if (next_message(rig.node, &m, 50) && m.type == DMU_FAULT)
			answering = begin_answer(rig.node, zero_first(m));
		remove_by_force(g, 6);
		if (answering) {
			while (!answering->done)
				sleep_ms(1);
			end_answer(answering, answering->a.result);
		}
		close(rig.node);
		removals++;
	}
	stop_delay(0, 4);
	CHECK(run("losetup -D") == 0, "%s", said());
	printf("# %u removals\n", removals);
}

const struct scenario race_scenarios[] = {
	{ "race-suspends", race_suspends },
	{ "race-sweeps", race_sweeps },
	{ "race-removal", race_removal },
	{ 0 },
};
