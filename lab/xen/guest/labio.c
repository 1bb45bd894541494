/*
 * labio: writes patterns that can be told apart and reads them back.
 *
 * It is the only program of the lab's guests (as /init), and a tool with the same orders
 * in dom0. As init it takes its orders from the kernel's command line (`lab=ORDER,...`) and
 * then, line by line, from the console; as a tool from its arguments. Each order ends in
 * exactly one line, `LAB ok ORDER...` or `LAB fail ORDER: REASON`; the first failure makes
 * the tool's exit status 1.
 *
 *   size:DEV                     its size in bytes
 *   wait:DEV[:SECONDS]           until it is there with a size; gone:DEV until it is not
 *   base:DEV:SEED                fill all of it with the pattern of SEED
 *   write:DEV:SEED:COUNT[:OPT]   operations 1 to COUNT of SEED, then fsync
 *   loop:DEV:SEED:COUNT[:OPT]    the same, with reads that are checked among them, telling
 *                                every second how far it got, ended early by a line `stop`
 *   verify:DEV:SEED:DONE[:OPT]   read all of it and check what 1 to DONE have left
 *   count:DEV                    one more in the counter of boots, its last sector; then an
 *                                order that begins with @N: is done in boot N only
 *   flush:DEV  discard:DEV:SECTOR:COUNT  sleep:SECONDS  say:TEXT  poweroff  reboot
 *
 *   OPT: depth=N in flight (8); sync=N, fsync after every N operations (0: at the end);
 *        nosync, no fsync at all; cached, through the page cache; ms=N, pause between
 *        operations; base=SEED or base=zero, what sectors that no operation touched must
 *        hold; later, operations after DONE may have left something too.
 *   DEV: a name in /dev, or a path.
 *
 * Every sector carries the seed, the number of the operation that wrote it (0: base), its
 * own address, and noise made of all three, so that a sector that is lost, stale, torn or
 * in the wrong place is told from a good one, and by which operation it should have been.
 * An operation writes a run of sectors inside one chunk. A chunk is 48 sectors, so chunks
 * straddle blocks of 64 KiB. Two operations on one chunk are never in flight together.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum { SECTOR = 512, CHUNK = 48, DEPTH_MAX = 64, SPAN = 512 };

struct sector {
	uint64_t magic, lba;
	uint32_t seed, op;
	uint64_t noise[(SECTOR - 24) / 8];
};
_Static_assert(sizeof(struct sector) == SECTOR, "a sector is 512 bytes");

struct disk {
	char name[64];
	int fd;
	uint64_t sectors, chunks;
};

struct options {
	unsigned depth, sync, ms;
	bool nosync, cached, later, base_zero, has_base;
	uint32_t base;
};

struct run {
	uint64_t lba;
	uint32_t count;
	uint64_t chunk;
};

static const uint64_t magic = 0x314f4942414c2121;
static bool is_init;
static unsigned boot_number;
static char reason[256];

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

static int fail(const char *format, ...)
{
	va_list list;

	va_start(list, format);
	vsnprintf(reason, sizeof(reason), format, list);
	va_end(list);
	return -1;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* ---- the pattern ---- */

static void fill(struct sector *s, uint32_t seed, uint32_t op, uint64_t lba)
{
	uint64_t x = mix(mix(seed) ^ op) ^ mix(lba);

	*s = (struct sector){ .magic = magic, .lba = lba, .seed = seed, .op = op };
	for (unsigned i = 0; i < sizeof(s->noise) / 8; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		s->noise[i] = x;
	}
}

static bool is_good(const struct sector *s)
{
	struct sector t;

	fill(&t, s->seed, s->op, s->lba);
	return memcmp(s, &t, SECTOR) == 0;
}

/* What operation `op` of `seed` writes. */
static struct run run_of(const struct disk *d, uint32_t seed, uint32_t op)
{
	uint64_t x = mix(mix(seed) + op), y = mix(x);
	uint32_t first = y % CHUNK, most = CHUNK - first;
	struct run r = { .chunk = x % d->chunks };

	/* A third are whole chunks, the rest anything from one sector. */
	if ((y >> 32) % 3 == 0)
		first = 0, most = r.count = CHUNK;
	else
		r.count = 1 + (y >> 40) % most;
	r.lba = r.chunk * CHUNK + first;
	return r;
}

/*
 * One sector as it was read against what must be there: operation `due`, or what lay there
 * before any. Returns null or what is wrong.
 */
static const char *judge(const struct disk *d, const struct sector *s, uint64_t lba, uint32_t seed,
			 uint32_t due, uint32_t done, const struct options *o)
{
	static const struct sector zero;
	static char text[128];

	if (due == 0 && o->base_zero && memcmp(s, &zero, SECTOR) == 0)
		return NULL;
	if (due == 0 && !o->has_base && !o->base_zero && s->magic != magic)
		return NULL;
	if (s->magic != magic) {
		const char *what = memcmp(s, &zero, SECTOR) ? "something else" : "zeroes";
		snprintf(text, sizeof(text), "holds %s, should hold operation %u", what, due);
		return text;
	}
	if (s->lba != lba || !is_good(s)) {
		snprintf(text, sizeof(text), "holds sector %llu of seed %u operation %u%s",
			 (unsigned long long)s->lba, s->seed, s->op, is_good(s) ? "" : ", torn");
		return text;
	}
	if (s->seed == seed && s->op != 0) {
		struct run r = run_of(d, seed, s->op);
		bool covers = lba >= r.lba && lba < r.lba + r.count;

		if (s->op == due || (o->later && s->op > done && covers))
			return NULL;
	} else if (due == 0 && !o->base_zero && (!o->has_base || (s->seed == o->base && s->op == 0))) {
		return NULL;
	}
	snprintf(text, sizeof(text), "holds seed %u operation %u, should hold operation %u",
		 s->seed, s->op, due);
	return text;
}

/* ---- disks ---- */

static int open_disk(struct disk *d, const char *name, int flags)
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

static void *aligned(size_t size)
{
	void *p = NULL;

	if (posix_memalign(&p, 4096, size)) {
		puts("LAB fail: no memory");
		exit(2);
	}
	return p;
}

/* ---- operations in flight ---- */

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

static int run_operations(struct disk *d, uint32_t seed, uint32_t count, const struct options *o,
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

/* ---- orders ---- */

static int verify(struct disk *d, uint32_t seed, uint32_t done, const struct options *o)
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

static int fill_base(struct disk *d, uint32_t seed)
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

static int count_boot(struct disk *d)
{
	struct sector *s = aligned(4096);
	uint64_t at = (d->sectors - 1) * SECTOR;

	if (pread(d->fd, s, SECTOR, at) != SECTOR)
		return fail("read of the counter: %s", strerror(errno));
	boot_number = s->magic == magic && is_good(s) && s->seed == UINT32_MAX ? s->op + 1 : 1;
	fill(s, UINT32_MAX, boot_number, d->sectors - 1);
	if (pwrite(d->fd, s, SECTOR, at) != SECTOR || fsync(d->fd))
		return fail("write of the counter: %s", strerror(errno));
	snprintf(reason, sizeof(reason), "boot %u", boot_number);
	free(s);
	return 0;
}

static int await(const char *name, double seconds, bool present)
{
	char path[96], text[32];
	double end = now() + seconds;

	snprintf(path, sizeof(path), "/sys/block/%s/size", name);
	do {
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);

		if (fd >= 0)
			close(fd);
		text[n < 0 ? 0 : n] = 0;
		if ((fd >= 0 && atoll(text) > 0) == present && (present || fd < 0))
			return 0;
		usleep(50000);
	} while (now() < end);
	return fail("still %s after %g s", present ? "not there" : "there", seconds);
}

static int parse_options(char **words, struct options *o)
{
	*o = (struct options){ .depth = 8 };
	for (; *words; words++) {
		char *w = *words;

		if (!strncmp(w, "depth=", 6))
			o->depth = atoi(w + 6);
		else if (!strncmp(w, "sync=", 5))
			o->sync = atoi(w + 5);
		else if (!strncmp(w, "ms=", 3))
			o->ms = atoi(w + 3);
		else if (!strcmp(w, "base=zero"))
			o->base_zero = true;
		else if (!strncmp(w, "base=", 5))
			o->has_base = true, o->base = strtoul(w + 5, NULL, 0);
		else if (!strcmp(w, "nosync"))
			o->nosync = true;
		else if (!strcmp(w, "cached"))
			o->cached = true;
		else if (!strcmp(w, "later"))
			o->later = true;
		else
			return fail("unknown option %s", w);
	}
	if (o->depth < 1 || o->depth > DEPTH_MAX)
		return fail("depth is 1 to %d", DEPTH_MAX);
	return 0;
}

static int leave(int how)
{
	if (!is_init)
		return fail("only a guest can do that");
	sync();
	tcdrain(1);
	usleep(300000);
	return reboot(how) ? fail("%s", strerror(errno)) : 0;
}

static int disk_order(char **w, int n)
{
	struct options o;
	struct disk d = { .fd = -1 };
	bool patterned = !strcmp(w[0], "write") || !strcmp(w[0], "loop") || !strcmp(w[0], "verify");
	bool reading = !strcmp(w[0], "verify") || !strcmp(w[0], "size");
	int status;

	if (n < 2 || (patterned && n < 4) || (!strcmp(w[0], "base") && n != 3))
		return fail("words are missing");
	if (parse_options(patterned ? w + 4 : w + n, &o))
		return -1;
	if (open_disk(&d, w[1], (reading ? O_RDONLY : O_RDWR) | (o.cached ? 0 : O_DIRECT)))
		return -1;
	uint32_t seed = n > 2 ? strtoul(w[2], NULL, 0) : 0;
	uint32_t count = n > 3 ? strtoul(w[3], NULL, 0) : 0;

	if (!strcmp(w[0], "write") || !strcmp(w[0], "loop")) {
		status = run_operations(&d, seed, count, &o, w[0][0] == 'l');
	} else if (!strcmp(w[0], "verify")) {
		status = verify(&d, seed, count, &o);
	} else if (!strcmp(w[0], "base")) {
		status = fill_base(&d, seed);
	} else if (!strcmp(w[0], "count")) {
		status = count_boot(&d);
	} else if (!strcmp(w[0], "flush")) {
		status = fsync(d.fd) ? fail("%s", strerror(errno)) : 0;
	} else if (!strcmp(w[0], "discard")) {
		uint64_t range[2] = { (uint64_t)seed * SECTOR, (uint64_t)count * SECTOR };

		status = ioctl(d.fd, BLKDISCARD, range) ? fail("%s", strerror(errno)) : 0;
	} else {
		snprintf(reason, sizeof(reason), "%llu", (unsigned long long)d.sectors * SECTOR);
		status = strcmp(w[0], "size") ? fail("no such order") : 0;
	}
	close(d.fd);
	return status;
}

static int obey(char *order)
{
	char copy[256], *words[16] = { 0 }, *rest = copy;
	int n = 0, status;

	if (order[0] == '@') {
		unsigned wanted = strtoul(order + 1, &order, 10);

		if (wanted != boot_number)
			return 0;
		order++;
	}
	snprintf(copy, sizeof(copy), "%s", order);
	while (n < 15 && (words[n] = strsep(&rest, ":")))
		n++;
	if (!words[0] || !*words[0])
		return 0;
	reason[0] = 0;
	if (!strcmp(words[0], "say"))
		status = 0;
	else if (!strcmp(words[0], "sleep"))
		status = usleep(atof(words[1] ? words[1] : "1") * 1e6);
	else if (!strcmp(words[0], "poweroff"))
		status = leave(RB_POWER_OFF);
	else if (!strcmp(words[0], "reboot"))
		status = leave(RB_AUTOBOOT);
	else if (n > 1 && (!strcmp(words[0], "wait") || !strcmp(words[0], "gone")))
		status = await(words[1], n > 2 ? atof(words[2]) : 30, words[0][0] == 'w');
	else
		status = disk_order(words, n);
	printf(status ? "LAB fail %s: %s\n" : *reason ? "LAB ok %s = %s\n" : "LAB ok %s\n", order,
	       reason);
	return status;
}

/* ---- process 1 of a guest ---- */

static void load_modules(void)
{
	FILE *order = fopen("/lib/modules/order", "r");
	char path[256];

	while (order && fgets(path, sizeof(path), order)) {
		path[strcspn(path, "\n")] = 0;
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			printf("LAB error module %s: %s\n", path, strerror(errno));
		close(fd);
	}
	if (order)
		fclose(order);
}

static void open_console(void)
{
	struct termios t;
	int fd = open("/dev/hvc0", O_RDWR);

	if (fd < 0)
		fd = open("/dev/console", O_RDWR);
	for (int i = 0; i < 3; i++)
		dup2(fd, i);
	if (tcgetattr(0, &t) == 0) {
		t.c_lflag &= ~ECHO;	/* an order must not look like its answer */
		tcsetattr(0, TCSANOW, &t);
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	setvbuf(stdin, NULL, _IONBF, 0);
}

static _Noreturn void guest_main(void)
{
	char line[1024] = "", *orders, *order;
	FILE *f;

	is_init = true;
	mount("proc", "/proc", "proc", 0, "");
	mount("sysfs", "/sys", "sysfs", 0, "");
	mount("dev", "/dev", "devtmpfs", 0, "");
	open_console();
	load_modules();
	puts("LAB up");
	f = fopen("/proc/cmdline", "r");
	if (f && fgets(line, sizeof(line), f) && (orders = strstr(line, "lab="))) {
		orders += 4;
		orders[strcspn(orders, " \n")] = 0;
		while ((order = strsep(&orders, ",")))
			obey(order);
	}
	puts("LAB listening");
	for (;;) {
		if (!fgets(line, sizeof(line), stdin)) {
			clearerr(stdin);
			sleep(1);
			continue;
		}
		line[strcspn(line, "\r\n")] = 0;
		obey(line);
	}
}

int main(int argc, char **argv)
{
	int status = 0;

	if (getpid() == 1)
		guest_main();
	if (argc < 2) {
		fputs("usage: labio ORDER... (see the head of labio.c)\n", stderr);
		return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (int i = 1; i < argc; i++)
		status |= obey(argv[i]) != 0;
	return status;
}
