// SPDX-License-Identifier: Apache-2.0
/* See lab.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "lab.h"

#define DEADLINE 20000

static char output[65536];

void fail(const char *file, int line, const char *what, const char *format, ...)
{
	va_list arguments;

	printf("%s:%d: %s:", strrchr(file, '/') ? strrchr(file, '/') + 1 : file, line, what);
	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	printf("\n");
	fflush(stdout);
	run("[ ! -e " STOPS " ] || { cat " STOPS "; echo release >" STOPS "; }");
	printf("%s\n", said());
	run("dmsetup status; dmsetup table; dmsetup message lab 0 stats");
	printf("%s\n", said());
	fflush(stdout);
	/* More than once: a thread that has ended a request may begin another one before it is gone. */
	run("for i in 1 2 3 4 5; do dmsetup message lab 0 fail_faults; sleep 0.5; done "
	    ">/dev/null &");
	_exit(1);
}

int run(const char *format, ...)
{
	char command[4096];
	va_list arguments;
	size_t length;
	FILE *pipe;
	int status;

	va_start(arguments, format);
	length = vsnprintf(command, sizeof(command), format, arguments);
	va_end(arguments);
	snprintf(command + length, sizeof(command) - length, " 2>&1");
	pipe = popen(command, "re");
	length = fread(output, 1, sizeof(output) - 1, pipe);
	output[length] = 0;
	status = pclose(pipe);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

const char *said(void)
{
	return output;
}

/* Whether its request has ended: its thread may have to wait for the processor. */
bool ended(const struct guest *guest)
{
	for (int i = 0; i < 50 && !guest->done; i++)
		sleep_ms(10);
	return guest->done;
}

uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void sleep_ms(int milliseconds)
{
	usleep(milliseconds * 1000);
}

uint8_t pattern(int device, uint64_t offset)
{
	uint64_t sector = offset / SECTOR;

	return (uint8_t)(offset * 7 + sector * 31 + (device ? 0x80 : 0x11)) | 1;
}

static void make_loop(const char *name, char *loop, uint64_t sectors, int device)
{
	uint8_t *data = malloc(sectors * SECTOR);
	char path[64];
	uint64_t i;
	int file;

	snprintf(path, sizeof(path), "/mnt/%s.img", name);
	file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	CHECK(file >= 0);
	for (i = 0; i < sectors * SECTOR; i++)
		data[i] = pattern(device, i);
	CHECK(write(file, data, sectors * SECTOR) == (ssize_t)(sectors * SECTOR));
	close(file);
	free(data);
	CHECK(run("losetup --show -f %s", path) == 0, "%s", said());
	snprintf(loop, 32, "%.*s", (int)strcspn(said(), "\n"), said());
}

static void make_layer(const char *name, const char *table, const char *loop, uint64_t sectors,
		       char *device)
{
	char line[256];

	if (!table) {
		strcpy(device, loop);
		return;
	}
	snprintf(line, sizeof(line), table, loop);
	CHECK(run("dmsetup create %s --table '0 %llu %s'", name, (unsigned long long)sectors,
		  line) == 0, "%s", said());
	snprintf(device, 32, "/dev/mapper/%s", name);
}

void rig_up(struct rig *rig)
{
	uint64_t base = rig->base_sectors ? rig->base_sectors : rig->sectors;
	uint64_t store = (rig->sectors + 32 * rig->block) * 2;

	make_loop("base", rig->base_loop, base, 0);
	make_loop("store", rig->store_loop, store, 1);
	make_layer("base", rig->base_table, rig->base_loop, base, rig->base);
	make_layer("store", rig->store_table, rig->store_loop, store, rig->store);
	CHECK(run("dmsetup create lab --table '0 %llu userspace lab %u 2 %s ro:%s %s'",
		  (unsigned long long)rig->sectors, rig->block, rig->store, rig->base,
		  rig->features ? rig->features : "") == 0, "%s", said());
	rig->node = -1;
	if (!rig->quiet) {
		rig->node = open(NODE, O_RDWR | O_CLOEXEC);
		CHECK(rig->node >= 0, "errno %d", errno);
	}
	rig->disk = open(DISK, O_RDWR | O_DIRECT | O_CLOEXEC);
	CHECK(rig->disk >= 0, "errno %d", errno);
}

void rig_down_but_loops(struct rig *rig)
{
	close(rig->disk);
	CHECK(run("dmsetup remove lab") == 0, "%s", said());
	if (rig->node >= 0)
		close(rig->node);
	if (rig->store_table)
		CHECK(run("dmsetup remove store") == 0, "%s", said());
	if (rig->base_table)
		CHECK(run("dmsetup remove base") == 0, "%s", said());
}

void rig_down(struct rig *rig)
{
	rig_down_but_loops(rig);
	CHECK(run("losetup -d %s %s", rig->store_loop, rig->base_loop) == 0, "%s", said());
	run("rm -f /mnt/base.img /mnt/store.img");
}

bool next_message(int node, struct dmu_message *message, int milliseconds)
{
	struct pollfd wait = { .fd = node, .events = POLLIN };
	ssize_t size;

	if (poll(&wait, 1, milliseconds) != 1 || !(wait.revents & POLLIN))
		return false;
	size = read(node, message, sizeof(*message));
	CHECK(size == sizeof(*message), "read gave %zd, errno %d", size, errno);
	return true;
}

/* Guests' requests under way that end with a flush. */
static unsigned int flushing;

static bool flushes(enum guest_op op)
{
	return op == FLUSH_IT || op == WRITE_SYNC;
}

bool put_off(int node, const struct dmu_message *message, uint32_t type)
{
	if (message->type != DMU_FLUSH || type == DMU_FLUSH ||
	    __atomic_load_n(&flushing, __ATOMIC_SEQ_CST))
		return false;
	CHECK(answer(node, (struct dmu_answer){ .type = DMU_FAIL, .id = message->id,
						.code = EAGAIN }) == 0);
	return true;
}

struct dmu_message expect(int node, uint32_t type)
{
	struct dmu_message message;

	do {
		CHECK(next_message(node, &message, DEADLINE), "no message; expected type %u", type);
	} while (put_off(node, &message, type));
	CHECK(message.type == type, "expected type %u, got %u (id %llu block %llu code %d)", type,
	      message.type, (unsigned long long)message.id, (unsigned long long)message.block,
	      message.code);
	return message;
}

void expect_silence(int node)
{
	struct dmu_message message;

	CHECK(!next_message(node, &message, 100), "a message of type %u, block %llu", message.type,
	      (unsigned long long)message.block);
}

int answers(int node, struct dmu_answer *list, uint32_t count)
{
	struct dmu_batch batch = { .answers = (uintptr_t)list, .count = count };

	CHECK(ioctl(node, DMU_IOC_ANSWER, &batch) == 0, "errno %d", errno);
	return batch.refused;
}

int answer(int node, struct dmu_answer a)
{
	answers(node, &a, 1);
	return a.result;
}

struct dmu_answer map(uint64_t id, uint64_t block, uint64_t count, unsigned int device,
		      uint64_t sector, uint32_t flags)
{
	return (struct dmu_answer){
		.type = DMU_MAP, .flags = flags, .id = id, .block = block, .count = count,
		.device = device, .sector = sector,
	};
}

uint64_t stat_of(const char *name)
{
	char key[64], *at;

	CHECK(run("dmsetup message lab 0 stats") == 0, "%s", said());
	snprintf(key, sizeof(key), "%s=", name);
	at = strstr(output, key);
	CHECK(at, "no %s in %s", name, output);
	return strtoull(at + strlen(key), NULL, 10);
}

uint64_t extents_of(void)
{
	unsigned long long extents;

	CHECK(run("dmsetup status lab") == 0, "%s", said());
	CHECK(sscanf(said(), "%*u %*u userspace %*s %*s %*s %llu", &extents) == 1, "%s", said());
	return extents;
}

void make_forget(uint64_t extents)
{
	int i;

	for (i = 0; i < 100 && extents_of() > extents; i++)
		CHECK(run("echo 2 >/proc/sys/vm/drop_caches") == 0, "%s", said());
	CHECK(i < 100, "%llu extents stay", (unsigned long long)extents_of());
}

static void *guest_main(void *argument)
{
	struct guest *guest = argument;
	uint64_t range[2] = { guest->sector * SECTOR, (uint64_t)guest->count * SECTOR };
	size_t size = guest->count * SECTOR;
	ssize_t done = 0;

	errno = 0;
	if (guest->op == READ_IT)
		done = pread(guest->disk, guest->data, size, range[0]);
	else if (guest->op == WRITE_IT)
		done = pwrite(guest->disk, guest->data, size, range[0]);
	else if (guest->op == FLUSH_IT)
		done = fsync(guest->disk) ? -1 : (ssize_t)size;
	else if (guest->op == DISCARD_IT)
		done = ioctl(guest->disk, BLKDISCARD, range) ? -1 : (ssize_t)size;
	else if (guest->op == ZERO_IT)
		done = ioctl(guest->disk, BLKZEROOUT, range) ? -1 : (ssize_t)size;
	if (guest->op == WRITE_NOWAIT) {
		struct iovec all = { guest->data, size };

		done = pwritev2(guest->disk, &all, 1, range[0], RWF_NOWAIT);
	}
	if (guest->op == WRITE_SYNC) {
		int disk = open(DISK, O_RDWR | O_DIRECT | O_DSYNC);

		done = pwrite(disk, guest->data, size, range[0]);
		guest->error = errno;
		close(disk);
		errno = guest->error;
	}
	guest->error = done == (ssize_t)size ? 0 : errno ? errno : EIO;
	if (flushes(guest->op))
		__atomic_sub_fetch(&flushing, 1, __ATOMIC_SEQ_CST);
	guest->done = true;
	return NULL;
}

struct guest *begin(struct rig *rig, enum guest_op op, uint64_t sector, uint32_t count,
		    uint8_t fill)
{
	struct guest *guest = calloc(1, sizeof(*guest));

	guest->op = op;
	guest->disk = rig->disk;
	guest->sector = sector;
	guest->count = count;
	guest->fill = fill;
	CHECK(posix_memalign((void **)&guest->data, 4096, count * SECTOR + 4096) == 0);
	memset(guest->data, fill, count * SECTOR);
	if (flushes(op))
		__atomic_add_fetch(&flushing, 1, __ATOMIC_SEQ_CST);
	CHECK(pthread_create(&guest->thread, NULL, guest_main, guest) == 0);
	return guest;
}

void end(struct guest *guest, int error)
{
	uint64_t until = now_ms() + DEADLINE;

	while (!guest->done) {
		CHECK(now_ms() < until, "request %d of sector %llu does not end", guest->op,
		      (unsigned long long)guest->sector);
		sleep_ms(1);
	}
	pthread_join(guest->thread, NULL);
	CHECK(guest->error == error, "request %d of sector %llu ended with %d, not %d", guest->op,
	      (unsigned long long)guest->sector, guest->error, error);
}

void still_waits(struct guest *guest)
{
	sleep_ms(50);
	CHECK(!guest->done, "request %d of sector %llu has ended with %d", guest->op,
	      (unsigned long long)guest->sector, guest->error);
}

void check_bytes(struct guest *guest, uint64_t from, uint64_t count, int device, uint64_t offset)
{
	uint64_t i;

	for (i = 0; i < count; i++)
		CHECK(guest->data[from + i] == pattern(device, offset + i),
		      "byte %llu is %02x, should be %02x", (unsigned long long)(from + i),
		      guest->data[from + i], pattern(device, offset + i));
}

void check_fill(struct guest *guest, uint64_t from, uint64_t count, uint8_t fill)
{
	uint64_t i;

	for (i = 0; i < count; i++)
		CHECK(guest->data[from + i] == fill, "byte %llu is %02x, should be %02x",
		      (unsigned long long)(from + i), guest->data[from + i], fill);
}

void peek(const char *device, uint64_t sector, uint32_t count, uint8_t *data)
{
	int file = open(device, O_RDONLY | O_DIRECT);
	uint8_t *aligned;

	CHECK(file >= 0, "%s: errno %d", device, errno);
	CHECK(posix_memalign((void **)&aligned, 4096, count * SECTOR) == 0);
	CHECK(pread(file, aligned, count * SECTOR, sector * SECTOR) == (ssize_t)(count * SECTOR));
	memcpy(data, aligned, count * SECTOR);
	free(aligned);
	close(file);
}
