// SPDX-License-Identifier: Apache-2.0
/*
 * Files that are promised to be there, and whether they are.
 *
 *   witness write DIR SEED COUNT [LOG]   writes files 0 to COUNT - 1, each with fsync of the file
 *                                        and of DIR; then puts the mark "done N" into the
 *                                        log-writes device LOG
 *   witness check DIR SEED COUNT         the first COUNT of them have to be there and right
 *   witness cut DIR SEED COUNT DEVICE FS mounts DEVICE, which has an FS, on DIR, checks, unmounts
 *
 * What a file holds follows from SEED and its number. Between them other files come and go
 * unsynced, and one is replaced again and again by rename.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <unistd.h>

static const char *folder;
static uint64_t seed;

static void die(const char *what, unsigned int number)
{
	fprintf(stderr, "witness: %s %u: %s\n", what, number, strerror(errno));
	exit(1);
}

static uint64_t mix(uint64_t z)
{
	z += 0x9e3779b97f4a7c15ull;
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static size_t content(unsigned int number, uint64_t *data)
{
	uint64_t state = mix(seed * 1000003 + number);
	size_t words = 1 + state % (number % 8 ? 2048 : 16384), i;

	for (i = 0; i < words; i++)
		data[i] = state = mix(state + i);
	return words * 8 - state % 8;
}

static void sync_folder(unsigned int number)
{
	int dir = open(folder, O_RDONLY | O_DIRECTORY);

	if (dir < 0 || fsync(dir))
		die("cannot sync the folder of", number);
	close(dir);
}

static void mark(const char *device, unsigned int number)
{
	union {
		struct dm_ioctl head;
		char bytes[1024];
	} order = { .head = { .version = { 4, 0, 0 }, .data_size = sizeof(order),
			      .data_start = sizeof(struct dm_ioctl) } };
	struct dm_target_msg *message = (void *)(order.bytes + sizeof(struct dm_ioctl));
	int control = open("/dev/mapper/control", O_RDWR);

	snprintf(order.head.name, sizeof(order.head.name), "%s", device);
	message->sector = 0;
	sprintf(message->message, "mark %u", number);
	if (control < 0 || ioctl(control, DM_TARGET_MSG, &order))
		die("cannot mark", number);
	close(control);
}

static void put(const char *name, const void *data, size_t size, unsigned int number, int sync)
{
	char path[512];
	int file;

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (file < 0 || write(file, data, size) != (ssize_t)size || (sync && fsync(file)))
		die("cannot write file", number);
	close(file);
}

static void write_one(unsigned int number, const char *log, uint64_t *data)
{
	char name[64], path[512], other[512];
	size_t size = content(number, data);

	snprintf(name, sizeof(name), "passing.%u", number % 5);
	put(name, data, size / 2 + 1, number, 0);
	snprintf(name, sizeof(name), "f%u", number);
	put(name, data, size, number, 1);
	put("replacing", data, size, number, 1);
	snprintf(path, sizeof(path), "%s/replacing", folder);
	snprintf(other, sizeof(other), "%s/latest", folder);
	if (rename(path, other))
		die("cannot rename for", number);
	sync_folder(number);
	if (log)
		mark(log, number);
	snprintf(path, sizeof(path), "%s/passing.%u", folder, (number + 2) % 5);
	if (unlink(path) && errno != ENOENT)
		die("cannot remove for", number);
}

static int is(const char *name, unsigned int number, uint64_t *data, uint64_t *found)
{
	size_t size = content(number, data);
	char path[512];
	ssize_t got;
	int file;

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	file = open(path, O_RDONLY);
	if (file < 0)
		die("cannot open file", number);
	got = read(file, found, 16384 * 8 + 8);
	close(file);
	return got == (ssize_t)size && !memcmp(data, found, size);
}

static int check(unsigned int count, uint64_t *data, uint64_t *found)
{
	unsigned int i;

	for (i = 0; i < count; i++) {
		char name[32];

		snprintf(name, sizeof(name), "f%u", i);
		if (!is(name, i, data, found)) {
			fprintf(stderr, "witness: file %u is not what was written\n", i);
			return 1;
		}
	}
	/* The replaced file is the last promised, or one after it. */
	for (i = count ? count - 1 : 0; count && !is("latest", i, data, found); i++) {
		if (i > count + 1) {
			fprintf(stderr, "witness: 'latest' is not that of %u\n", count - 1);
			return 1;
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	uint64_t *data = malloc(16384 * 8 + 16), *found = malloc(16384 * 8 + 16);
	unsigned int count, i;

	if (argc < 5 || argc > 7) {
		fprintf(stderr, "usage: witness write|check|cut DIR SEED COUNT [LOG | DEVICE FS]\n");
		return 2;
	}
	folder = argv[2];
	seed = strtoull(argv[3], NULL, 10);
	count = atoi(argv[4]);
	errno = 0;
	if (!strcmp(argv[1], "write")) {
		for (i = 0; i < count; i++)
			write_one(i, argc == 6 ? argv[5] : NULL, data);
		return 0;
	}
	if (!strcmp(argv[1], "cut")) {
		int result;

		if (argc != 7 || mount(argv[5], folder, argv[6], 0, NULL))
			die("cannot mount for", count);
		result = check(count, data, found);
		if (umount(folder))
			die("cannot unmount for", count);
		return result;
	}
	return check(count, data, found);
}
