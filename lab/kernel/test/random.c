// SPDX-License-Identifier: Apache-2.0
/*
 * Random traces against a model: guests read and write their own sectors of shared blocks, a
 * worker places blocks, invalidates, delays, dies and is replaced, an administrator suspends,
 * resumes and reloads. Every read is compared with the model, and after each trace the whole
 * disk is. DMU_SEED is the seed, DMU_ROUNDS the number of times 40 traces.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/fs.h>
#include <unistd.h>
#include "lab.h"

#define BLOCK 8
#define BLOCKS 48
#define SECTORS (BLOCKS * BLOCK - 3)
#define GUESTS 4
#define OPERATIONS 12
#define TRACES 40

static struct rig rig;
static uint8_t model[SECTORS];		/* 0: as the base; 255: zeroes; else the fill */
static volatile unsigned int chunk;	/* sectors that have one owner */
static volatile bool over, wiping;

/* The worker's format. Only the worker's thread touches it. */
static struct {
	int64_t place[BLOCKS];		/* sector of the store, -1 */
	uint64_t mark[BLOCKS];		/* 0: committed */
	bool used[BLOCKS * 3 + 4];	/* the last for grants: block b goes to GRANTED + b */
	uint64_t last_mark;
	uint64_t parked;
	bool granting;
	unsigned int deaths, placed, granted, pools, commits, errors;
} format;

#define GRANTED (BLOCKS * 2 + 4)	/* in blocks of the store */

static uint64_t draw(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state * 0x2545f4914f6cdd1dull >> 11;
}

static uint8_t expected(uint64_t sector, unsigned int byte)
{
	if (!model[sector])
		return pattern(0, sector * SECTOR + byte);
	return model[sector] == 255 ? 0 : model[sector];
}

static void compare(const uint8_t *data, uint64_t sector, uint64_t count)
{
	uint64_t i;

	for (i = 0; i < count * SECTOR; i++)
		CHECK(data[i] == expected(sector + i / SECTOR, i % SECTOR),
		      "sector %llu byte %llu: %02x, should be %02x",
		      (unsigned long long)(sector + i / SECTOR),
		      (unsigned long long)(i % SECTOR), data[i],
		      expected(sector + i / SECTOR, i % SECTOR));
}

struct actor {
	pthread_t thread;
	uint64_t state;
	unsigned int number;
};

static void one_operation(struct actor *actor, int disk, int sync, uint8_t *data)
{
	unsigned int pieces = (SECTORS + chunk - 1) / chunk;
	unsigned int piece = draw(&actor->state) % pieces / GUESTS * GUESTS + actor->number;
	unsigned int first = piece * chunk, count, offset;
	unsigned int op = draw(&actor->state) % 16;
	uint64_t range[2];

	if (first >= SECTORS)
		return;
	count = SECTORS - first < chunk ? SECTORS - first : chunk;
	offset = draw(&actor->state) % count;
	if (draw(&actor->state) % 2)
		offset = 0;
	count = offset ? 1 + draw(&actor->state) % (count - offset) : count;
	first += offset;
	if (op < 6) {
		CHECK(pread(disk, data, count * SECTOR, first * SECTOR) ==
		      (ssize_t)count * SECTOR, "errno %d", errno);
		compare(data, first, count);
	} else if (op < 13) {
		uint8_t fill = 1 + draw(&actor->state) % 254;

		memset(data, fill, count * SECTOR);
		CHECK(pwrite(op == 12 ? sync : disk, data, count * SECTOR, first * SECTOR) ==
		      (ssize_t)count * SECTOR, "errno %d", errno);
		memset(&model[first], fill, count);
	} else if (op == 13) {
		CHECK(fsync(disk) == 0, "errno %d", errno);
	} else {
		range[0] = first * SECTOR;
		range[1] = count * SECTOR;
		CHECK(ioctl(disk, op == 14 ? BLKZEROOUT : BLKDISCARD, range) == 0, "errno %d",
		      errno);
		if (op == 14)
			memset(&model[first], 255, count);
	}
}

static void *guest_body(void *argument)
{
	struct actor *actor = argument;
	int disk = open(DISK, O_RDWR | O_DIRECT), sync = open(DISK, O_RDWR | O_DIRECT | O_DSYNC);
	uint8_t *data;
	int i;

	CHECK(disk >= 0 && sync >= 0);
	CHECK(posix_memalign((void **)&data, 4096, SECTORS * SECTOR + 4096) == 0);
	for (i = 0; i < OPERATIONS; i++)
		one_operation(actor, disk, sync, data);
	free(data);
	close(disk);
	close(sync);
	return NULL;
}

static int64_t take_place(struct actor *actor)
{
	unsigned int at = draw(&actor->state) % (BLOCKS * 2);

	while (format.used[at])
		at = (at + 1) % (BLOCKS * 2);
	format.used[at] = true;
	return (at + 1) * BLOCK;
}

static void forget(uint64_t block)
{
	if (format.place[block] >= 0)
		format.used[format.place[block] / BLOCK - 1] = false;
	format.place[block] = -1;
	format.mark[block] = 0;
}

/* Gives the block a place, uncommitted, and makes the answer. */
static struct dmu_answer place(struct actor *actor, struct dmu_message *m)
{
	struct dmu_answer a;
	uint64_t block = m->block;
	bool fresh = format.place[block] < 0;

	if (fresh)
		format.place[block] = take_place(actor);
	a = map(m->id, block, 1, 0, format.place[block], DMU_WRITABLE);
	if (!fresh)
		return a;
	format.placed++;
	a.flags |= DMU_HOLD_FLUSH;
	/* The module gives a mark, or we do and keep a distance. */
	if (draw(&actor->state) % 2)
		a.mark = format.last_mark += format.granting ? 1 << 20 : 1;
	if (draw(&actor->state) % 8 == 0)
		a.flags |= DMU_SYNC;
	if (m->type == DMU_FAULT && (!(m->flags & DMU_WHOLE) || draw(&actor->state) % 4 == 0)) {
		a.flags |= DMU_COPY_FIRST;
		a.from_device = 1;
		a.from_sector = block * BLOCK;
	}
	return a;
}

static void tell(struct dmu_answer a)
{
	int result = answer(rig.node, a);

	CHECK(result == 0, "answer %u flags %#x block %llu count %llu: %d", a.type, a.flags,
	      (unsigned long long)a.block, (unsigned long long)a.count, result);
}

/* An answer with a new placement, whose mark it notes. */
static void tell_place(struct dmu_answer a)
{
	CHECK(answers(rig.node, &a, 1) == 0, "flags %#x block %llu: %d", a.flags,
	      (unsigned long long)a.block, a.result);
	if (!(a.flags & DMU_HOLD_FLUSH))
		return;
	/* Nobody waits for it any more. */
	if (!a.mark)
		forget(a.block);
	else
		format.mark[a.block] = a.mark;
	if (format.last_mark < a.mark)
		format.last_mark = a.mark;
}

static void answer_read(struct actor *actor, struct dmu_message *m)
{
	static uint8_t bytes[BLOCK * SECTOR];
	struct dmu_answer a;
	unsigned int i;

	if (format.place[m->block] >= 0) {
		tell(map(m->id, m->block, 1, 0, format.place[m->block],
			 DMU_WRITABLE));
		return;
	}
	switch (draw(&actor->state) % 4) {
	case 0:
		tell(map(m->id, m->block, 1, 1, m->block * BLOCK, DMU_TEMPORARY));
		break;
	case 1:
		for (i = 0; i < sizeof(bytes); i++)
			bytes[i] = pattern(0, m->block * sizeof(bytes) + i);
		a = (struct dmu_answer){
			.type = DMU_DATA, .id = m->id, .address = (uintptr_t)bytes,
			.length = sizeof(bytes),
		};
		tell(a);
		break;
	default:
		tell(map(m->id, m->block, 1, 1, m->block * BLOCK, 0));
	}
}

static void answer_discard(struct actor *actor, struct dmu_message *m)
{
	struct dmu_answer a;

	if (!(m->flags & DMU_ZEROING)) {
		tell((struct dmu_answer){ .type = DMU_DONE, .id = m->id,
					  .count = 1 + draw(&actor->state) % m->count });
		return;
	}
	a = place(actor, m);
	a.flags &= ~DMU_COPY_FIRST;
	tell_place(a);
}

static void commit(struct dmu_message *m)
{
	uint64_t i;

	for (i = 0; i < BLOCKS; i++)
		if (format.mark[i] <= m->mark)
			format.mark[i] = 0;
	format.commits++;
	tell((struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m->id });
}

/* Makes an answer a pool of places that are free, if there are so many and enough beside them. */
static bool make_pool(struct actor *actor, struct dmu_answer *a)
{
	unsigned int places = 1 + draw(&actor->state) % 8, at, i, free = 0, homeless = 0;
	unsigned int stride = 1 + draw(&actor->state) % 2;

	for (i = 0; i < BLOCKS * 2; i++)
		free += !format.used[i];
	for (i = 0; i < BLOCKS; i++)
		homeless += format.place[i] < 0;
	if (free < homeless + places)
		return false;
	for (at = 0; at + (places - 1) * stride < BLOCKS * 2; at++) {
		for (i = 0; i < places && !format.used[at + i * stride]; i++)
			;
		if (i < places)
			continue;
		a->flags = DMU_POOL;
		a->sector = (at + 1) * BLOCK;
		a->from_sector = stride * BLOCK;
		a->length = places;
		return true;
	}
	return false;
}

/* First writes need no question from now on, or do again. Marks keep their distance. */
static void change_grant(struct actor *actor)
{
	struct dmu_answer a = { .type = DMU_GRANT };
	int result = 0;
	uint64_t i;

	if (draw(&actor->state) % 3 == 0 && make_pool(actor, &a)) {
		a.block = draw(&actor->state) % 3 ? 0 : draw(&actor->state) % (BLOCKS / 2);
		a.count = BLOCKS - a.block;
		result = answer(rig.node, a);
		CHECK(!result || result == -ENOBUFS, "%d", result);
		for (i = 0; i < a.length && !result; i++)
			format.used[a.sector / BLOCK - 1 + i * a.from_sector / BLOCK] = true;
		format.granting |= !result;
		format.pools += !result;
		return;
	}
	if (draw(&actor->state) % 3) {
		a.block = draw(&actor->state) % (BLOCKS / 2);
		a.count = BLOCKS - a.block;
		a.sector = (GRANTED + a.block) * BLOCK;
		a.length = 1 + draw(&actor->state) % 16;
		format.granting = true;
	}
	tell(a);
	for (i = 0; i < BLOCKS && format.granting; i++) {
		/* Unless it is being placed, or was, and nobody has told us yet. */
		if (format.place[i] < 0 && draw(&actor->state) % 2)
			result = answer(rig.node, map(0, i, 1, 1, i * BLOCK, 0));
		CHECK(!result || result == -EEXIST, "%d", result);
	}
}

/* Whether a block has the place already. */
static bool housed(int64_t sector)
{
	uint64_t i;

	for (i = 0; i < BLOCKS; i++)
		if (format.place[i] == sector)
			return true;
	return false;
}

/* What of pools went to no block is free again: they have ended, and all that was placed is known. */
static void end_pools(void)
{
	uint64_t i;

	memset(format.used, 0, sizeof(format.used));
	for (i = 0; i < BLOCKS; i++)
		if (format.place[i] >= 0)
			format.used[format.place[i] / BLOCK - 1] = true;
}

static void take_up(struct dmu_message *m)
{
	unsigned int at = m->sector / BLOCK - 1;

	CHECK(format.place[m->block] < 0 && m->count == 1 && m->sector % BLOCK == 0 &&
	      (m->sector == (GRANTED + m->block) * BLOCK ||
	       (at < BLOCKS * 2 && format.used[at] && !housed(m->sector))), "block %llu",
	      (unsigned long long)m->block);
	format.place[m->block] = m->sector;
	format.used[m->sector / BLOCK - 1] = true;
	format.mark[m->block] = m->mark;
	/* A placement of ours may have come after it. */
	if (format.last_mark < m->mark)
		format.last_mark = m->mark;
	format.granted++;
}

/* A new worker: what was committed is in its image, the rest it is told. */
static void replace_worker(void)
{
	struct dmu_message m;
	uint64_t i;

	format.deaths++;
	close(rig.node);
	for (i = 0; i < BLOCKS; i++)
		if (format.mark[i])
			forget(i);
	end_pools();
	/* A child of the administrator may hold the old descriptor until it runs its program. */
	while ((rig.node = open(NODE, O_RDWR | O_CLOEXEC)) < 0 && errno == EBUSY)
		sleep_ms(1);
	CHECK(rig.node >= 0, "errno %d", errno);
	tell((struct dmu_answer){ .type = DMU_DUMP });
	for (;;) {
		CHECK(next_message(rig.node, &m, 20000));
		if (m.type == DMU_DUMP_DONE)
			break;
		/* A placement that failed meanwhile is not in the dump any more. */
		if (m.type == DMU_MAP_ERROR)
			continue;
		CHECK(m.type == DMU_UNCOMMITTED_IS, "type %u", m.type);
		CHECK(format.place[m.block] < 0 && m.count == 1 && (m.flags & DMU_WRITE));
		CHECK(!format.used[m.sector / BLOCK - 1]);
		format.place[m.block] = m.sector;
		format.used[m.sector / BLOCK - 1] = true;
		format.mark[m.block] = m.mark;
	}
	format.last_mark = m.mark;
	format.granting = false;
}

static void handle(struct actor *actor, struct dmu_message *m)
{
	switch (m->type) {
	case DMU_FAULT:
		if (draw(&actor->state) % 16 == 0) {
			tell((struct dmu_answer){ .type = DMU_WAIT, .id = m->id });
			format.parked++;
		} else if (m->flags & DMU_READ) {
			answer_read(actor, m);
		} else {
			tell_place(place(actor, m));
		}
		break;
	case DMU_DISCARD:
		answer_discard(actor, m);
		break;
	case DMU_FLUSH:
		commit(m);
		break;
	case DMU_MAP_ERROR:
		format.errors++;
		CHECK(m->code == ECANCELED, "code %d", m->code);
		CHECK(format.mark[m->block] == m->mark || !m->mark);
		if (m->mark)
			forget(m->block);
		break;
	case DMU_PLACED:
		take_up(m);
		break;
	case DMU_SYNC_DONE:
	case DMU_INVALIDATE_DONE:
		break;
	default:
		CHECK(false, "a message of type %u", m->type);
	}
}

/* No guest is there and nothing is uncommitted: an empty image again. */
static void wipe(void)
{
	struct dmu_message m;
	uint64_t i;

	tell((struct dmu_answer){ .type = DMU_GRANT });
	format.granting = false;
	end_pools();
	tell((struct dmu_answer){ .type = DMU_INVALIDATE, .block = 0, .count = BLOCKS });
	do {
		CHECK(next_message(rig.node, &m, 20000));
		CHECK(m.type == DMU_INVALIDATE_DONE || m.type == DMU_SYNC_DONE, "type %u", m.type);
	} while (m.type != DMU_INVALIDATE_DONE || m.count != BLOCKS);
	for (i = 0; i < BLOCKS; i++) {
		CHECK(!format.mark[i]);
		forget(i);
	}
	wiping = false;
}

static void *worker_body(void *argument)
{
	struct actor *actor = argument;
	struct dmu_message m;

	while (!over) {
		if (wiping)
			wipe();
		bool got = next_message(rig.node, &m, 2);
		unsigned int whim = draw(&actor->state) % 64;

		if (got && whim == 0) {
			replace_worker();	/* with a fault in its hands */
			continue;
		}
		if (whim >= 60 && !format.granting)
			change_grant(actor);
		if (got && whim == 1)
			sleep_ms(80);	/* long enough for a suspend to come between */
		if (got)
			handle(actor, &m);
		if (whim == 10 || whim == 11)
			change_grant(actor);
		if (whim < 6)
			tell((struct dmu_answer){ .type = DMU_INVALIDATE,
						  .block = draw(&actor->state) % (BLOCKS - 4),
						  .count = 1 + draw(&actor->state) % 4 });
		if (format.parked && (!got || whim < 16)) {
			format.parked = 0;
			tell((struct dmu_answer){ .type = DMU_RETRY });
		}
	}
	return NULL;
}

static void *admin_body(void *argument)
{
	struct actor *actor = argument;

	while (!over) {
		sleep_ms(50 + draw(&actor->state) % 200);
		if (draw(&actor->state) % 3 == 0)
			CHECK(run("dmsetup reload lab --table '0 %u userspace lab %u 2 %s ro:%s'",
				  SECTORS, BLOCK, rig.store, rig.base) == 0, "%s", said());
		CHECK(run("dmsetup suspend %s lab", draw(&actor->state) % 2 ? "--noflush" : "") == 0,
		      "%s", said());
		CHECK(run("dmsetup resume lab") == 0, "%s", said());
	}
	return NULL;
}

static void random_traces(void)
{
	const char *text = getenv("DMU_ROUNDS");
	unsigned int traces = TRACES * (text ? atoi(text) : 1), i, k;
	uint64_t seed = strtoull(getenv("DMU_SEED") ?: "1", NULL, 10);
	static const unsigned int chunks[] = { 1, 3, BLOCK, 3 * BLOCK };
	struct actor worker = { .state = seed * 7919 + 1 }, admin = { .state = seed * 104729 + 1 };
	struct actor guests[GUESTS];
	uint64_t start = now_ms();
	struct guest *g;

	printf("# seed %llu\n", (unsigned long long)seed);
	for (i = 0; i < BLOCKS; i++)
		format.place[i] = -1;
	rig = (struct rig){ .block = BLOCK, .sectors = SECTORS };
	rig_up(&rig);
	CHECK(pthread_create(&worker.thread, NULL, worker_body, &worker) == 0);
	CHECK(pthread_create(&admin.thread, NULL, admin_body, &admin) == 0);
	for (k = 0; k < GUESTS; k++)
		guests[k] = (struct actor){ .state = seed * 15485863 + k + 1, .number = k };
	for (i = 0; i < traces; i++) {
		chunk = chunks[i % 4];
		for (k = 0; k < GUESTS; k++)
			CHECK(pthread_create(&guests[k].thread, NULL, guest_body, &guests[k]) == 0);
		for (k = 0; k < GUESTS; k++)
			pthread_join(guests[k].thread, NULL);
		g = begin(&rig, READ_IT, 0, SECTORS, 0);
		end(g, 0);
		compare(g->data, 0, SECTORS);
		free(g->data);
		free(g);
		CHECK(fsync(rig.disk) == 0);
		wiping = true;
		while (wiping)
			sleep_ms(1);
		memset(model, 0, sizeof(model));
	}
	over = true;
	pthread_join(admin.thread, NULL);
	pthread_join(worker.thread, NULL);
	printf("# %u traces of %u requests in %llu ms: %u placed, %u granted, %u pools, "
	       "%u commits, %u deaths, %u cancelled\n", traces, GUESTS * OPERATIONS,
	       (unsigned long long)(now_ms() - start), format.placed, format.granted,
	       format.pools, format.commits, format.deaths, format.errors);
	rig_down(&rig);
}

const struct scenario random_scenarios[] = {
	{ "random-traces", random_traces },
	{ 0 },
};
