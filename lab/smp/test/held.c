// SPDX-License-Identifier: Apache-2.0
/*
 * What goes wrong only when one thread stands still between two steps and another one passes it:
 * there it is held, every time.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include "stops.h"

#define BLOCK 16
#define PLACE(block) (32 * BLOCK + (block) * BLOCK)

static struct rig plain(void)
{
	return (struct rig){ .block = BLOCK, .sectors = 64 * BLOCK };
}

static struct dmu_answer place(struct dmu_message m)
{
	struct dmu_answer a = map(m.id, m.block, 1, 0, PLACE(m.block),
				  DMU_WRITABLE | DMU_COPY_FIRST);

	a.from_device = 1;
	a.from_sector = m.block * BLOCK;
	return a;
}

/* Answers what a request asks, as a copy on write does, until it has ended. */
static void serve(struct rig *rig, struct guest *guest, int error)
{
	uint64_t until = now_ms() + 20000;
	struct dmu_message m;

	while (!guest->done) {
		CHECK(now_ms() < until, "a request does not end");
		if (!next_message(rig->node, &m, 20))
			continue;
		if (m.type == DMU_FLUSH)
			answer(rig->node, (struct dmu_answer){ .type = DMU_FLUSH_DONE,
							       .id = m.id });
		else if (m.type == DMU_FAULT && m.flags & DMU_WRITE)
			answer(rig->node, place(m));
		else if (m.type == DMU_FAULT)
			answer(rig->node, map(m.id, m.block, 1, 1, m.block * BLOCK,
					      DMU_TEMPORARY));
		else if (m.type == DMU_DISCARD)
			answer(rig->node, (struct dmu_answer){ .type = DMU_DONE, .id = m.id,
							       .count = m.count });
	}
	end(guest, error);
}

/* A part of a block is written, and waits for the answer to its question. */
static struct guest *waiting_write(struct rig *rig, struct dmu_message *question)
{
	struct guest *write;

	CHECK(answer(rig->node, map(0, 0, 64, 1, 0, 0)) == 0);
	write = begin(rig, WRITE_IT, 5 * BLOCK + 2, 2, 0x77);
	*question = expect(rig->node, DMU_FAULT);
	return write;
}

/* A read that came after a write has its bytes, however long it stands beside the index. */
static void read_passes_write(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *w, *r;

	rig_up(&rig);
	w = waiting_write(&rig, &m);
	stop_hold("looked", 1);
	r = begin(&rig, READ_IT, 5 * BLOCK, BLOCK, 0);
	stop_reached("looked", 1);
	CHECK(answer(rig.node, place(m)) == 0);
	end(w, 0);
	stop_release("looked");
	serve(&rig, r, 0);
	check_fill(r, 2 * SECTOR, 2 * SECTOR, 0x77);
	check_bytes(r, 0, 2 * SECTOR, 0, 5 * BLOCK * SECTOR);
	rig_down(&rig);
}

/* The same, where the place was granted and nobody answers. */
static void read_passes_granted(void)
{
	struct rig rig = plain();
	struct guest *w, *r;

	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GRANT, .count = 64,
		     .sector = PLACE(0), .length = 64 }) == 0);
	stop_hold("granting", 1);
	w = begin(&rig, WRITE_IT, 5 * BLOCK + 2, 2, 0x77);
	stop_reached("granting", 1);
	stop_hold("looked", 1);
	r = begin(&rig, READ_IT, 5 * BLOCK, BLOCK, 0);
	stop_reached("looked", 1);
	stop_release("granting");
	end(w, 0);
	stop_release("looked");
	serve(&rig, r, 0);
	check_fill(r, 2 * SECTOR, 2 * SECTOR, 0x77);
	check_bytes(r, 0, 2 * SECTOR, 0, 5 * BLOCK * SECTOR);
	rig_down(&rig);
}

/* fail_faults takes a write while an answer has its cell; a read that comes then is a read. */
static void failed_while_answered(void)
{
	struct rig rig = plain();
	struct answering *answering;
	struct dmu_message m;
	struct guest *w, *r;

	rig_up(&rig);
	w = begin(&rig, WRITE_IT, 3 * BLOCK + 2, 2, 0x77);
	m = expect(rig.node, DMU_FAULT);
	stop_hold("claimed", 1);
	answering = begin_answer(rig.node, place(m));
	stop_reached("claimed", 1);
	CHECK(run("dmsetup message lab 0 fail_faults") == 0, "%s", said());
	end(w, EIO);
	r = begin(&rig, READ_IT, 3 * BLOCK, BLOCK, 0);
	still_waits(r);
	stop_release("claimed");
	end_answer(answering, 0);
	serve(&rig, r, 0);
	check_bytes(r, 0, BLOCK * SECTOR, 0, 3 * BLOCK * SECTOR);
	rig_down(&rig);
}

/* The same with a discard: the write that comes then is not ended by the discard's answer. */
static void failed_while_done(void)
{
	struct rig rig = plain();
	struct answering *answering;
	struct dmu_message m;
	struct guest *d, *w, *r;
	uint8_t bytes[SECTOR];

	rig_up(&rig);
	d = begin(&rig, DISCARD_IT, 3 * BLOCK, BLOCK, 0);
	m = expect(rig.node, DMU_DISCARD);
	stop_hold("claimed", 1);
	answering = begin_answer(rig.node, (struct dmu_answer){ .type = DMU_DONE, .id = m.id,
								.count = m.count });
	stop_reached("claimed", 1);
	CHECK(run("dmsetup message lab 0 fail_faults") == 0, "%s", said());
	end(d, EIO);
	w = begin(&rig, WRITE_IT, 3 * BLOCK + 2, 2, 0x77);
	still_waits(w);
	stop_release("claimed");
	end_answer(answering, 0);
	serve(&rig, w, 0);
	peek(rig.store, PLACE(3) + 2, 1, bytes);
	CHECK(bytes[0] == 0x77 && bytes[SECTOR - 1] == 0x77, "the write is not in its place");
	r = begin(&rig, READ_IT, 3 * BLOCK + 2, 2, 0);
	serve(&rig, r, 0);
	check_fill(r, 0, 2 * SECTOR, 0x77);
	rig_down(&rig);
}

/* Removed while the work of a cell whose write has failed goes on. */
static void removed_while_ending(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *w;
	pid_t removal;
	int status;

	rig.store_table = "error";
	rig_up(&rig);
	w = begin(&rig, WRITE_IT, 0, BLOCK, 1);
	m = expect(rig.node, DMU_FAULT);
	stop_hold("ended", 1);
	CHECK(answer(rig.node, map(m.id, 0, 1, 0, PLACE(0), DMU_WRITABLE)) == 0);
	end(w, EIO);
	stop_reached("ended", 1);
	close(rig.disk);
	removal = start("dmsetup remove lab");
	CHECK(!finished(removal, 1000, &status), "removed with %d", status);
	stop_release("ended");
	CHECK(finished(removal, 20000, &status) && status == 0, "dmsetup remove: %d", status);
	close(rig.node);
	CHECK(run("dmsetup remove store") == 0, "%s", said());
	CHECK(run("losetup -D") == 0);
}

/* An answer that does not come to its end keeps nobody else's device waiting. */
static void others_while_answering(void)
{
	struct answering *answering;
	struct rig rig = plain();
	pid_t reload, other;
	int status;

	rig_up(&rig);
	stop_hold("answering", 1);
	answering = begin_answer(rig.node, map(0, 0, 64, 1, 0, 0));
	stop_reached("answering", 1);
	reload = start("dmsetup load lab --table '0 %d userspace lab %d 2 %s ro:%s'", 64 * BLOCK,
		       BLOCK, rig.store, rig.base);
	sleep_ms(500);
	other = start("dmsetup create other --table '0 64 userspace other 16 1 ro:%s' --readonly && "
		      "dmsetup remove other", rig.base);
	CHECK(finished(other, 10000, &status) && status == 0, "another device waits, status %d",
	      status);
	stop_release("answering");
	end_answer(answering, 0);
	CHECK(finished(reload, 20000, &status) && status == 0, "dmsetup load: %d", status);
	rig_down(&rig);
}

static void *read_one(void *argument)
{
	struct rig *rig = argument;
	struct dmu_message m;

	return read(rig->node, &m, sizeof(m)) == sizeof(m) && m.type == DMU_VERSION_IS ? rig :
											   NULL;
}

/* Removed while a reader has an event in its hands. */
static void removed_while_reading(void)
{
	struct rig rig = plain();
	pthread_t reader;
	void *got;

	rig_up(&rig);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GET_VERSION }) == 0);
	stop_hold("reading", 1);
	CHECK(pthread_create(&reader, NULL, read_one, &rig) == 0);
	stop_reached("reading", 1);
	close(rig.disk);
	CHECK(run("dmsetup remove lab") == 0, "%s", said());
	stop_release("reading");
	pthread_join(reader, &got);
	CHECK(got, "the message is lost");
	run("dmesg");
	CHECK(!strstr(said(), "WARNING:"), "the kernel has warned");
	close(rig.node);
	CHECK(run("losetup -D") == 0);
}

/* A forced write does not find a place before the commit that it needs is known to be needed. */
static void forced_while_mapped(void)
{
	struct rig rig = plain();
	struct answering *answering;
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *w;

	rig_up(&rig);
	a = map(0, 7, 1, 0, PLACE(7), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 1;
	stop_hold("listed", 1);
	answering = begin_answer(rig.node, a);
	stop_reached("listed", 1);
	w = begin(&rig, WRITE_SYNC, 7 * BLOCK, BLOCK, 0x77);
	still_waits(w);
	stop_release("listed");
	end_answer(answering, 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, map(m.id, 7, 1, 0, PLACE(7), DMU_WRITABLE)) == 0);
	m = expect(rig.node, DMU_FLUSH);
	still_waits(w);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(w, 0);
	rig_down(&rig);
}

/* A suspend that a signal is sent to gives back what waits, and loses none of it. */
static void signal_in_suspend(void)
{
	struct rig rig = plain();
	struct guest *slow, *early, *late;
	struct dmu_message m;
	pid_t suspend;
	int status;

	rig.store_table = "delay %s 0 0 %1$s 0 2000";
	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 40, 1, 0, PLACE(40), DMU_WRITABLE)) == 0);
	slow = begin(&rig, WRITE_IT, 40 * BLOCK, BLOCK, 9);
	early = begin(&rig, WRITE_IT, 2 * BLOCK, 2, 0x77);
	m = expect(rig.node, DMU_FAULT);
	stop_hold("undoing", 1);
	suspend = start("exec dmsetup suspend --noflush --nolockfs lab");
	sleep_ms(500);
	kill(suspend, SIGTERM);
	sleep_ms(500);
	/* The core takes requests again before an interrupted suspend is undone. */
	late = begin(&rig, WRITE_IT, 3 * BLOCK, 2, 0x78);
	still_waits(late);
	still_waits(early);
	stop_release("undoing");
	CHECK(finished(suspend, 20000, &status), "the suspend does not end");
	end(slow, 0);
	CHECK(run("dmsetup resume lab") == 0, "%s", said());
	answer(rig.node, place(m));
	serve(&rig, early, 0);
	serve(&rig, late, 0);
	rig_down(&rig);
}

/* Writes of one block keep their order over a suspend that comes between them. */
static void order_over_suspend(void)
{
	struct rig rig = plain();
	struct guest *first, *second, *third;
	struct dmu_message m;
	uint8_t bytes[2 * SECTOR];
	pid_t suspend;
	int status;

	rig_up(&rig);
	first = begin(&rig, WRITE_IT, 4 * BLOCK, 2, 1);
	m = expect(rig.node, DMU_FAULT);
	stop_hold("holding", 1);
	second = begin(&rig, WRITE_IT, 4 * BLOCK, 2, 2);
	stop_reached("holding", 1);
	stop_release("suspending");
	suspend = start("dmsetup suspend --noflush --nolockfs lab");
	stop_passed("suspending", 1);
	sleep_ms(300);	/* the core takes no more */
	stop_release("holding");
	CHECK(finished(suspend, 20000, &status) && status == 0, "dmsetup suspend: %d", status);
	third = begin(&rig, WRITE_IT, 4 * BLOCK + 1, 1, 3);
	sleep_ms(50);
	CHECK(answer(rig.node, place(m)) == 0);
	CHECK(run("dmsetup resume lab") == 0, "%s", said());
	serve(&rig, first, 0);
	serve(&rig, second, 0);
	serve(&rig, third, 0);
	peek(rig.store, PLACE(4), 2, bytes);
	CHECK(bytes[0] == 2 && bytes[SECTOR] == 3, "the last writes are %d and %d", bytes[0],
	      bytes[SECTOR]);
	rig_down(&rig);
}

/*
 * What is given back to the core comes again at once, and must not end before the core is done with
 * it: until the core takes no more requests nothing does, also what is mapped, and flushes.
 */
static void given_back_again(void)
{
	struct rig rig = plain();
	const int store = (64 + 32) * 2 * BLOCK;
	struct guest *held, *write, *flush;
	pid_t suspend;
	int status;

	rig.store_table = "linear %s 0";
	rig_up(&rig);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_HOLD_FAILED, .code = 1 }) == 0);
	CHECK(answer(rig.node, map(0, 0, 32, 0, PLACE(0), DMU_WRITABLE)) == 0);
	CHECK(run("dmsetup load store --table '0 %d error' && dmsetup suspend store && "
		  "dmsetup resume store", store) == 0, "%s", said());
	held = begin(&rig, WRITE_IT, 2 * BLOCK, 2 * BLOCK, 7);
	expect(rig.node, DMU_DEVICE_ERROR);
	expect(rig.node, DMU_WRITES_FAILED);
	CHECK(run("dmsetup load store --table '0 %d linear %s 0' && dmsetup suspend store && "
		  "dmsetup resume store", store, rig.store_loop) == 0, "%s", said());
	stop_hold("suspending", 1);
	suspend = start("dmsetup suspend --noflush --nolockfs lab");
	stop_reached("suspending", 1);
	write = begin(&rig, WRITE_IT, 8 * BLOCK, 1, 8);
	flush = begin(&rig, FLUSH_IT, 0, 0, 0);
	still_waits(held);
	still_waits(write);
	still_waits(flush);
	stop_release("suspending");
	CHECK(finished(suspend, 20000, &status) && status == 0, "dmsetup suspend: %d", status);
	still_waits(held);
	CHECK(run("dmsetup resume lab") == 0, "%s", said());
	end(held, 0);
	end(write, 0);
	end(flush, 0);
	rig_down(&rig);
}

/* A read that an answer could not serve is given back as well when a suspend has come meanwhile. */
static void put_back_in_suspend(void)
{
	struct rig rig = plain();
	struct answering *answering;
	struct guest *one, *other;
	static uint8_t bytes[2 * SECTOR];
	struct dmu_message m;
	pid_t suspend;
	int status;

	memset(bytes, 0x55, sizeof(bytes));
	rig_up(&rig);
	one = begin(&rig, READ_IT, 3 * BLOCK, 2, 0);
	m = expect(rig.node, DMU_FAULT);
	other = begin(&rig, READ_IT, 3 * BLOCK + 8, 2, 0);
	still_waits(other);
	stop_hold_later("popped", 1);
	answering = begin_answer(rig.node, (struct dmu_answer){ .type = DMU_DATA, .id = m.id,
				 .address = (uintptr_t)bytes, .length = sizeof(bytes) });
	stop_reached("popped", 1);
	end(one, 0);
	check_fill(one, 0, 2 * SECTOR, 0x55);
	stop_release("suspending");
	suspend = start("exec dmsetup suspend --noflush --nolockfs lab");
	stop_passed("suspending", 1);
	stop_release("popped");
	end_answer(answering, 0);
	CHECK(finished(suspend, 10000, &status) && status == 0, "the suspend waits for the worker");
	CHECK(run("dmsetup resume lab") == 0, "%s", said());
	serve(&rig, other, 0);
	check_bytes(other, 0, 2 * SECTOR, 0, (3 * BLOCK + 8) * SECTOR);
	rig_down(&rig);
}

/* A new worker does not hear of another one's failed placement under a mark that it has given. */
static void mark_of_another(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *w;

	rig.store_table = "error";
	rig_up(&rig);
	w = begin(&rig, WRITE_IT, 0, BLOCK, 1);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 0, 1, 0, PLACE(0), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 7;
	stop_hold("dropped", 1);
	CHECK(answer(rig.node, a) == 0);
	stop_reached("dropped", 1);
	close(rig.node);
	rig.node = open(NODE, O_RDWR | O_CLOEXEC);
	CHECK(rig.node >= 0, "errno %d", errno);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_DUMP }) == 0);
	m = expect(rig.node, DMU_DUMP_DONE);
	a = map(0, 9, 1, 0, PLACE(9), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = m.mark + 7;
	CHECK(answer(rig.node, a) == 0);
	stop_release("dropped");
	end(w, EIO);
	while (next_message(rig.node, &m, 200))
		CHECK(m.type != DMU_MAP_ERROR || m.mark != a.mark, "mark %llu of block %llu",
		      (unsigned long long)m.mark, (unsigned long long)m.block);
	rig_down(&rig);
}

/* A request is not kept by the lock because another block waits; one of that block waits behind. */
static void beside_one_that_waits(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *w, *r;

	rig_up(&rig);
	w = waiting_write(&rig, &m);
	stop_hold("searching", 1);
	r = begin(&rig, READ_IT, 6 * BLOCK + 1, 10 * BLOCK, 0);
	end(r, 0);
	check_bytes(r, 0, 10 * BLOCK * SECTOR, 0, (6 * BLOCK + 1) * SECTOR);
	r = begin(&rig, READ_IT, 5 * BLOCK, BLOCK, 0);
	stop_reached("searching", 1);
	stop_release("searching");
	still_waits(r);
	CHECK(answer(rig.node, place(m)) == 0);
	end(w, 0);
	serve(&rig, r, 0);
	check_fill(r, 2 * SECTOR, 2 * SECTOR, 0x77);
	check_bytes(r, 0, 2 * SECTOR, 0, 5 * BLOCK * SECTOR);
	rig_down(&rig);
}

/* A first write that stays where it is sent keeps no other block from being carried along. */
static void copy_while_writing(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *stuck, *w, *r;

	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GRANT, .count = 32,
		     .sector = PLACE(0), .length = 32 }) == 0);
	stop_hold("writing", 1);
	stuck = begin(&rig, WRITE_IT, 5 * BLOCK + 2, 2, 0x77);
	stop_reached("writing", 1);
	w = begin(&rig, WRITE_IT, 40 * BLOCK + 2, 2, 0x78);
	do {
		CHECK(next_message(rig.node, &m, 20000), "no question");
	} while (m.type == DMU_PLACED);
	CHECK(m.type == DMU_FAULT && m.block == 40);
	CHECK(answer(rig.node, place(m)) == 0);
	end(w, 0);
	r = begin(&rig, READ_IT, 40 * BLOCK, BLOCK, 0);
	end(r, 0);
	check_fill(r, 2 * SECTOR, 2 * SECTOR, 0x78);
	check_bytes(r, 4 * SECTOR, (BLOCK - 4) * SECTOR, 0, (40 * BLOCK + 4) * SECTOR);
	stop_release("writing");
	end(stuck, 0);
	rig_down(&rig);
}

/*
 * Removed while a commit that no request has asked for flushes the devices. The module begins it by
 * itself 5 s after the placements, and the flush takes twice that: a slow machine is in time.
 */
static void removed_while_committing(void)
{
	enum { MANY = 4096, UNDER_WAY = 7000, FLUSH = 10000 };
	static struct dmu_answer list[MANY];
	struct dmu_message m;
	uint64_t start, took;
	char loop[32];
	int node, i;

	CHECK(run("truncate -s 80M /mnt/many.img && losetup --show -f /mnt/many.img") == 0, "%s",
	      said());
	snprintf(loop, sizeof(loop), "%.*s", (int)strcspn(said(), "\n"), said());
	CHECK(run("dmsetup create store --table '0 160000 delay %s 0 0 %s 0 0 %s 0 %d'", loop,
		  loop, loop, FLUSH) == 0, "%s", said());
	CHECK(run("dmsetup create lab --table '0 %d userspace lab 1 1 /dev/mapper/store'",
		  MANY) == 0, "%s", said());
	node = open(NODE, O_RDWR | O_CLOEXEC);
	CHECK(node >= 0, "errno %d", errno);
	for (i = 0; i < MANY; i++) {
		list[i] = map(0, i, 1, 0, 2 * i, DMU_WRITABLE | DMU_HOLD_FLUSH);
		list[i].mark = i + 1;
	}
	CHECK(answers(node, list, MANY) == 0);
	sleep_ms(UNDER_WAY);
	CHECK(!next_message(node, &m, 200), "type %u", m.type);
	close(node);
	start = now_ms();
	CHECK(run("dmsetup remove lab") == 0, "%s", said());
	took = now_ms() - start;
	CHECK(took >= 500, "removed in %llu ms: no flush was under way", (unsigned long long)took);
	printf("# removed in %llu ms\n", (unsigned long long)took);
	sleep_ms(5000);
	CHECK(run("dmsetup remove store && losetup -D && rm /mnt/many.img") == 0, "%s", said());
}

#define FLAG_MEMALLOC 0x800		/* PF_MEMALLOC, and the next: linux/sched.h */
#define FLAG_NOIO 0x80000

/* The flags of this program's threads, other than the first; proc(5), stat, the ninth field. */
static unsigned int thread_flags(void)
{
	unsigned int all = 0, flags;
	struct dirent *entry;
	char path[300], line[512], *after;
	DIR *tasks = opendir("/proc/self/task");
	FILE *file;

	CHECK(tasks);
	while ((entry = readdir(tasks))) {
		if (entry->d_name[0] == '.' || atoi(entry->d_name) == getpid())
			continue;
		snprintf(path, sizeof(path), "/proc/self/task/%s/stat", entry->d_name);
		file = fopen(path, "re");
		if (!file)
			continue;
		CHECK(fgets(line, sizeof(line), file));
		fclose(file);
		after = strrchr(line, ')');
		CHECK(after && sscanf(after + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1,
		      "%s", line);
		all |= flags;
	}
	closedir(tasks);
	return all;
}

/* What an answer sends to a device has the reserve of memory for nothing, and starts no writeback. */
static void sent_without_reserve(void)
{
	struct rig rig = plain();
	struct answering *answering;
	struct dmu_message m;
	struct guest *w;
	unsigned int flags;

	rig_up(&rig);
	w = begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 0x77);
	m = expect(rig.node, DMU_FAULT);
	stop_hold("writing", 1);
	answering = begin_answer(rig.node, map(m.id, 3, 1, 0, PLACE(3), DMU_WRITABLE));
	stop_reached("writing", 1);
	flags = thread_flags();
	CHECK(flags & FLAG_NOIO, "flags %x", flags);
	CHECK(!(flags & FLAG_MEMALLOC), "flags %x", flags);
	stop_release("writing");
	end_answer(answering, 0);
	end(w, 0);
	rig_down(&rig);
}

/* Blocks with a place each, read from the base, which first writes may go to. */
static void layered_up(struct rig *rig)
{
	rig_up(rig);
	CHECK(answer(rig->node, (struct dmu_answer){ .type = DMU_LAYER, .count = 64,
		     .sector = PLACE(0) }) == 0);
	CHECK(answer(rig->node, map(0, 0, 64, 1, 0, 0)) == 0);
	CHECK(answer(rig->node, (struct dmu_answer){ .type = DMU_GRANT, .count = 64,
		     .sector = PLACE(0), .length = 64 }) == 0);
}

/* Answers flushes until a request has ended; the bits that were told. */
static uint64_t serve_flush(struct rig *rig, struct guest *guest)
{
	uint64_t until = now_ms() + 20000, bits = 0;
	struct dmu_message m;

	while (!guest->done) {
		CHECK(now_ms() < until, "a request does not end");
		if (!next_message(rig->node, &m, 20))
			continue;
		if (m.type == DMU_PRESENT)
			bits |= m.sector;
		else if (m.type == DMU_FLUSH)
			answer(rig->node, (struct dmu_answer){ .type = DMU_FLUSH_DONE,
							       .id = m.id });
		else
			CHECK(m.type == DMU_PLACED, "type %u", m.type);
	}
	end(guest, 0);
	return bits;
}

/* A write of all of a block that is about to go there as a touch. */
static struct guest *touch_held(struct rig *rig)
{
	struct guest *touch;

	layered_up(rig);
	stop_hold("touching", 1);
	touch = begin(rig, WRITE_IT, 5 * BLOCK, BLOCK, 0x77);
	stop_reached("touching", 1);
	return touch;
}

/* It has come last, whatever was written to a part of the block meanwhile. */
static void touch_is_last(struct rig *rig)
{
	struct guest *r = begin(rig, READ_IT, 5 * BLOCK, BLOCK, 0);

	end(r, 0);
	check_fill(r, 0, BLOCK * SECTOR, 0x77);
}

/* A part of the block is placed meanwhile. */
static void part_before_touch(void)
{
	struct rig rig = plain();
	struct guest *t = touch_held(&rig), *p;

	p = begin(&rig, WRITE_IT, 5 * BLOCK + 2, 2, 0x55);
	end(p, 0);
	stop_release("touching");
	end(t, 0);
	touch_is_last(&rig);
	rig_down(&rig);
}

/* The same while the part waits to be placed: the touch is none, and queues. */
static void touch_beside_cell(void)
{
	struct rig rig = plain();
	struct guest *t = touch_held(&rig), *p;

	stop_hold("granting", 1);
	p = begin(&rig, WRITE_IT, 5 * BLOCK + 2, 2, 0x55);
	stop_reached("granting", 1);
	stop_release("touching");
	still_waits(t);
	stop_release("granting");
	end(p, 0);
	end(t, 0);
	touch_is_last(&rig);
	CHECK(stat_of("granted") == 1);
	rig_down(&rig);
}

/* What comes after a touch waits until its bits are set: a part of the block, and a read of it. */
static void part_after_touch(void)
{
	struct rig rig = plain();
	struct guest *t, *p, *r, *other;

	layered_up(&rig);
	stop_hold("touched", 1);
	t = begin(&rig, WRITE_IT, 5 * BLOCK, BLOCK, 0x77);
	stop_reached("touched", 1);
	r = begin(&rig, READ_IT, 5 * BLOCK, BLOCK, 0);
	sleep_ms(50);
	p = begin(&rig, WRITE_IT, 5 * BLOCK + 2, 2, 0x55);
	/* Another block does not wait. */
	other = begin(&rig, READ_IT, 6 * BLOCK, BLOCK, 0);
	end(other, 0);
	check_bytes(other, 0, BLOCK * SECTOR, 0, 6 * BLOCK * SECTOR);
	still_waits(r);
	still_waits(p);
	stop_release("touched");
	end(t, 0);
	end(r, 0);
	end(p, 0);
	check_fill(r, 0, BLOCK * SECTOR, 0x77);
	r = begin(&rig, READ_IT, 5 * BLOCK, BLOCK, 0);
	end(r, 0);
	check_fill(r, 0, 2 * SECTOR, 0x77);
	check_fill(r, 2 * SECTOR, 2 * SECTOR, 0x55);
	check_fill(r, 4 * SECTOR, (BLOCK - 4) * SECTOR, 0x77);
	CHECK(stat_of("copies") == 0 && stat_of("faults") == 0);
	rig_down(&rig);
}

/* A read has found no bit and no touch; the touch that came before it ends just then. */
static void read_looks_again(void)
{
	struct rig rig = plain();
	struct guest *t, *r;

	layered_up(&rig);
	stop_hold("looked", 1);
	r = begin(&rig, READ_IT, 5 * BLOCK, BLOCK, 0);
	stop_reached("looked", 1);
	t = begin(&rig, WRITE_IT, 5 * BLOCK, BLOCK, 0x77);
	end(t, 0);
	stop_release("looked");
	end(r, 0);
	/* It came before the write. */
	if (r->data[0] == 0x77)
		check_fill(r, 0, BLOCK * SECTOR, 0x77);
	else
		check_bytes(r, 0, BLOCK * SECTOR, 0, 5 * BLOCK * SECTOR);
	stop_hold("touched", 1);
	t = begin(&rig, WRITE_IT, 7 * BLOCK, BLOCK, 0x66);
	stop_reached("touched", 1);
	stop_hold("missed", 1);
	r = begin(&rig, READ_IT, 8 * BLOCK, BLOCK, 0);
	stop_reached("missed", 1);
	stop_release("touched");
	end(t, 0);
	t = begin(&rig, WRITE_IT, 8 * BLOCK, BLOCK, 0x44);
	end(t, 0);
	stop_release("missed");
	end(r, 0);
	check_fill(r, 0, BLOCK * SECTOR, 0x44);
	rig_down(&rig);
}

/* A flush covers what has ended, and tells nothing of what has not. */
static void flush_beside_touch(void)
{
	struct rig rig = plain();
	struct guest *one, *t, *f;

	layered_up(&rig);
	one = begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 0x11);
	end(one, 0);
	stop_hold("touched", 1);
	t = begin(&rig, WRITE_IT, 5 * BLOCK, BLOCK, 0x77);
	stop_reached("touched", 1);
	f = begin(&rig, FLUSH_IT, 0, 1, 0);
	CHECK(serve_flush(&rig, f) == 1 << 3);
	stop_release("touched");
	end(t, 0);
	CHECK(stat_of("uncommitted") == 1);
	f = begin(&rig, FLUSH_IT, 0, 1, 0);
	CHECK(serve_flush(&rig, f) == 1 << 5);
	CHECK(stat_of("uncommitted") == 0);
	rig_down(&rig);
}

const struct scenario stop_scenarios[] = {
	{ "sent-without-reserve", sent_without_reserve },
	{ "copy-while-writing", copy_while_writing },
	{ "beside-one-that-waits", beside_one_that_waits },
	{ "read-passes-write", read_passes_write },
	{ "read-passes-granted", read_passes_granted },
	{ "failed-while-answered", failed_while_answered },
	{ "failed-while-done", failed_while_done },
	{ "others-while-answering", others_while_answering },
	{ "removed-while-reading", removed_while_reading },
	{ "forced-while-mapped", forced_while_mapped },
	{ "signal-in-suspend", signal_in_suspend },
	{ "order-over-suspend", order_over_suspend },
	{ "given-back-again", given_back_again },
	{ "put-back-in-suspend", put_back_in_suspend },
	{ "mark-of-another", mark_of_another },
	{ "removed-while-ending", removed_while_ending },
	{ "removed-while-committing", removed_while_committing },
	{ "part-before-touch", part_before_touch },
	{ "touch-beside-cell", touch_beside_cell },
	{ "part-after-touch", part_after_touch },
	{ "read-looks-again", read_looks_again },
	{ "flush-beside-touch", flush_beside_touch },
	{ 0 },
};
