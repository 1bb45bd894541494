// SPDX-License-Identifier: Apache-2.0
/*
 * Reads the log of the device-mapper's target log-writes.
 *
 *   replay list LOG                     a line an entry: number, flags, sector, sectors, where it
 *                                       is in the log, mark
 *   replay cut LOG DEVICE FROM WHERE FLOOR TO SEED CUT [KEPT END]
 *                                       applies FROM, which is at WHERE, to FLOOR - 1 and copies
 *                                       DEVICE to the file CUT; there, of FLOOR to TO - 1 each
 *                                       entry only perhaps, and writes torn at a sector: what a
 *                                       power cut may leave of writes that no flush has confirmed.
 *                                       One that touches the sectors KEPT to END - 1 is torn only
 *                                       where a block of 4 KiB, counted from KEPT on, ends
 *
 * The log: a sector with magic, version, count and sector size; then for each entry a sector
 * with its head (and a mark's text) and the data. Source: the kernel's
 * Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAGIC 0x6a736677736872ull
#define SECTOR 512
#define BLOCK 8			/* sectors */
#define IS_DISCARD 4
#define IS_MARK 8

struct head {
	uint64_t sector, sectors, flags, length;
};

static int logfile, device = -1;
static uint64_t count;
static uint32_t unit;		/* bytes that the log counts in */
static uint64_t kept, kept_end;	/* sectors whose blocks are not torn */

static void die(const char *what)
{
	fprintf(stderr, "replay: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void read_log(void *data, size_t size, uint64_t offset)
{
	if (pread(logfile, data, size, offset) != (ssize_t)size)
		die("the log ends early");
}

static void open_log(const char *path)
{
	uint8_t sector[SECTOR];
	uint64_t magic;

	logfile = open(path, O_RDONLY);
	if (logfile < 0)
		die(path);
	read_log(sector, sizeof(sector), 0);
	memcpy(&magic, sector, 8);
	memcpy(&count, sector + 16, 8);
	memcpy(&unit, sector + 24, 4);
	count = le64toh(count);
	unit = le32toh(unit);
	errno = EINVAL;
	if (le64toh(magic) != MAGIC || unit < SECTOR)
		die("no log of log-writes");
}

static uint64_t chance(uint64_t *state)
{
	*state += 0x9e3779b97f4a7c15ull;
	uint64_t z = *state;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

/* Widens the run of a write's sectors, from up to but not to, to blocks that begin at kept. */
static void whole_blocks(const struct head *head, uint64_t *from, uint64_t *to)
{
	uint64_t before = (head->sector + *from - kept) % BLOCK;
	uint64_t after = (kept - head->sector - *to) % BLOCK;

	*from -= before < *from ? before : *from;
	*to = after < head->sectors - *to ? *to + after : head->sectors;
}

static void put(const struct head *head, uint64_t offset, uint64_t *state)
{
	size_t size = head->sectors * unit;
	uint64_t from = 0, to = head->sectors;
	uint8_t *data;

	if (state && !(chance(state) & 1))
		return;
	if (state && chance(state) % 4 == 0 && to > 1) {
		/* Torn: a run of its sectors. */
		from = chance(state) % to;
		to = from + 1 + chance(state) % (to - from);
		if (head->sector < kept_end && head->sector + head->sectors > kept)
			whole_blocks(head, &from, &to);
	}
	data = calloc(1, size);
	if (!(head->flags & IS_DISCARD))
		read_log(data, size, offset);
	if (pwrite(device, data + from * unit, (to - from) * unit, (head->sector + from) * unit) !=
	    (ssize_t)((to - from) * unit))
		die("cannot write");
	free(data);
}

/* Copies what the device's file holds to another of the same length. */
static void copy_to(const char *path)
{
	off_t size = lseek(device, 0, SEEK_END), from = 0, to;
	int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);

	if (file < 0 || ftruncate(file, size))
		die(path);
	while ((from = lseek(device, from, SEEK_DATA)) >= 0) {
		to = lseek(device, from, SEEK_HOLE);
		if (lseek(file, from, SEEK_SET) < 0 || lseek(device, from, SEEK_SET) < 0)
			die("cannot seek");
		while (from < to) {
			ssize_t part = copy_file_range(device, NULL, file, NULL, to - from, 0);

			if (part <= 0)
				die("cannot copy");
			from += part;
		}
	}
	close(device);
	device = file;
}

/* Lists or applies those from the first on, which is in the log at the place where. */
static void entries(uint64_t first, uint64_t where, uint64_t middle, uint64_t to, uint64_t seed,
		    const char *cut)
{
	bool list = device < 0;
	uint64_t at = where, i;
	struct head head;
	char text[SECTOR];

	for (i = first; i <= to && i <= count; i++) {
		if (i == middle && cut)
			copy_to(cut);
		if (i == to || i == count)
			break;
		read_log(&head, sizeof(head), at);
		head.sector = le64toh(head.sector);
		head.sectors = le64toh(head.sectors);
		head.flags = le64toh(head.flags);
		head.length = le64toh(head.length);
		memset(text, 0, sizeof(text));
		if (list && head.flags & IS_MARK && head.length < sizeof(text) - sizeof(head))
			read_log(text, head.length, at + sizeof(head));
		if (list)
			printf("%llu %llu %llu %llu %llu %s\n", (unsigned long long)i,
			       (unsigned long long)head.flags, (unsigned long long)head.sector,
			       (unsigned long long)head.sectors, (unsigned long long)at, text);
		else if (head.sectors && !(head.flags & IS_MARK))
			put(&head, at + unit, i >= middle ? &seed : NULL);
		at += unit + (head.flags & IS_DISCARD ? 0 : head.sectors * unit);
	}
}

static uint64_t number(const char *text)
{
	return strtoull(text, NULL, 10);
}

int main(int argc, char **argv)
{
	bool list = argc == 3 && !strcmp(argv[1], "list");
	bool cut = (argc == 10 || argc == 12) && !strcmp(argv[1], "cut");

	if (!list && !cut) {
		fprintf(stderr, "usage: replay list LOG | "
			"cut LOG DEVICE FROM WHERE FLOOR TO SEED CUT [KEPT END]\n");
		return 2;
	}
	open_log(argv[2]);
	if (list) {
		entries(0, unit, UINT64_MAX, count, 0, NULL);
		return 0;
	}
	if (argc == 12) {
		kept = number(argv[10]);
		kept_end = number(argv[11]);
	}
	device = open(argv[3], O_RDWR);
	if (device < 0)
		die(argv[3]);
	entries(number(argv[4]), number(argv[5]), number(argv[6]), number(argv[7]),
		number(argv[8]), argv[9]);
	if (fsync(device) || close(device))
		die("cannot write out");
	return 0;
}
