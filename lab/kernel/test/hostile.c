// SPDX-License-Identifier: Apache-2.0
/* Workers that lie, race, keep silent or write nonsense: refused, and nobody is harmed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include "lab.h"

#define BLOCK 16
#define PLACE(block) (32 * BLOCK + (block) * BLOCK)

static struct rig plain(void)
{
	return (struct rig){ .block = BLOCK, .sectors = 64 * BLOCK };
}

static uint64_t seed(void)
{
	const char *text = getenv("DMU_SEED");

	return text ? strtoull(text, NULL, 10) : 1;
}

static uint64_t next(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void lies(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g, *r;

	rig_up(&rig);
	g = begin(&rig, WRITE_IT, 5 * BLOCK, 1, 1);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, map(m.id + 1, 5, 1, 0, PLACE(5), DMU_WRITABLE)) == -ENOENT);
	CHECK(answer(rig.node, map(m.id, 6, 1, 0, PLACE(5), DMU_WRITABLE)) == -ERANGE);
	CHECK(answer(rig.node, map(m.id, 5, 0, 0, PLACE(5), DMU_WRITABLE)) == -ERANGE);
	CHECK(answer(rig.node, map(m.id, 5, 60, 0, PLACE(5), DMU_WRITABLE)) == -ERANGE);
	CHECK(answer(rig.node, map(m.id, 5, ~0ULL, 0, PLACE(5), DMU_WRITABLE)) == -ERANGE);
	CHECK(answer(rig.node, map(m.id, 5, 1, 0, 1 << 20, DMU_WRITABLE)) == -ERANGE);
	CHECK(answer(rig.node, map(m.id, 5, 1, 0, ~0ULL - 3, DMU_WRITABLE)) == -ERANGE);
	/* A write that fails takes its placement along: not that of acknowledged neighbours. */
	CHECK(answer(rig.node, map(m.id, 5, 2, 0, PLACE(5), DMU_WRITABLE)) == -ERANGE);
	CHECK(answer(rig.node, map(m.id, 5, 1, 2, PLACE(5), DMU_WRITABLE)) == -ENXIO);
	CHECK(answer(rig.node, map(m.id, 5, 1, DMU_DEVICE_ZERO, 0, DMU_WRITABLE)) == -EROFS);
	CHECK(answer(rig.node, map(m.id, 5, 1, 0, PLACE(5), 0)) == -EINVAL);
	CHECK(answer(rig.node, map(m.id, 5, 1, 0, PLACE(5), 0x80 | DMU_WRITABLE)) == -EINVAL);
	CHECK(answer(rig.node, map(m.id, 5, 1, 0, PLACE(5),
				   DMU_WRITABLE | DMU_COPY_FIRST | DMU_ZERO_FIRST)) == -EINVAL);
	CHECK(answer(rig.node, map(m.id, 5, 2, 0, PLACE(5),
				   DMU_WRITABLE | DMU_ZERO_FIRST)) == -EINVAL);
	a = map(m.id, 5, 1, 0, PLACE(5), DMU_WRITABLE | DMU_COPY_FIRST);
	a.from_device = 9;
	CHECK(answer(rig.node, a) == -ENXIO);
	a = map(m.id, 5, 1, 0, PLACE(5), DMU_WRITABLE);
	a.mark = 4;
	CHECK(answer(rig.node, a) == -EINVAL);
	a.mark = 0;
	a.reserved[1] = 1;
	CHECK(answer(rig.node, a) == -EINVAL);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = 99, .id = m.id }) == -EINVAL);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_ZERO, .id = m.id }) == -ENOENT);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_DONE, .id = m.id, .count = 1 }) == -ENOENT);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m.id }) ==
	      -ENOENT);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_FAIL, .id = m.id }) == -EINVAL);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_FAIL, .id = m.id, .code = 100000 }) == -EINVAL);
	CHECK(answer(rig.node, (struct dmu_answer){
		.type = DMU_INVALIDATE, .block = 60, .count = 5 }) == -ERANGE);
	still_waits(g);
	a = map(m.id, 5, 1, 0, PLACE(5), DMU_WRITABLE | DMU_ZERO_FIRST | DMU_HOLD_FLUSH);
	a.mark = 4;
	CHECK(answer(rig.node, a) == 0);
	end(g, 0);
	CHECK(answer(rig.node, a) == -ERANGE);
	a.mark = 5;
	CHECK(answer(rig.node, a) == -ENOENT);
	/* What is mapped writable, or uncommitted, is not moved. */
	CHECK(answer(rig.node, map(0, 5, 1, 0, PLACE(6), DMU_WRITABLE)) == -EEXIST);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == -EEXIST);
	CHECK(answer(rig.node, map(0, 5, 1, 0, PLACE(5), 0)) == -EEXIST);
	CHECK(answer(rig.node, map(0, 5, 1, 0, PLACE(5), DMU_WRITABLE)) == 0);
	r = begin(&rig, READ_IT, 5 * BLOCK, 2, 0);
	end(r, 0);
	check_fill(r, 0, SECTOR, 1);
	check_fill(r, SECTOR, SECTOR, 0);
	expect_silence(rig.node);
	rig_down(&rig);
}

/* Each answer of a batch has its own result; write(2) stops at the first refused. */
static void batches(void)
{
	struct rig rig = plain();
	struct dmu_answer list[8];
	struct dmu_batch batch;
	struct dmu_message m;
	struct guest *g;
	int i;

	rig_up(&rig);
	for (i = 0; i < 8; i++)
		list[i] = map(0, i, 1, i % 3 == 1 ? 5 : 1, i * BLOCK, 0);
	CHECK(answers(rig.node, list, 8) == 3);
	for (i = 0; i < 8; i++)
		CHECK(list[i].result == (i % 3 == 1 ? -ENXIO : 0));
	CHECK(write(rig.node, list, sizeof(list)) == sizeof(*list));
	CHECK(write(rig.node, list + 1, 7 * sizeof(*list)) == -1 && errno == ENXIO);
	CHECK(write(rig.node, list + 2, 6 * sizeof(*list)) == 2 * sizeof(*list));
	CHECK(write(rig.node, list, 50) == -1 && errno == EINVAL);
	batch = (struct dmu_batch){ .answers = 8, .count = 1 };
	CHECK(ioctl(rig.node, DMU_IOC_ANSWER, &batch) == -1 && errno == EFAULT);
	batch.count = DMU_MAX_BATCH + 1;
	CHECK(ioctl(rig.node, DMU_IOC_ANSWER, &batch) == -1 && errno == EINVAL);
	CHECK(ioctl(rig.node, 0x1234, &batch) == -1 && errno == ENOTTY);
	/* A fault that cannot be handed over is not lost. */
	g = begin(&rig, READ_IT, 20 * BLOCK, 1, 0);
	sleep_ms(50);
	CHECK(syscall(SYS_read, rig.node, 8L, 4096L) == -1 && errno == EFAULT);
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, map(m.id, 20, 1, 1, 20 * BLOCK, 0)) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* Structures of another size than the module's: what is longer has to say nothing it does not know. */
static void sizes(void)
{
	struct rig rig = plain();
	struct longer { struct dmu_answer a; uint64_t more[2]; } list[3];
	struct { struct dmu_batch batch; uint64_t more; } large;
	struct { struct dmu_abi abi; uint64_t more; } abi;
	struct { struct dmu_message m; uint64_t more[2]; } m;
	struct dmu_message shorter;
	unsigned int i;

	rig_up(&rig);
	memset(&abi, 0, sizeof(abi));
	CHECK(ioctl(rig.node, DMU_IOC_ABI, &abi) == 0, "errno %d", errno);
	CHECK(abi.abi.version == DMU_VERSION && abi.abi.message_size == 64 &&
	      abi.abi.message_known == sizeof(struct dmu_message) &&
	      abi.abi.answer_known == sizeof(struct dmu_answer));
	CHECK(abi.abi.features & DMU_FEATURE_GRANTS);
	/* A caller that knows less, and one that knows more. */
	memset(&abi, 0, sizeof(abi));
	CHECK(ioctl(rig.node, _IOC(_IOC_READ | _IOC_WRITE, 'u', 0xd1, 8), &abi) == 0);
	CHECK(abi.abi.version == DMU_VERSION && !abi.abi.answer_known);
	CHECK(ioctl(rig.node, _IOC(_IOC_READ | _IOC_WRITE, 'u', 0xd1, sizeof(abi)), &abi) == 0);
	abi.more = 1;
	CHECK(ioctl(rig.node, _IOC(_IOC_READ | _IOC_WRITE, 'u', 0xd1, sizeof(abi)), &abi) == -1 &&
	      errno == E2BIG);
	/* Answers. */
	for (i = 0; i < 3; i++) {
		memset(&list[i], 0, sizeof(list[i]));
		list[i].a = map(0, i, 1, 1, i * BLOCK, 0);
	}
	list[1].more[1] = 1;
	memset(&large, 0, sizeof(large));
	large.batch = (struct dmu_batch){ .answers = (uintptr_t)list, .count = 3,
					  .answer_size = sizeof(*list) };
	CHECK(ioctl(rig.node, DMU_IOC_ANSWER_OF(sizeof(large)), &large) == 0, "errno %d", errno);
	CHECK(large.batch.refused == 1 && list[0].a.result == 0 && list[1].a.result == -E2BIG &&
	      list[2].a.result == 0);
	/* One that is refused so ends its chain as any other. */
	list[0].a.flags = list[1].a.flags = DMU_LINKED;
	CHECK(ioctl(rig.node, DMU_IOC_ANSWER_SIZED, &large) == 0);
	CHECK(large.batch.refused == 2 && list[2].a.result == -ECANCELED);
	large.more = 1;
	CHECK(ioctl(rig.node, DMU_IOC_ANSWER_OF(sizeof(large)), &large) == -1 && errno == E2BIG);
	for (i = 0; i < 4; i++) {
		static const uint32_t wrong[] = { 8, 88, 97, DMU_MAX_RECORD + 8 };

		large.batch.answer_size = wrong[i];
		CHECK(ioctl(rig.node, DMU_IOC_ANSWER_SIZED, &large) == -1 && errno == EINVAL);
	}
	large.batch.answer_size = 0;
	large.batch.count = 1;
	CHECK(ioctl(rig.node, DMU_IOC_ANSWER_SIZED, &large) == 0);
	large.batch.reserved = 1;
	CHECK(ioctl(rig.node, DMU_IOC_ANSWER_SIZED, &large) == -1 && errno == EINVAL);
	CHECK(ioctl(rig.node, DMU_IOC_ANSWER_OF(8), &large) == -1 && errno == EINVAL);
	/* Messages. */
	for (i = 0; i < 3; i++) {
		static const uint32_t wrong[] = { 56, 68, DMU_MAX_RECORD + 8 };

		abi.abi.message_size = wrong[i];
		CHECK(ioctl(rig.node, DMU_IOC_ABI, &abi) == -1 && errno == EINVAL);
	}
	abi.abi.message_size = sizeof(m);
	CHECK(ioctl(rig.node, DMU_IOC_ABI, &abi) == 0 && abi.abi.message_size == sizeof(m));
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GET_VERSION }) == 0);
	CHECK(read(rig.node, &m, sizeof(m) - 8) == -1 && errno == EINVAL);
	memset(&m, 0xff, sizeof(m));
	CHECK(read(rig.node, &m, sizeof(m)) == sizeof(m));
	CHECK(m.m.type == DMU_VERSION_IS && !m.more[0] && !m.more[1]);
	/* The next opener has not asked for that. */
	close(rig.node);
	rig.node = open(NODE, O_RDWR | O_CLOEXEC);
	CHECK(answer(rig.node, (struct dmu_answer){ .type = DMU_GET_VERSION }) == 0);
	CHECK(read(rig.node, &shorter, sizeof(shorter)) == sizeof(shorter) &&
	      shorter.type == DMU_VERSION_IS);
	rig_down(&rig);
}

/* Random bytes for answers, while guests read and write and an honest worker keeps up. */
static void nonsense(void)
{
	struct rig rig = plain();
	uint64_t state = seed() * 2654435761u + 1;
	struct guest *g[4] = { 0 };
	struct dmu_answer a;
	struct dmu_message m;
	uint64_t known[16] = { 0 };
	unsigned int i, round, accepted = 0;
	uint8_t *bytes = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	printf("# seed %llu\n", (unsigned long long)seed());
	rig_up(&rig);
	for (round = 0; round < 6000; round++) {
		i = next(&state) % 4;
		if (!g[i])
			g[i] = begin(&rig, next(&state) % 6, next(&state) % (60 * BLOCK),
				     1 + next(&state) % (3 * BLOCK), round);
		if (g[i]->done) {
			pthread_join(g[i]->thread, NULL);
			free(g[i]->data);
			free(g[i]);
			g[i] = NULL;
		}
		while (next_message(rig.node, &m, 0))
			known[next(&state) % 16] = m.id;
		memset(&a, 0, sizeof(a));
		a.type = next(&state) % 14;
		a.flags = next(&state) & next(&state) & (next(&state) % 8 ? 0x7f : ~0u);
		a.id = next(&state) % 4 ? known[next(&state) % 16] : next(&state) % 3;
		a.block = next(&state) % 8 ? next(&state) % 66 : next(&state);
		a.count = next(&state) % 8 ? 1 + next(&state) % 3 : next(&state);
		a.sector = next(&state) % 8 ? next(&state) % (200 * BLOCK) : next(&state);
		a.from_sector = next(&state) % 8 ? next(&state) % (70 * BLOCK) : next(&state);
		a.mark = next(&state) % 4 ? 0 : round + 1;
		a.device = next(&state) % 8 ? next(&state) % 3 : next(&state);
		a.from_device = next(&state) % 3;
		a.address = next(&state) % 4 ? (uintptr_t)bytes : next(&state);
		a.length = next(&state) % 4 ? SECTOR * (1 + next(&state) % 40) : next(&state);
		a.offset = next(&state) % 4 ? 0 : next(&state);
		a.code = next(&state) % 2 ? EIO : next(&state);
		accepted += answer(rig.node, a) == 0;
		if (next(&state) % 500 == 0) {
			close(rig.node);
			rig.node = open(NODE, O_RDWR);
			CHECK(rig.node >= 0);
		}
	}
	for (i = 0; i < 4; i++) {
		uint64_t until = now_ms() + 20000;

		while (g[i] && !g[i]->done) {
			CHECK(now_ms() < until, "a request is lost");
			run("dmsetup message lab 0 fail_faults");
			if (next_message(rig.node, &m, 20) && m.type == DMU_FLUSH)
				answer(rig.node, (struct dmu_answer){
					.type = DMU_FAIL, .id = m.id, .code = EIO });
		}
		if (g[i])
			pthread_join(g[i]->thread, NULL);
	}
	printf("# %u of %u accepted\n", accepted, round);
	CHECK(stat_of("waiting") < 20);
	rig_down(&rig);
}

struct racer {
	int node;
	uint64_t seed;
	volatile bool stop;
	pthread_t thread;
};

/* One of several that answer what they can, on the same descriptor. */
static void *race(void *argument)
{
	struct racer *racer = argument;
	struct dmu_message m;

	while (!racer->stop) {
		struct dmu_answer a;

		if (!next_message(racer->node, &m, 10))
			continue;
		if (m.type != DMU_FAULT)
			continue;
		if (m.flags & DMU_WRITE)
			a = map(m.id, m.block, 1, 0, PLACE(m.block), DMU_WRITABLE | DMU_COPY_FIRST);
		else
			a = map(m.id, m.block, 1, 1, m.block * BLOCK, 0);
		a.from_device = 1;
		a.from_sector = m.block * BLOCK;
		answer(racer->node, a);
		answer(racer->node, a);
		if (next(&racer->seed) % 4 == 0)
			answer(racer->node, (struct dmu_answer){
				.type = DMU_INVALIDATE, .block = 62, .count = 2 });
	}
	return NULL;
}

static void two_workers(void)
{
	struct rig rig = plain();
	struct racer racers[2];
	struct guest *g[6];
	int i, round, node;

	rig_up(&rig);
	/* The node has one opener; its descriptor may be in several hands. */
	CHECK(open(NODE, O_RDWR) == -1 && errno == EBUSY);
	node = dup(rig.node);
	CHECK(fcntl(node, F_SETFL, O_NONBLOCK) == 0);
	for (i = 0; i < 2; i++) {
		racers[i] = (struct racer){ .node = i ? node : rig.node, .seed = seed() + i };
		fcntl(racers[i].node, F_SETFL, 0);
		CHECK(pthread_create(&racers[i].thread, NULL, race, &racers[i]) == 0);
	}
	for (round = 0; round < 20; round++) {
		for (i = 0; i < 6; i++)
			g[i] = begin(&rig, i % 2 ? READ_IT : WRITE_IT,
				     (round * 3 + i / 2) % 60 * BLOCK + 1, i % 3 * BLOCK + 2, 7);
		for (i = 0; i < 6; i++) {
			end(g[i], 0);
			free(g[i]->data);
			free(g[i]);
		}
	}
	for (i = 0; i < 2; i++)
		racers[i].stop = true;
	/* A reader that lost the race sleeps in read(2): one more fault a racer wakes it. */
	for (i = 0; i < 2; i++) {
		g[i] = begin(&rig, READ_IT, (60 + i) * BLOCK, 1, 0);
		sleep_ms(50);
	}
	while (!g[0]->done || !g[1]->done)
		if (run("dmsetup message lab 0 fail_faults") != 0)
			break;
	for (i = 0; i < 2; i++)
		pthread_cancel(racers[i].thread);
	for (i = 0; i < 2; i++)
		pthread_join(racers[i].thread, NULL);
	close(node);
	rig_down(&rig);
}

/* The node is opened and closed as fast as can be while requests come and go. */
static void open_race(void)
{
	struct rig rig = plain();
	struct dmu_message m;
	struct guest *g;
	int i;

	rig_up(&rig);
	g = begin(&rig, WRITE_IT, 3 * BLOCK, BLOCK, 1);
	for (i = 0; i < 300; i++) {
		m = expect(rig.node, DMU_FAULT);
		CHECK(m.block == 3);
		close(rig.node);
		rig.node = open(NODE, O_RDWR);
		CHECK(rig.node >= 0);
	}
	m = expect(rig.node, DMU_FAULT);
	CHECK(answer(rig.node, map(m.id, 3, 1, 0, PLACE(3), DMU_WRITABLE)) == 0);
	end(g, 0);
	rig_down(&rig);
}

/* Allocations fail: answers are refused with ENOMEM at worst, requests are not lost. */
static void no_memory(void)
{
	struct rig rig = plain();
	unsigned int refused = 0, i;
	int own;
	struct dmu_message m;
	struct dmu_answer a;
	struct guest *g;

	if (run("test -e /sys/kernel/debug/failslab") != 0) {
		printf("# no failslab in this kernel\n");
		return;
	}
	rig_up(&rig);
	CHECK(run("cd /sys/kernel/debug/failslab && echo 1 > task-filter && echo 0 > verbose && "
		  "echo 0 > ignore-gfp-wait && echo -1 > times && echo 40 > probability") == 0);
	own = open("/proc/self/make-it-fail", O_RDWR);
	CHECK(own >= 0);
	CHECK(answer(rig.node, map(0, 0, 64, 1, 0, 0)) == 0);
	for (i = 0; i < 60; i++) {
		int result;

		g = begin(&rig, WRITE_IT, i * BLOCK, 2, i + 1);
		m = expect(rig.node, DMU_FAULT);
		a = map(m.id, i, 1, 0, PLACE(i), DMU_WRITABLE | DMU_ZERO_FIRST | DMU_HOLD_FLUSH);
		a.mark = i + 1;
		CHECK(pwrite(own, "1", 1, 0) == 1);
		do {
			result = answer(rig.node, a);
			refused += result != 0;
		} while (result == -ENOMEM || result == -ENOBUFS);
		while (pwrite(own, "0", 1, 0) != 1)
			;
		CHECK(result == 0, "%d", result);
		end(g, 0);
	}
	close(own);
	run("echo 0 > /sys/kernel/debug/failslab/probability");
	printf("# %u answers refused for memory\n", refused);
	g = begin(&rig, READ_IT, 0, 60 * BLOCK, 0);
	end(g, 0);
	for (i = 0; i < 60; i++) {
		check_fill(g, i * BLOCK * SECTOR, 2 * SECTOR, i + 1);
		check_fill(g, (i * BLOCK + 2) * SECTOR, (BLOCK - 2) * SECTOR, 0);
	}
	rig_down(&rig);
}

/* A worker that is killed within a batch leaves the node after the answer at hand. */
static void killed_batch(void)
{
	static struct dmu_answer list[DMU_MAX_BATCH];
	static uint8_t bytes[1 << 16] __attribute__((aligned(4096)));
	struct rig rig = plain();
	uint64_t done;
	pid_t child;
	int node, i;

	rig.quiet = true;
	rig_up(&rig);
	for (i = 0; i < DMU_MAX_BATCH; i++)
		list[i] = (struct dmu_answer){
			.type = DMU_DATA, .device = 0, .sector = PLACE(0),
			.address = (uintptr_t)bytes, .length = sizeof(bytes) };
	child = fork();
	if (!child) {
		node = open(NODE, O_RDWR);
		answers(node, list, DMU_MAX_BATCH);
		_exit(0);
	}
	while (stat_of("answers") < 8)
		sleep_ms(1);
	kill(child, SIGKILL);
	CHECK(waitpid(child, NULL, 0) == child);
	done = stat_of("answers") + stat_of("refused");
	printf("# %llu of %d answers were looked at\n", (unsigned long long)done, DMU_MAX_BATCH);
	CHECK(done < DMU_MAX_BATCH);
	node = open(NODE, O_RDWR);
	CHECK(node >= 0, "the next worker does not get the node: %s", strerror(errno));
	close(node);
	rig_down(&rig);
}

const struct scenario hostile_scenarios[] = {
	{ "lies", lies },
	{ "batches", batches },
	{ "sizes", sizes },
	{ "nonsense", nonsense },
	{ "two-workers", two_workers },
	{ "open-race", open_race },
	{ "no-memory", no_memory },
	{ "killed-batch", killed_batch },
	{ 0 },
};
