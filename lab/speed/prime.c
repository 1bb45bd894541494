// SPDX-License-Identifier: Apache-2.0
/*
 * prime NAME EXTENTS: tells the device NAME where all its blocks are, before anybody asks.
 *
 * The device's blocks are taken in EXTENTS runs of equal length, and runs trade places in
 * pairs: the mapping of one never continues that of its neighbour, so there are EXTENTS of
 * them and not one less. With 1 every block lives where it is. Afterwards the device goes on
 * by itself. Beside it this is the least that a client of /dev/dmu needs to prime a disk.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "dmu.h"

static void die(const char *what, int error)
{
	fprintf(stderr, "prime: %s: %s\n", what, strerror(error));
	exit(1);
}

static void say(int node, struct dmu_answer *answers, uint32_t count)
{
	struct dmu_batch batch = { .answers = (uintptr_t)answers, .count = count };
	uint32_t i;

	if (ioctl(node, DMU_IOC_ANSWER, &batch))
		die("cannot answer", errno);
	for (i = 0; batch.refused && i < count; i++)
		if (answers[i].result)
			die("an answer was refused", -answers[i].result);
}

int main(int argc, char **argv)
{
	static struct dmu_answer answers[DMU_MAX_BATCH];
	struct dmu_message version;
	uint64_t extents, length, blocks, i;
	uint32_t count = 0;
	char path[128];
	int node;

	if (argc != 3 || (extents = strtoull(argv[2], NULL, 10)) == 0) {
		fprintf(stderr, "usage: prime NAME EXTENTS\n");
		return 2;
	}
	snprintf(path, sizeof(path), "/dev/dmu/%s", argv[1]);
	node = open(path, O_RDWR | O_CLOEXEC);
	if (node < 0)
		die(path, errno);
	answers[0] = (struct dmu_answer){ .type = DMU_GET_VERSION };
	say(node, answers, 1);
	if (read(node, &version, sizeof(version)) != sizeof(version) ||
	    version.type != DMU_VERSION_IS || version.version != DMU_VERSION)
		die("another version is spoken there", EPROTO);
	blocks = version.count / version.block_sectors;
	length = blocks / extents;
	if (length * extents != blocks || (extents > 1 && extents % 2))
		die("EXTENTS is odd, or does not divide the device's blocks", EINVAL);
	for (i = 0; i < extents; i++) {
		uint64_t at = extents == 1 ? i : i ^ 1;

		answers[count++] = (struct dmu_answer){
			.type = DMU_MAP,
			.flags = DMU_WRITABLE,
			.block = i * length,
			.count = length,
			.sector = at * length * version.block_sectors,
		};
		if (count == DMU_MAX_BATCH || i + 1 == extents) {
			say(node, answers, count);
			count = 0;
		}
	}
	return 0;
}
