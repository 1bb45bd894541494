// SPDX-License-Identifier: Apache-2.0
/*
 * Real loads on the device while its worker is killed, again and again: fio that verifies
 * what it wrote, and ext4 that fsck has to find clean. The worker is a process of its own
 * with the simplest format: a block's place is its own, a table (shared memory, so that it
 * outlives the worker as a disk would) says which blocks are committed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "lab.h"

#define BLOCK 128
#define BLOCKS 384
#define PLACE(block) (BLOCK + (block) * BLOCK)

static struct table {
	bool committed[BLOCKS];
	volatile unsigned int commits, placed, granted;
} *table;

static uint64_t marks[BLOCKS];		/* of this worker's life */
static bool placed[BLOCKS];
static uint64_t last_mark;
static bool granting;

static void tell(int node, struct dmu_answer a)
{
	int result = answer(node, a);

	if (result)
		printf("answer %u block %llu count %llu: %d\n", a.type,
		       (unsigned long long)a.block, (unsigned long long)a.count, result);
	if (result)
		_exit(3);
}

static void place(int node, struct dmu_message *m)
{
	struct dmu_answer a = map(m->id, m->block, 1, 0, PLACE(m->block), DMU_WRITABLE);

	if (!placed[m->block]) {
		placed[m->block] = true;
		table->placed++;
		/* Grants may have given marks that were not read yet. */
		last_mark += granting ? 1 << 20 : 1;
		a.mark = marks[m->block] = last_mark;
		a.flags |= DMU_HOLD_FLUSH;
		if (m->type == DMU_FAULT && !(m->flags & DMU_WHOLE))
			a.flags |= DMU_COPY_FIRST;
		a.from_device = 1;
		a.from_sector = m->block * BLOCK;
	}
	tell(node, a);
}

static void commit(int node, struct dmu_message *m)
{
	unsigned int i;

	for (i = 0; i < BLOCKS; i++) {
		if (marks[i] && marks[i] <= m->mark) {
			table->committed[i] = true;
			marks[i] = 0;
		}
	}
	table->commits++;
	tell(node, (struct dmu_answer){ .type = DMU_FLUSH_DONE, .id = m->id });
}

static void take_over(int node)
{
	struct dmu_message m;
	unsigned int i;

	memcpy(placed, table->committed, sizeof(placed));
	tell(node, (struct dmu_answer){ .type = DMU_DUMP });
	for (;;) {
		if (!next_message(node, &m, 20000))
			_exit(4);
		if (m.type == DMU_DUMP_DONE)
			break;
		if (m.type != DMU_UNCOMMITTED_IS || m.sector != PLACE(m.block))
			_exit(5);
		placed[m.block] = true;
		marks[m.block] = m.mark;
	}
	last_mark = m.mark;
	/* Some tell all they know, some let everything be asked again. */
	if (getpid() & 1)
		tell(node, (struct dmu_answer){ .type = DMU_INVALIDATE, .count = BLOCKS });
	for (i = 0; i < BLOCKS && !(getpid() & 1); i++)
		if (placed[i] && !marks[i])
			tell(node, map(0, i, 1, 0, PLACE(i), DMU_WRITABLE));
	/* Some let the kernel place first writes, where it has something to read. */
	granting = getpid() & 2;
	for (i = 0; i < BLOCKS && granting; i++)
		if (!placed[i])
			tell(node, map(0, i, 1, 1, i * BLOCK, 0));
	if (granting)
		tell(node, (struct dmu_answer){ .type = DMU_GRANT, .count = BLOCKS,
						.sector = PLACE(0), .length = 16 });
}

/* The kernel has placed a block by itself. */
static void take_up(struct dmu_message *m)
{
	if (m->sector != PLACE(m->block) || placed[m->block])
		_exit(7);
	placed[m->block] = true;
	marks[m->block] = m->mark;
	if (last_mark < m->mark)
		last_mark = m->mark;
	table->granted++;
}

static struct rig rig;

static void worker(void)
{
	struct dmu_message m;
	int node;

	while ((node = open(NODE, O_RDWR | O_CLOEXEC)) < 0 && errno == EBUSY)
		sleep_ms(1);
	if (node < 0)
		_exit(2);
	take_over(node);
	for (;;) {
		if (!next_message(node, &m, 60000))
			continue;
		if (m.type == DMU_INVALIDATE_DONE)
			continue;
		if (m.type == DMU_PLACED)
			take_up(&m);
		else if (m.type == DMU_FLUSH)
			commit(node, &m);
		else if (m.type == DMU_DISCARD && !(m.flags & DMU_ZEROING))
			tell(node, (struct dmu_answer){
				.type = DMU_DONE, .id = m.id, .count = m.count });
		else if (m.type == DMU_DISCARD || (m.type == DMU_FAULT && m.flags & DMU_WRITE))
			place(node, &m);
		else if (m.type == DMU_FAULT && placed[m.block])
			tell(node, map(m.id, m.block, 1, 0, PLACE(m.block), DMU_WRITABLE));
		else if (m.type == DMU_FAULT)
			tell(node, map(m.id, m.block, 1, 1, m.block * BLOCK, 0));
		else
			_exit(6);
	}
}

/*
 * Runs the load with a worker that is killed so many times, 5 to 5 + pause ms apart, then with
 * one that is left. A load may run until there is a file /mnt/enough.
 */
static void under_kills(const char *load, unsigned int kills, unsigned int pause)
{
	uint64_t state = strtoull(getenv("DMU_SEED") ?: "1", NULL, 10) + 7;
	unsigned int done = 0;
	int status, result = 0;
	pid_t child, guest = fork();

	if (!guest) {
		status = run("%s", load);
		if (status)
			printf("%s\n", said());
		fflush(stdout);
		_exit(status != 0);
	}
	for (;;) {
		bool last = done == kills;

		child = fork();
		if (!child)
			worker();
		state = state * 6364136223846793005ull + 1442695040888963407ull;
		if (!last) {
			sleep_ms(5 + (state >> 33) % pause);
			last = waitpid(guest, &result, WNOHANG) == guest;
		} else {
			CHECK(waitpid(guest, &result, 0) == guest);
		}
		CHECK(waitpid(child, &status, WNOHANG) == 0, "the worker ended with %d",
		      WEXITSTATUS(status));
		kill(child, SIGKILL);
		CHECK(waitpid(child, &status, 0) == child);
		if (last)
			break;
		if (++done == kills)
			run("touch /mnt/enough");
	}
	printf("# %u kills, %u placed, %u granted, %u commits\n", done, table->placed,
	       table->granted, table->commits);
	CHECK(result == 0, "the load failed");
}

static void begin_load(void)
{
	rig = (struct rig){ .block = BLOCK, .sectors = BLOCKS * BLOCK, .quiet = true };
	table = mmap(NULL, sizeof(*table), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(table != MAP_FAILED);
	rig_up(&rig);
}

static unsigned int rounds(void)
{
	return atoi(getenv("DMU_ROUNDS") ?: "1");
}

/*
 * fio, run after run: one run never writes a sector twice, because with blocks of many sizes
 * fio itself confuses what it has written over (seen on a plain file).
 */
static void fio_kills(void)
{
	char load[1024];

	begin_load();
	run("rm -f /mnt/fio.* /mnt/enough");
	snprintf(load, sizeof(load),
		 "i=0; until [ -e /mnt/enough ]; do i=$((i + 1)); "
		 "fio --name=v --filename=%s --direct=1 --ioengine=psync --rw=randrw --bsrange=512-96k --size=20m --io_size=12m --verify=crc32c "
		 "--verify_fatal=1 --fsync=16 --randrepeat=0 --randseed=$((%s + i)) "
		 "--output=/mnt/fio.$i || { cat /mnt/fio.$i; exit 1; }; done",
		 DISK, getenv("DMU_SEED") ?: "1");
	under_kills(load, 250 * rounds(), 60);
	run("awk -F'[ (),=:]+' '/ clat \\(/ { m = $7 * ($3 == \"msec\" ? 1000 : $3 == \"nsec\" ? "
	    ".001 : 1); if (m > most) most = m } END { printf \"%%d\", most / 1000 }' /mnt/fio.*");
	printf("# the longest of fio's requests took %s ms\n", said());
	rig_down(&rig);
}

static void ext4_load(unsigned int kills)
{
	char load[1024];

	snprintf(load, sizeof(load),
		 "set -e; mkfs.ext4 -q -E nodiscard %s; mkdir -p /mnt/fs; mount %s /mnt/fs; "
		 "for i in $(seq %u); do mkdir -p /mnt/fs/$i; cp -r /etc/apt /etc/default /etc/security "
		 "/mnt/fs/$i/ 2>/dev/null || true; dd if=/dev/urandom of=/mnt/fs/$i/big bs=64k count=24 "
		 "conv=fsync 2>/dev/null; md5sum /mnt/fs/$i/big >>/mnt/sums; "
		 "if [ $i -gt 4 ]; then rm -rf /mnt/fs/$((i - 4)); sed -i '1d' /mnt/sums; fi; done; "
		 "umount /mnt/fs; mount %s /mnt/fs; md5sum --quiet -c /mnt/sums; umount /mnt/fs; "
		 "e2fsck -fn %s", DISK, DISK, 8 * rounds(), DISK, DISK);
	run("rm -f /mnt/sums");
	under_kills(load, kills, 120);
}

static void ext4_kills(void)
{
	begin_load();
	ext4_load(60 * rounds());
	rig_down(&rig);
}

const struct scenario killed_scenarios[] = {
	{ "fio-kills", fio_kills },
	{ "ext4-kills", ext4_kills },
	{ 0 },
};
