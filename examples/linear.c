// SPDX-License-Identifier: Apache-2.0
/*
 * The smallest worker: every block lives where it is, on device 0; each fault is logged.
 *
 *   dmsetup create toy --table '0 LEN userspace toy 128 1 /dev/loop0'
 *   cc -I Sources/DMUProtocol/include -o linear examples/linear.c
 *   ./linear toy
 *
 * It remembers nothing: mappings are told as they are asked for, and because none is
 * uncommitted no flush ever comes here. When it ends the device goes on with what it knows.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "dmu.h"

static int say(int node, struct dmu_answer *answers, uint32_t count)
{
	struct dmu_batch batch = { .answers = (uintptr_t)answers, .count = count };

	if (ioctl(node, DMU_IOC_ANSWER, &batch))
		return -errno;
	return batch.refused ? answers[0].result : 0;
}

int main(int argc, char **argv)
{
	struct dmu_message messages[32];
	struct dmu_answer answers[32];
	uint32_t block_sectors, i, count;
	char path[128];
	ssize_t size;
	int node;

	if (argc != 2) {
		fprintf(stderr, "usage: linear NAME\n");
		return 2;
	}
	snprintf(path, sizeof(path), "/dev/dmu/%s", argv[1]);
	node = open(path, O_RDWR | O_CLOEXEC);
	if (node < 0) {
		fprintf(stderr, "linear: %s: %s\n", path, strerror(errno));
		return 1;
	}
	answers[0] = (struct dmu_answer){ .type = DMU_GET_VERSION };
	if (say(node, answers, 1) || read(node, messages, sizeof(*messages)) <= 0 ||
	    messages[0].type != DMU_VERSION_IS || messages[0].version != DMU_VERSION) {
		fprintf(stderr, "linear: %s does not speak version %d\n", path, DMU_VERSION);
		return 1;
	}
	block_sectors = messages[0].block_sectors;
	while ((size = read(node, messages, sizeof(messages))) > 0) {
		count = 0;
		for (i = 0; i < size / sizeof(*messages); i++) {
			struct dmu_message *m = &messages[i];

			printf("fault %llu: %s block %llu\n", (unsigned long long)m->id,
			       m->type == DMU_DISCARD ? "discard" :
			       m->flags & DMU_WRITE ? "write" : "read",
			       (unsigned long long)m->block);
			if (m->type != DMU_FAULT && m->type != DMU_DISCARD)
				continue;
			answers[count++] = (struct dmu_answer){
				.type = m->type == DMU_FAULT || (m->flags & DMU_ZEROING) ?
					DMU_MAP : DMU_DONE,
				.flags = m->type == DMU_FAULT || (m->flags & DMU_ZEROING) ?
					 DMU_WRITABLE : 0,
				.id = m->id,
				.block = m->block,
				.count = m->count,
				.sector = m->block * block_sectors,
			};
		}
		fflush(stdout);
		if (count && say(node, answers, count) < 0)
			fprintf(stderr, "linear: an answer was refused\n");
	}
	return 0;
}
