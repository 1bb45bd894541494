// SPDX-License-Identifier: Apache-2.0
/*
 * trace ONE OTHER SEED TRACES: random traces of requests (writes of any length, discards, writes
 * of zeroes, flushes, reads), each done on two devices that began alike. After each trace what
 * it touched has to be the same on both; at the end, everything.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define MOST 512		/* sectors of a request */
#define REQUESTS 20

static uint64_t state, sectors;
static int disks[2];
static uint8_t *data, *other;
static int trace;

static uint32_t chance(uint64_t below)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return (state >> 33) % below;
}

static void die(const char *what)
{
	printf("trace %d: %s: %s\n", trace, what, strerror(errno));
	exit(1);
}

static void compare(uint64_t sector, uint32_t count)
{
	size_t size = count * 512ul, i;

	if (pread(disks[0], data, size, sector * 512) != (ssize_t)size ||
	    pread(disks[1], other, size, sector * 512) != (ssize_t)size)
		die("read");
	if (!memcmp(data, other, size))
		return;
	for (i = 0; data[i] == other[i]; i++)
		;
	printf("trace %d: sector %llu differs: %02x and %02x\n", trace,
	       (unsigned long long)(sector + i / 512), data[i], other[i]);
	exit(1);
}

static void both(unsigned int kind, uint64_t sector, uint32_t count)
{
	uint64_t range[2] = { sector * 512, count * 512ull };
	size_t size = count * 512ul;
	int i;

	for (i = 0; i < 2; i++) {
		if (kind == 0 && pwrite(disks[i], data, size, range[0]) != (ssize_t)size)
			die("write");
		if (kind == 1 && ioctl(disks[i], BLKDISCARD, range))
			die("discard");
		if (kind == 2 && ioctl(disks[i], BLKZEROOUT, range))
			die("write zeroes");
		if (kind == 3 && fsync(disks[i]))
			die("flush");
	}
}

static void one_trace(void)
{
	static const unsigned int kinds[] = { 0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 3, 4 };
	/* Close together, so that they meet. */
	uint64_t around = chance(sectors - 4 * MOST);
	unsigned int i;

	for (i = 0; i < REQUESTS; i++) {
		unsigned int kind = kinds[chance(sizeof(kinds) / sizeof(*kinds))];
		uint32_t count = 1 + chance(chance(3) ? 16 : MOST);
		uint64_t sector = around + chance(3 * MOST);

		if (!chance(4)) {
			/* Whole blocks of the usual size. */
			sector &= ~127ull;
			count = 128 * (1 + chance(3));
		}
		if (sector + count > sectors)
			continue;
		memset(data, 1 + chance(255), count * 512ul);
		if (kind == 4)
			compare(sector, count);
		else
			both(kind, sector, count);
	}
	for (i = 0; i < 4 && around + (i + 1) * MOST <= sectors; i++)
		compare(around + i * MOST, MOST);
}

int main(int argc, char **argv)
{
	int traces, i;
	uint64_t size[2], at;

	if (argc != 5) {
		fprintf(stderr, "usage: trace ONE OTHER SEED TRACES\n");
		return 2;
	}
	for (i = 0; i < 2; i++) {
		disks[i] = open(argv[1 + i], O_RDWR | O_DIRECT);
		if (disks[i] < 0 || ioctl(disks[i], BLKGETSIZE64, &size[i]))
			die(argv[1 + i]);
	}
	if (size[0] != size[1])
		die("they differ in size");
	sectors = size[0] / 512;
	state = strtoull(argv[3], NULL, 10);
	traces = atoi(argv[4]);
	if (posix_memalign((void **)&data, 4096, MOST * 512) ||
	    posix_memalign((void **)&other, 4096, MOST * 512))
		die("memory");
	for (trace = 0; trace < traces; trace++)
		one_trace();
	for (at = 0; at < sectors; at += MOST)
		compare(at, sectors - at < MOST ? sectors - at : MOST);
	return 0;
}
