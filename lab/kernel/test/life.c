// SPDX-License-Identifier: Apache-2.0
/* The life of a device: made, reloaded, suspended, removed; workers that come and go. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "lab.h"

#define BLOCK 16
#define PLACE(block) (32 * BLOCK + (block) * BLOCK)

static struct rig plain(void)
{
	return (struct rig){ .block = BLOCK, .sectors = 64 * BLOCK };
}

static void ctr_errors(void)
{
	static const struct {
		const char *arguments, *says;
	} tries[] = {
		{ "", "NAME is not" },
		{ "a/b 16 1 DEV", "NAME is not" },
		{ ".x 16 1 DEV", "NAME is not" },
		{ "x", "BLOCK_SECTORS is not 1 to" },
		{ "x 0 1 DEV", "BLOCK_SECTORS is not 1 to" },
		{ "x 24 1 DEV", "BLOCK_SECTORS is not a power" },
		{ "x 2097152 1 DEV", "BLOCK_SECTORS is not 1 to" },
		{ "x 16", "NDEVS is not" },
		{ "x 16 0 DEV", "NDEVS is not" },
		{ "x 16 16 DEV", "NDEVS is not" },
		{ "x 16 2 DEV", "fewer DEV" },
		{ "x 16 1 /dev/nothing", "cannot be opened" },
		{ "x 16 1 DEV 1", "the count of features" },
		{ "x 16 1 DEV 3 a b c", "the count of features" },
		{ "x 16 1 DEV 1 fault_timeout", "needs its seconds" },
		{ "x 16 1 DEV 2 colour red", "no such feature" },
		{ "x 16 1 DEV 2 fault_timeout soon", "fault_timeout is not" },
		{ "x 16 1 DEV 2 fault_timeout 5 more", "too many" },
		{ "lab 16 1 DEV", "in use by another" },
	};
	struct rig rig = plain();
	char line[512];
	size_t i;

	rig_up(&rig);
	for (i = 0; i < sizeof(tries) / sizeof(*tries); i++) {
		const char *at = strstr(tries[i].arguments, "DEV");

		snprintf(line, sizeof(line), "%.*s%s%s",
			 (int)(at ? at - tries[i].arguments : 512), tries[i].arguments,
			 at ? rig.store_loop : "", at ? at + 3 : "");
		run("dmesg -c");
		CHECK(run("dmsetup create bad --table '0 64 userspace %s'", line) != 0, "%s", line);
		run("dmesg -c");
		CHECK(strstr(said(), tries[i].says), "for '%s': %s", line, said());
		CHECK(access("/dev/dmu/x", F_OK) != 0);
	}
	/* A reload keeps the size of the block, the devices, the length. */
	run("dmesg -c");
	CHECK(run("dmsetup load lab --table '0 1024 userspace lab 32 2 %s ro:%s'", rig.store,
		  rig.base) != 0);
	run("dmesg -c");
	CHECK(strstr(said(), "BLOCK_SECTORS differs"), "%s", said());
	CHECK(run("dmsetup load lab --table '0 1024 userspace lab 16 1 %s'", rig.store) != 0);
	run("dmesg -c");
	CHECK(strstr(said(), "neither shrinks"), "%s", said());
	CHECK(run("dmsetup load lab --table '0 1024 userspace lab 16 2 ro:%s ro:%s'", rig.store,
		  rig.base) != 0);
	run("dmesg -c");
	CHECK(strstr(said(), "was writable"), "%s", said());
	rig_down(&rig);
}

static void node_life(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct pollfd wait;
	struct stat info;
	pid_t child;
	int status;

	CHECK(access(NODE, F_OK) != 0);
	rig_up(&rig);
	CHECK(stat(NODE, &info) == 0 && (info.st_mode & 0777) == 0600, "mode %o", info.st_mode);
	CHECK(open(NODE, O_RDWR) == -1 && errno == EBUSY);
	CHECK(chmod(NODE, 0666) == 0);
	child = fork();
	if (!child) {
		CHECK(setuid(1000) == 0);
		_exit(open(NODE, O_RDWR) == -1 && errno == EPERM ? 0 : 1);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(read(rig.node, &m, 10) == -1 && errno == EINVAL);
	CHECK(fcntl(rig.node, F_SETFL, O_NONBLOCK) == 0);
	CHECK(read(rig.node, &m, sizeof(m)) == -1 && errno == EAGAIN);
	CHECK(run("dmsetup table lab") == 0 && strstr(said(), " userspace lab 16 2 7:"));
	/* In use: not removed. Closed: removed under the worker's hands. */
	CHECK(run("dmsetup remove lab") != 0 && strstr(said(), "busy"), "%s", said());
	close(rig.disk);
	CHECK(run("dmsetup remove lab") == 0, "%s", said());
	CHECK(access(NODE, F_OK) != 0);
	wait = (struct pollfd){ .fd = rig.node, .events = POLLIN };
	CHECK(poll(&wait, 1, 1000) == 1 && (wait.revents & POLLHUP));
	CHECK(read(rig.node, &m, sizeof(m)) == -1 && errno == ENODEV);
	CHECK(answer(rig.node, map(0, 0, 1, 1, 0, 0)) == -ENODEV);
	close(rig.node);
	run("losetup -D");
}

/* The worker dies; mapped I/O goes on; the next one is told everything. */
static void takeover(void)
{
	struct rig rig = plain();
	struct dmu_message m, old[3];
	struct dmu_answer a;
	struct guest *g[3], *f;
	int i;

	rig_up(&rig);
	for (i = 0; i < 2; i++) {
		f = begin(&rig, WRITE_IT, i * BLOCK, BLOCK, i + 1);
		m = expect(rig.node, DMU_FAULT);
		a = map(m.id, i, 1, 0, PLACE(i), DMU_WRITABLE | DMU_HOLD_FLUSH);
		a.mark = 10 + i;
		CHECK(answer(rig.node, a) == 0);
		end(f, 0);
	}
	for (i = 0; i < 3; i++) {
		g[i] = begin(&rig, i ? READ_IT : WRITE_IT, (5 + i) * BLOCK, 2, 7);
		sleep_ms(20);
		if (i < 2)
			old[i] = expect(rig.node, DMU_FAULT);
	}
	f = begin(&rig, FLUSH_IT, 0, 1, 0);
	sleep_ms(50);
	expect(rig.node, DMU_FAULT);
	m = expect(rig.node, DMU_FLUSH);
	close(rig.node);
	end(begin(&rig, WRITE_IT, 0, BLOCK, 3), 0);
	for (i = 0; i < 3; i++)
		still_waits(g[i]);
	rig.node = open(NODE, O_RDWR);
	CHECK(rig.node >= 0);
	a = (struct dmu_answer){ .type = DMU_DUMP };
	CHECK(write(rig.node, &a, sizeof(a)) == sizeof(a));
	for (i = 0; i < 2; i++) {
		m = expect(rig.node, DMU_UNCOMMITTED_IS);
		CHECK(m.block == (uint64_t)i && m.mark == (uint64_t)(10 + i) && m.count == 1 &&
		      m.sector == PLACE((uint64_t)i) && m.device == 0 && m.flags == DMU_WRITE);
	}
	m = expect(rig.node, DMU_DUMP_DONE);
	CHECK(m.mark == 11);
	for (i = 0; i < 3; i++) {
		m = expect(rig.node, DMU_FAULT);
		CHECK(m.block == (uint64_t)(5 + i) && (m.flags & DMU_AGAIN));
		CHECK(i == 2 || m.id == old[i].id);
		a = map(m.id, m.block, 1, i ? 1 : 0, i ? m.block * BLOCK : PLACE(m.block),
			i ? 0 : DMU_WRITABLE | DMU_ZERO_FIRST | DMU_HOLD_FLUSH);
		a.mark = i ? 0 : 11;
		if (!i) {
			CHECK(answer(rig.node, a) == -ERANGE);
			a.mark = 12;
		}
		CHECK(answer(rig.node, a) == 0);
		end(g[i], 0);
	}
	m = expect(rig.node, DMU_FLUSH);
	CHECK(m.mark == 11 && (m.flags & DMU_AGAIN));
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(f, 0);
	CHECK(stat_of("uncommitted") == 1);
	rig_down(&rig);
}

static void fault_timeout(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g, *h;
	uint64_t start;

	rig.features = "2 fault_timeout 2";
	rig_up(&rig);
	start = now_ms();
	g = begin(&rig, WRITE_IT, 0, BLOCK, 7);
	m = expect(rig.node, DMU_FAULT);
	end(g, EIO);
	CHECK(now_ms() - start > 1500 && now_ms() - start < 8000);
	/* The answer that comes too late places nothing. */
	CHECK(answer(rig.node, map(m.id, 0, 1, 0, PLACE(0), DMU_WRITABLE)) == 0);
	m = expect(rig.node, DMU_MAP_ERROR);
	CHECK(m.block == 0 && m.code == ECANCELED);
	h = begin(&rig, READ_IT, 0, BLOCK, 7);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.flags == DMU_READ);
	CHECK(answer(rig.node, map(m.id, 0, 1, 1, 0, 0)) == 0);
	end(h, 0);
	close(rig.node);
	rig.node = -1;
	end(begin(&rig, WRITE_IT, 0, 1, 1), EIO);
	CHECK(stat_of("waiting") == 0);
	rig_down(&rig);
}

/* Puts a table with these features in place of the one in use. */
static void exchange(struct rig *rig, const char *features)
{
	CHECK(run("dmsetup load lab --table '0 %d userspace lab %d 2 %s ro:%s %s' && "
		  "dmsetup suspend --noflush --nolockfs lab && dmsetup resume lab", 64 * BLOCK, BLOCK,
		  rig->store, rig->base, features) == 0, "%s", said());
}

/* Flushes that nobody answers end as well, and are tried again; another table waits for ever. */
static void flush_timeout(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *f[2], *g;
	unsigned int seconds;
	char features[32];
	uint64_t began;

	rig.features = "2 fault_timeout 5";
	rig_up(&rig);
	g = begin(&rig, WRITE_IT, 0, BLOCK, 7);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 0, 1, 0, PLACE(0), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 1;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	f[0] = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect(rig.node, DMU_FLUSH);
	f[1] = begin(&rig, FLUSH_IT, 0, 1, 0);
	end(f[0], EIO);
	end(f[1], EIO);
	run("dmsetup status lab");
	CHECK(!strstr(said(), "flush-failed"), "%s", said());
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(begin(&rig, FLUSH_IT, 0, 1, 0), 0);
	/* What waits when the timeout goes is not failed with it; of the time that this takes here it has
	 * several times as much. */
	began = now_ms();
	exchange(&rig, "");
	seconds = 5 + (now_ms() - began) / 200;
	snprintf(features, sizeof(features), "2 fault_timeout %u", seconds);
	exchange(&rig, features);
	g = begin(&rig, WRITE_IT, BLOCK, BLOCK, 7);
	m = expect(rig.node, DMU_FAULT);
	exchange(&rig, "");
	sleep_ms(1000 * (seconds + 1));
	still_waits(g);
	CHECK(answer(rig.node, map(m.id, 1, 1, 0, PLACE(1), DMU_WRITABLE)) == 0);
	while (next_message(rig.node, &m, 500))
		if (m.type == DMU_FAULT)
			CHECK(answer(rig.node, map(m.id, 1, 1, 0, PLACE(1), DMU_WRITABLE)) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* A table with a smaller device: what is mapped past its end cannot be written, and says so. */
static void smaller_device(void)
{
	struct rig rig = plain();
	struct guest *g;

	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 32, 32, 0, PLACE(32), DMU_WRITABLE)) == 0);
	CHECK(run("dmsetup load lab --table '0 %d userspace lab %d 2 %s ro:%s' && "
		  "dmsetup suspend lab && dmsetup resume lab", 64 * BLOCK, BLOCK, rig.base,
		  rig.base) == 0, "%s", said());
	g = begin(&rig, WRITE_IT, 60 * BLOCK, BLOCK, 7);
	while (!g->done)
		sleep_ms(10);
	check_fill(g, 0, BLOCK * SECTOR, 7);
	end(g, EIO);
	g = begin(&rig, READ_IT, 60 * BLOCK, BLOCK, 0);
	end(g, 0);
	check_fill(g, 0, BLOCK * SECTOR, 0);
	rig_down(&rig);
}

/* Suspended without flush the questions go back to the core, and come again. */
static void suspend_noflush(void)
{
	struct rig rig = plain();
	struct dmu_message m, n;
	struct dmu_answer a;
	struct guest *g, *h, *f;

	rig_up(&rig);
	f = begin(&rig, WRITE_IT, 9 * BLOCK, BLOCK, 1);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 9, 1, 0, PLACE(9), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 1;
	CHECK(answer(rig.node, a) == 0);
	end(f, 0);
	g = begin(&rig, WRITE_IT, 2 * BLOCK, BLOCK, 5);
	m = expect(rig.node, DMU_FAULT);
	h = begin(&rig, READ_IT, 3 * BLOCK + 2, 2 * BLOCK, 5);
	sleep_ms(50);
	f = begin(&rig, FLUSH_IT, 0, 1, 0);
	sleep_ms(50);
	CHECK(run("dmsetup suspend --noflush --nolockfs lab") == 0, "%s", said());
	still_waits(g);
	/* Asked before the suspend, answered after: the placement comes to nothing. */
	a = map(m.id, 2, 1, 0, PLACE(2), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 2;
	CHECK(answer(rig.node, a) == 0);
	n = expect(rig.node, DMU_MAP_ERROR);
	CHECK(n.block == 2 && n.mark == 2 && n.code == ECANCELED);
	CHECK(answer(rig.node, map(0, 3, 1, 1, 3 * BLOCK, 0)) == 0);
	expect_silence(rig.node);
	CHECK(run("dmsetup resume lab") == 0, "%s", said());
	while (!(g->done && h->done && f->done)) {
		if (!next_message(rig.node, &m, 2000))
			continue;
		if (m.type == DMU_FLUSH)
			a = (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id };
		else if (m.flags & DMU_WRITE)
			a = map(m.id, m.block, 1, 0, PLACE(m.block), DMU_WRITABLE);
		else
			a = map(m.id, m.block, 1, 1, m.block * BLOCK, 0);
		CHECK(answer(rig.node, a) == 0, "type %u block %llu", m.type,
		      (unsigned long long)m.block);
	}
	end(g, 0);
	end(h, 0);
	end(f, 0);
	check_bytes(h, 0, 2 * BLOCK * SECTOR, 0, (3 * BLOCK + 2) * SECTOR);
	rig_down(&rig);
}

static void suspend_and_reload(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;
	int i;

	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	for (i = 0; i < 3; i++) {
		CHECK(run("dmsetup suspend lab") == 0, "%s", said());
		g = begin(&rig, READ_IT, 0, BLOCK, 0);
		still_waits(g);
		CHECK(run("dmsetup resume lab") == 0, "%s", said());
		end(g, 0);
	}
	/* With a fault outstanding a flushing suspend waits, and a signal ends the waiting. */
	g = begin(&rig, WRITE_IT, 5 * BLOCK, BLOCK, 3);
	m = expect(rig.node, DMU_FAULT);
	CHECK(run("timeout -s INT 1 dmsetup suspend --nolockfs lab") != 0);
	still_waits(g);
	CHECK(answer(rig.node, map(m.id, 5, 1, 0, PLACE(5), DMU_WRITABLE)) == 0);
	end(g, 0);
	/* Without a worker, with a fault: a larger table, the same mapping. */
	g = begin(&rig, WRITE_IT, 6 * BLOCK, BLOCK, 3);
	m = expect(rig.node, DMU_FAULT);
	close(rig.node);
	CHECK(run("dmsetup load lab --table '0 %d userspace lab %d 2 %s ro:%s'", 96 * BLOCK, BLOCK,
		  rig.store, rig.base) == 0, "%s", said());
	CHECK(run("dmsetup suspend --noflush lab && dmsetup resume lab") == 0, "%s", said());
	still_waits(g);
	rig.node = open(NODE, O_RDWR);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 6);
	CHECK(answer(rig.node, map(m.id, 6, 1, 0, PLACE(6), DMU_WRITABLE)) == 0);
	end(g, 0);
	g = begin(&rig, READ_IT, 4 * BLOCK, 4 * BLOCK, 0);
	end(g, 0);
	check_bytes(g, 0, BLOCK * SECTOR, 0, 4 * BLOCK * SECTOR);
	check_fill(g, BLOCK * SECTOR, 2 * BLOCK * SECTOR, 3);
	g = begin(&rig, READ_IT, 90 * BLOCK, 1, 0);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 90);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_ZERO, .id = m.id }) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* Removed by force with questions open: they fail, and nothing is left. */
static void remove_by_force(void)
{
	struct rig rig = plain();
	struct guest *g, *h;

	rig_up(&rig);
	g = begin(&rig, WRITE_IT, 0, BLOCK, 1);
	expect(rig.node, DMU_FAULT);
	h = begin(&rig, READ_IT, 5 * BLOCK, 3 * BLOCK, 1);
	sleep_ms(50);
	CHECK(run("dmsetup remove lab") != 0);
	run("dmsetup remove --force lab");
	end(g, EIO);
	end(h, EIO);
	close(rig.disk);
	run("dmsetup remove lab");
	CHECK(access(NODE, F_OK) != 0);
	close(rig.node);
	run("losetup -D");
}

/* A backing device that fails: at the copy's read, its write, the write, the flush. */
static void backing_errors(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;
	int step;

	rig.store_table = "linear %s 0";
	rig.base_table = "linear %s 0";
	rig_up(&rig);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	for (step = 0; step < 2; step++) {
		const char *sick = step ? "store" : "base";
		int healthy = step ? (64 + 32) * 2 * BLOCK : 64 * BLOCK;

		CHECK(run("dmsetup load %s --table '0 %d error' && dmsetup suspend %s && "
			  "dmsetup resume %s", sick, healthy, sick, sick) == 0, "%s", said());
		g = begin(&rig, WRITE_IT, 3 * BLOCK, 1, 1);
		m = expect(rig.node, DMU_FAULT);
		a = map(m.id, 3, 1, 0, PLACE(3), DMU_WRITABLE | DMU_COPY_FIRST | DMU_HOLD_FLUSH);
		a.from_device = 1;
		a.from_sector = 3 * BLOCK;
		a.mark = step + 1;
		CHECK(answer(rig.node, a) == 0);
		end(g, EIO);
		/* The write is sent beside the copy, whose failure is no device's. */
		if (step)
			CHECK(expect(rig.node, DMU_DEVICE_ERROR).device == 0);
		m = expect(rig.node, DMU_MAP_ERROR);
		CHECK(m.block == 3 && m.mark == a.mark && m.code == EIO);
		CHECK(stat_of("uncommitted") == 0);
		CHECK(run("dmsetup load %s --table '0 %d linear %s 0' && dmsetup suspend %s && "
			  "dmsetup resume %s", sick, healthy,
			  step ? rig.store_loop : rig.base_loop, sick, sick) == 0, "%s", said());
	}
	/* Nothing is mapped there now; the worker is asked again. */
	g = begin(&rig, READ_IT, 3 * BLOCK, 1, 1);
	m = expect(rig.node, DMU_FAULT);
	CHECK(m.block == 3);
	CHECK(answer(rig.node, map(m.id, 3, 1, 1, 3 * BLOCK, 0)) == 0);
	end(g, 0);
	check_bytes(g, 0, SECTOR, 0, 3 * BLOCK * SECTOR);
	/* Whole write, then the flush. */
	g = begin(&rig, WRITE_IT, 4 * BLOCK, BLOCK, 1);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 4, 1, 0, PLACE(4), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 7;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	/* The error target lets flushes pass; flakey fails them with the writes. */
	CHECK(run("dmsetup load store --table '0 %d flakey %s 0 0 9999 1 error_writes' && "
		  "dmsetup suspend store && dmsetup resume store", (64 + 32) * 2 * BLOCK,
		  rig.store_loop) == 0, "%s", said());
	end(begin(&rig, FLUSH_IT, 0, 1, 0), EIO);
	CHECK(run("dmsetup load store --table '0 %d linear %s 0' && dmsetup suspend store && "
		  "dmsetup resume store", (64 + 32) * 2 * BLOCK, rig.store_loop) == 0);
	/* It stays so until somebody has looked. */
	end(begin(&rig, FLUSH_IT, 0, 1, 0), EIO);
	run("dmsetup status lab");
	CHECK(strstr(said(), "flush-failed"));
	/* Whoever comes is told. */
	close(rig.node);
	rig.node = open(NODE, O_RDWR);
	CHECK(expect(rig.node, DMU_FLUSH_FAILED).code == EIO);
	CHECK(run("dmsetup message lab 0 clear_error") == 0);
	CHECK(expect(rig.node, DMU_FLUSH_FAILED).code == 0);
	g = begin(&rig, FLUSH_IT, 0, 1, 0);
	m = expect(rig.node, DMU_FLUSH);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* A mark that was given is not given again, whoever has heard of what became of it. */
static void marks_go_on(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;

	rig.store_table = "error";
	rig_up(&rig);
	g = begin(&rig, WRITE_IT, 0, BLOCK, 1);
	m = expect(rig.node, DMU_FAULT);
	a = map(m.id, 0, 1, 0, PLACE(0), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 7;
	CHECK(answer(rig.node, a) == 0);
	end(g, EIO);
	CHECK(stat_of("uncommitted") == 0);
	/* Nobody has read of it. */
	close(rig.node);
	rig.node = open(NODE, O_RDWR | O_CLOEXEC);
	CHECK(rig.node >= 0, "errno %d", errno);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_DUMP }) == 0);
	CHECK(expect(rig.node, DMU_DUMP_DONE).mark == 7);
	a = map(0, 9, 1, 0, PLACE(9), DMU_WRITABLE | DMU_HOLD_FLUSH);
	a.mark = 7;
	CHECK(answer(rig.node, a) == -ERANGE);
	/* There is always one after it. */
	a.mark = DMU_MAX_MARK + 1;
	CHECK(answer(rig.node, a) == -ERANGE);
	a.mark = 8;
	CHECK(answer(rig.node, a) == 0);
	rig_down(&rig);
}

/* What a file of the disk in sysfs says. */
static unsigned long long disk_file(const char *file)
{
	CHECK(run("cat /sys/block/$(dmsetup info -c --noheadings -o blkdevname lab)/%s", file) == 0,
	      "%s", said());
	return strtoull(said(), NULL, 10);
}

/* What those above the disk are told. */
static void hints(void)
{
	struct rig rig = plain();

	rig_up(&rig);
	CHECK(disk_file("queue/minimum_io_size") == BLOCK * 512);
	CHECK(disk_file("queue/optimal_io_size") == BLOCK * 512);
	CHECK(disk_file("queue/discard_granularity") == BLOCK * 512);
	CHECK(run("grep -qx 100 /sys/module/dm_userspace/parameters/copy_throttle") == 0);
	rig_down(&rig);
}

const struct scenario life_scenarios[] = {
	{ "marks-go-on", marks_go_on },
	{ "ctr-errors", ctr_errors },
	{ "node-life", node_life },
	{ "takeover", takeover },
	{ "fault-timeout", fault_timeout },
	{ "flush-timeout", flush_timeout },
	{ "smaller-device", smaller_device },
	{ "suspend-noflush", suspend_noflush },
	{ "suspend-and-reload", suspend_and_reload },
	{ "remove-by-force", remove_by_force },
	{ "backing-errors", backing_errors },
	{ "hints", hints },
	{ 0 },
};
