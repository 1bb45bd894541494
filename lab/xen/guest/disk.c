// SPDX-License-Identifier: Apache-2.0
/*
 * disk.c: reads and writes the pattern. An operation writes a run of sectors inside one chunk;
 * two operations on one chunk are never in flight together, so what a sector must hold is
 * always known. I/O is the kernel's own asynchronous kind (io_submit), without libraries.
 */
#include "labio.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int open_disk(struct disk *d, const char *name, int flags)
{
	char path[96];
	double end = now() + 20;
	uint64_t bytes = 0;
	struct stat st;

	snprintf(d->name, sizeof(d->name), "%s", name);
	snprintf(path, sizeof(path), "%s%s", name[0] == '/' ? "" : "/dev/", name);
	do {
		d->fd = open(path, flags | O_CLOEXEC);
		if (d->fd >= 0 || !is_init)
			break;
		usleep(50000);
	} while (now() < end);
	if (d->fd < 0 && errno == EINVAL && (flags & O_DIRECT))
		d->fd = open(path, (flags & ~O_DIRECT) | O_CLOEXEC);
	if (d->fd < 0)
		return fail("%s: %s", path, strerror(errno));
	if (fstat(d->fd, &st) == 0 && S_ISREG(st.st_mode))
		bytes = st.st_size;
	else if (ioctl(d->fd, BLKGETSIZE64, &bytes))
		return fail("%s: size: %s", path, strerror(errno));
	d->sectors = bytes / SECTOR;
	d->chunks = d->sectors ? (d->sectors - 1) / CHUNK : 0;
	if (d->chunks == 0)
		return fail("%s: %llu bytes are too few", path, (unsigned long long)bytes);
	return 0;
}

struct slot {
	struct iocb cb;
	struct sector *data;
	struct run run;
	uint32_t op;
	bool is_read;
};

struct engine {
	const struct disk *disk;
	const struct options *options;
	aio_context_t context;
	struct slot slots[DEPTH_MAX];
	uint32_t seed, submitted, done, errors, bad;
	unsigned in_flight;
	uint32_t *last;		/* of each sector, the last operation that was acknowledged */
	uint8_t *busy;		/* of each chunk */
	uint8_t *acked;		/* of each operation */
	uint64_t reads;
};

static int engine_start(struct engine *e, struct disk *d, uint32_t seed, uint32_t count,
			const struct options *o)
{
	*e = (struct engine){ .disk = d, .options = o, .seed = seed };
	if (d->sectors > 1ull << 25)
		return fail("%s is larger than the 16 GiB that fit the tables", d->name);
	if (syscall(SYS_io_setup, DEPTH_MAX, &e->context))
		return fail("io_setup: %s", strerror(errno));
	e->last = calloc(d->sectors, sizeof(*e->last));
	e->busy = calloc(d->chunks, 1);
	e->acked = calloc((size_t)count + 2, 1);
	if (!e->last || !e->busy || !e->acked)
		return fail("no memory");
	for (unsigned i = 0; i < o->depth; i++)
		e->slots[i].data = aligned(CHUNK * SECTOR);
	return 0;
}

static void engine_stop(struct engine *e)
{
	syscall(SYS_io_destroy, e->context);
	for (unsigned i = 0; i < e->options->depth; i++)
		free(e->slots[i].data);
	free(e->last), free(e->busy), free(e->acked);
}

static void complete(struct engine *e, struct slot *s, int64_t result)
{
	uint64_t bytes = (uint64_t)s->run.count * SECTOR;

	if (result != (int64_t)bytes) {
		e->errors++;
		printf("LAB error %s of %u sectors at %llu: %s\n", s->is_read ? "read" : "write",
		       s->run.count, (unsigned long long)s->run.lba,
		       result < 0 ? strerror(-result) : "short");
	}
	for (uint32_t i = 0; i < s->run.count && result == (int64_t)bytes; i++) {
		uint64_t lba = s->run.lba + i;

		if (s->is_read) {
			const char *wrong = judge(e->disk, &s->data[i], lba, e->seed, e->last[lba],
						  UINT32_MAX, e->options);
			if (wrong && e->bad++ < 8)
				printf("LAB bad sector %llu %s\n", (unsigned long long)lba, wrong);
		} else {
			e->last[lba] = s->op;
		}
	}
	if (!s->is_read)
		e->acked[s->op] = 1;
	while (e->acked[e->done + 1])
		e->done++;
	e->busy[s->run.chunk] = 0;
	s->op = 0;
	e->in_flight--;
}

/* Takes in what has completed, waiting up to `seconds` for the first. */
static void reap(struct engine *e, double seconds)
{
	struct io_event events[DEPTH_MAX];
	struct timespec t = { seconds, (seconds - (long)seconds) * 1e9 };
	long n = syscall(SYS_io_getevents, e->context, 1, DEPTH_MAX, events, &t);

	for (long i = 0; i < n; i++)
		complete(e, (struct slot *)(uintptr_t)events[i].data, events[i].res);
}

static void submit(struct engine *e, uint32_t op, bool is_read)
{
	struct slot *s = e->slots;
	struct iocb *list[1];

	while (s->op)
		s++;
	s->op = op;
	s->is_read = is_read;
	s->run = run_of(e->disk, e->seed, op);
	e->busy[s->run.chunk] = 1;
	e->in_flight++;
	for (uint32_t i = 0; i < s->run.count && !is_read; i++)
		fill(&s->data[i], e->seed, op, s->run.lba + i);
	s->cb = (struct iocb){
		.aio_lio_opcode = is_read ? IOCB_CMD_PREAD : IOCB_CMD_PWRITE,
		.aio_fildes = e->disk->fd,
		.aio_buf = (uintptr_t)s->data,
		.aio_nbytes = (uint64_t)s->run.count * SECTOR,
		.aio_offset = s->run.lba * SECTOR,
		.aio_data = (uintptr_t)s,
	};
	list[0] = &s->cb;
	if (syscall(SYS_io_submit, e->context, 1, list) != 1)
		complete(e, s, -errno);
	else if (!is_read)
		e->submitted = op;
}

static bool told_to_stop(void)
{
	static char line[64];
	struct pollfd p = { .fd = 0, .events = POLLIN };

	return is_init && poll(&p, 1, 0) > 0 && fgets(line, sizeof(line), stdin) &&
	       strncmp(line, "stop", 4) == 0;
}

int run_operations(struct disk *d, uint32_t seed, uint32_t count, const struct options *o,
			  bool looping)
{
	struct engine e;
	double told = now();
	int status = 0;

	if (engine_start(&e, d, seed, count, o))
		return -1;
	for (uint32_t op = 1; op <= count && e.errors == 0; op++) {
		uint64_t chunk = run_of(d, seed, op).chunk;

		while (e.in_flight == o->depth || e.busy[chunk])
			reap(&e, 1);
		submit(&e, op, false);
		if (looping && op % 4 == 0) {
			/* Read something written earlier, if it is at rest. */
			uint32_t old = 1 + mix(op) % op;

			while (e.in_flight == o->depth)
				reap(&e, 1);
			if (!e.busy[run_of(d, seed, old).chunk])
				submit(&e, old, true), e.reads++;
		}
		if (o->sync && op % o->sync == 0 && fsync(d->fd)) {
			printf("LAB error fsync after operation %u: %s\n", op, strerror(errno));
			e.errors++;
		}
		if (o->ms)
			reap(&e, 0), usleep(o->ms * 1000);
		if (looping && now() - told >= 1) {
			told = now();
			printf("LAB acked %u of %u\n", e.done, e.submitted);
			if (told_to_stop())
				break;
		}
	}
	while (e.in_flight)
		reap(&e, 1);
	if (!o->nosync && fsync(d->fd)) {
		printf("LAB error fsync: %s\n", strerror(errno));
		e.errors++;
	}
	if (looping)
		printf("LAB acked %u of %u\n", e.done, e.submitted);
	if (e.errors || e.bad)
		status = fail("%u I/O errors, %u bad sectors, %u writes acknowledged", e.errors,
			      e.bad, e.done);
	else
		snprintf(reason, sizeof(reason), "%u writes, %llu reads", e.done,
			 (unsigned long long)e.reads);
	engine_stop(&e);
	return status;
}

int verify(struct disk *d, uint32_t seed, uint32_t done, const struct options *o)
{
	uint32_t *due = calloc(d->sectors, sizeof(*due));
	struct sector *data = aligned(SPAN * SECTOR);
	uint64_t bad = 0, errors = 0, seen = 0;

	if (!due)
		return fail("no memory");
	for (uint32_t op = 1; op <= done; op++) {
		struct run r = run_of(d, seed, op);

		for (uint32_t i = 0; i < r.count; i++)
			due[r.lba + i] = op;
	}
	for (uint64_t at = 0; at < d->sectors; at += SPAN) {
		uint64_t n = d->sectors - at < SPAN ? d->sectors - at : SPAN;
		ssize_t got = pread(d->fd, data, n * SECTOR, at * SECTOR);

		if (got != (ssize_t)(n * SECTOR)) {
			if (errors++ < 4)
				printf("LAB error read at %llu: %s\n", (unsigned long long)at,
				       got < 0 ? strerror(errno) : "short");
			continue;
		}
		/* The last sector is the counter of boots. */
		for (uint64_t i = 0; i < n && at + i < d->sectors - 1; i++) {
			const char *wrong = judge(d, &data[i], at + i, seed, due[at + i], done, o);

			seen += due[at + i] != 0;
			if (wrong && bad++ < 8)
				printf("LAB bad sector %llu %s\n", (unsigned long long)(at + i),
				       wrong);
		}
	}
	free(due), free(data);
	if (bad || errors)
		return fail("%llu bad sectors, %llu I/O errors", (unsigned long long)bad,
			    (unsigned long long)errors);
	snprintf(reason, sizeof(reason), "%llu of %llu sectors written and right",
		 (unsigned long long)seen, (unsigned long long)d->sectors);
	return 0;
}

int fill_base(struct disk *d, uint32_t seed)
{
	struct sector *data = aligned(SPAN * SECTOR);

	for (uint64_t at = 0; at < d->sectors; at += SPAN) {
		uint64_t n = d->sectors - at < SPAN ? d->sectors - at : SPAN;

		for (uint64_t i = 0; i < n; i++)
			fill(&data[i], seed, 0, at + i);
		if (pwrite(d->fd, data, n * SECTOR, at * SECTOR) != (ssize_t)(n * SECTOR))
			return fail("write at %llu: %s", (unsigned long long)at, strerror(errno));
	}
	free(data);
	return fsync(d->fd) ? fail("fsync: %s", strerror(errno)) : 0;
}

int count_boot(struct disk *d, unsigned *boot)
{
	struct sector *s = aligned(4096);
	uint64_t at = (d->sectors - 1) * SECTOR;

	if (pread(d->fd, s, SECTOR, at) != SECTOR)
		return fail("read of the counter: %s", strerror(errno));
	*boot = s->magic == magic && is_good(s) && s->seed == UINT32_MAX ? s->op + 1 : 1;
	fill(s, UINT32_MAX, *boot, d->sectors - 1);
	if (pwrite(d->fd, s, SECTOR, at) != SECTOR || fsync(d->fd))
		return fail("write of the counter: %s", strerror(errno));
	snprintf(reason, sizeof(reason), "boot %u", *boot);
	free(s);
	return 0;
}
