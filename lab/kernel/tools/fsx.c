// SPDX-License-Identifier: Apache-2.0
/*
 * fsx FILE SEED OPERATIONS: random reads, writes, mapped writes, truncations and holes in one
 * file, with what it has to hold kept in memory and every read compared.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MOST (1 << 20)

static uint8_t model[MOST], data[MOST];
static uint64_t state;
static uint32_t length;
static int file, step;
static const char *path;

static uint32_t chance(uint32_t below)
{
	state = state * 6364136223846793005ull + 1442695040888963407ull;
	return below ? (uint32_t)(state >> 33) % below : 0;
}

static void die(const char *what)
{
	fprintf(stderr, "fsx: operation %d, %s: %s\n", step, what, strerror(errno));
	exit(1);
}

static void compare(uint32_t offset, uint32_t size)
{
	uint32_t i;

	errno = 0;
	if (pread(file, data, size, offset) != (ssize_t)size)
		die("read");
	for (i = 0; i < size; i++) {
		if (data[i] == model[offset + i])
			continue;
		fprintf(stderr, "fsx: operation %d: byte %u is %02x, should be %02x\n", step, offset + i,
			data[i], model[offset + i]);
		exit(1);
	}
}

static void resize(uint32_t to)
{
	if (to > length)
		memset(model + length, 0, to - length);
	length = to;
}

static void store(uint32_t offset, uint32_t size, int mapped)
{
	uint32_t i, page = offset & 4095;
	uint8_t *map;

	if (offset + size > length) {
		if (mapped && ftruncate(file, offset + size))
			die("lengthen");
		resize(offset + size);
	}
	for (i = 0; i < size; i++)
		model[offset + i] = (uint8_t)chance(256);
	if (!mapped) {
		if (pwrite(file, model + offset, size, offset) != (ssize_t)size)
			die("write");
		return;
	}
	map = mmap(NULL, size + page, PROT_READ | PROT_WRITE, MAP_SHARED, file, offset - page);
	if (map == MAP_FAILED)
		die("map");
	memcpy(map + page, model + offset, size);
	if (munmap(map, size + page))
		die("unmap");
}

static void operation(void)
{
	uint32_t offset = chance(MOST - 65536), size = 1 + chance(65535);

	switch (chance(10)) {
	case 0: case 1: case 2:
		store(offset, size, 0);
		break;
	case 3: case 4:
		store(offset, size, 1);
		break;
	case 5:
		resize(chance(MOST));
		if (ftruncate(file, length))
			die("truncate");
		break;
	case 6:
		if (offset + size > length)
			break;
		if (fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size))
			die("punch");
		memset(model + offset, 0, size);
		break;
	case 7:
		if (fdatasync(file) || posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED))
			die("sync");
		break;
	default:
		if (offset < length)
			compare(offset, size < length - offset ? size : length - offset);
		break;
	}
}

int main(int argc, char **argv)
{
	int operations;

	if (argc != 4) {
		fprintf(stderr, "usage: fsx FILE SEED OPERATIONS\n");
		return 2;
	}
	path = argv[1];
	state = strtoull(argv[2], NULL, 10);
	operations = atoi(argv[3]);
	file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (file < 0)
		die("open");
	for (step = 0; step < operations; step++)
		operation();
	if (fsync(file) || posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED))
		die("sync");
	compare(0, length);
	return 0;
}
